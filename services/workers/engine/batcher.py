"""Continuous batching: sequences join and leave between steps, and long prompts are read in pieces.

One `step` reads at most one piece of one prompt and gives every running sequence one token, so that a long prompt
never stalls running streams for longer than a piece. Synchronous and deterministic; the caller owns the thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from services.workers.engine import sampling
from services.workers.engine.energy import Meter
from services.workers.engine.runner import Logits, Runner
from services.workers.engine.schedule import Schedule
from services.workers.engine.text import Growing, Text
from shared.errors import CalmError, ContextExceeded, DeadlineExpired
from shared.messages import ChatMessage, Sampling

PREFILL_CHUNK = 256
"""Prompt tokens read in one step."""


@dataclass(frozen=True)
class Request:
    """A sequence to generate. Times are Unix seconds; `prompt` is used instead of `messages` when given."""

    id: str
    messages: list[ChatMessage]
    sampling: Sampling
    deadline_at: float | None = None
    prompt: list[int] | None = None


@dataclass(frozen=True)
class Delta:
    """Text that a running sequence gained in a step; empty text marks its first token."""

    id: str
    text: str


@dataclass(frozen=True)
class Finished:
    """A sequence that ended by itself."""

    id: str
    text: str
    reason: Literal["stop", "length"]
    tokens_in: int
    tokens_out: int
    mean_logprob: float
    min_logprob: float
    mean_entropy: float
    admitted_at: float
    first_token_at: float
    ended_at: float
    batch_mean: float
    """Sequences that shared its decode steps, itself included, on average."""
    energy_in_j: float
    energy_out_j: float
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Failed:
    """A sequence that was given up, with the reason."""

    id: str
    error: CalmError


Event = Delta | Finished | Failed


@dataclass
class _Sequence:
    request: Request
    prompt: list[int]
    limit: int
    growing: Growing
    source: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    batch_sum: int = 0
    steps: int = 0
    energy_in_j: float = 0.0
    energy_out_j: float = 0.0


class Batcher:
    """Generates for up to `slots` sequences at once over one runner."""

    def __init__(
        self,
        runner: Runner,
        text: Text,
        *,
        slots: int,
        context: int,
        meter: Meter,
        clock: Callable[[], float] = time.time,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        self._runner = runner
        self._text = text
        self._context = context
        self._meter = meter
        self._clock = clock
        self._chunk = prefill_chunk
        self._schedule = Schedule(slots, compact=runner.compact)
        self._sequences: dict[str, _Sequence] = {}

    @property
    def active(self) -> int:
        """Sequences taken in and not yet ended."""
        return len(self._sequences)

    @property
    def free_slots(self) -> int:
        return self._schedule.free

    def add(self, request: Request) -> None:
        """Take a request in; it is prefilled by later steps.

        Raises:
            ContextExceeded: its prompt does not fit the context and leave room for an answer.
        """
        prompt = self._text.prompt(request.messages) if request.prompt is None else request.prompt
        if len(prompt) >= self._context:
            raise ContextExceeded(
                f"The prompt has {len(prompt)} tokens with the chat template; the context holds {self._context}.",
                f"Shorten the prompt to under {self._context} tokens, or raise `context` in the fleet file.",
            )
        limit = min(request.sampling.max_tokens, self._context - len(prompt))
        self._sequences[request.id] = _Sequence(
            request, prompt, limit, Growing(self._text.tokenizer, request.sampling.stop),
            sampling.generator(request.sampling.seed),
        )  # fmt: skip
        self._schedule.add(request.id)

    def cancel(self, sequence: str) -> bool:
        """Stop a sequence and free its row; False when it is not here."""
        if sequence not in self._sequences:
            return False
        self._remove(sequence)
        return True

    def clear(self) -> list[str]:
        """Drop every sequence, after a step that failed; their ids."""
        ids = list(self._sequences)
        for sequence in ids:
            self._remove(sequence)
        return ids

    def step(self) -> list[Event]:
        """Advance by one prompt piece and one token per running sequence; empty when there is nothing to do."""
        events: list[Event] = [*self._expire()]
        before_j = self._meter.read_j()
        prefilling = self._schedule.next_prefill()
        if prefilling is not None:
            events += self._prefill(prefilling)
            after_j = self._meter.read_j()
            if prefilling in self._sequences:
                self._sequences[prefilling].energy_in_j += after_j - before_j
            before_j = after_j
        running = self._schedule.decoding
        ready = [s for s in running if s != prefilling]
        if ready:
            events += self._decode(before_j)
        return events

    # --- inside ---

    def _expire(self) -> list[Event]:
        now = self._clock()
        late = [
            s for s, q in self._sequences.items() if q.request.deadline_at is not None and now >= q.request.deadline_at
        ]
        for sequence in late:
            self._remove(sequence)
        error = DeadlineExpired(
            "The deadline passed while the answer was being generated.",
            "Raise `deadline_s`, or ask for fewer `max_tokens`.",
        )
        return [Failed(sequence, error) for sequence in late]

    def _remove(self, sequence: str) -> None:
        rows = self._schedule.rows
        if sequence in rows:
            self._runner.free(rows.index(sequence))
        for move in self._schedule.remove(sequence):
            self._runner.move(move.source, move.target, move.length)
        del self._sequences[sequence]

    def _prefill(self, sequence: str) -> list[Event]:
        state, schedule = self._sequences[sequence], self._schedule
        start = schedule.lengths[sequence]
        if start == 0:
            state.admitted_at = self._clock()
        piece = state.prompt[start : start + self._chunk]
        logits = self._runner.prefill(schedule.row_of(sequence), piece, start)
        schedule.lengths[sequence] = start + len(piece)
        if schedule.lengths[sequence] < len(state.prompt):
            return []
        schedule.prefilled(sequence)
        return self._take(np.asarray(logits)[None], [sequence])

    def _decode(self, before_j: float) -> list[Event]:
        schedule, span = self._schedule, self._schedule.span
        tokens, lengths = [0] * span, [0] * span
        rows: list[int] = []
        running: list[str] = []
        for row in range(span):
            sequence = schedule.rows[row]
            if sequence is None:
                continue
            lengths[row] = schedule.lengths[sequence]
            if sequence != schedule.prefilling:
                tokens[row] = self._sequences[sequence].tokens[-1]
                rows.append(row)
                running.append(sequence)
        logits = self._runner.decode(tokens, lengths)
        for sequence in running:
            schedule.lengths[sequence] += 1
            self._sequences[sequence].batch_sum += len(running)
            self._sequences[sequence].steps += 1
        share = (self._meter.read_j() - before_j) / len(running)
        for sequence in running:
            self._sequences[sequence].energy_out_j += share
        return self._take(logits if len(rows) == span else logits[rows], running)

    def _take(self, logits: Logits, running: list[str]) -> list[Event]:
        """Choose a token for each row of `logits` [n, vocab], and say what came of it."""
        states = [self._sequences[s] for s in running]
        choices = sampling.choose(logits, [s.request.sampling for s in states], [s.source for s in states])
        now = self._clock()
        events: list[Event] = []
        for sequence, state, choice in zip(running, states, choices, strict=True):
            first = not state.tokens
            state.tokens.append(choice.token)
            state.logprobs.append(choice.logprob)
            state.entropies.append(choice.entropy)
            if first:
                state.first_token_at = now
            text, reason = "", None
            if choice.token in self._text.stop_ids:
                reason = "stop"
            else:
                text = state.growing.push(choice.token)
                if state.growing.stopped:
                    reason = "stop"
                elif len(state.tokens) >= state.limit:
                    reason = "length"
            if reason is not None:
                text += state.growing.finish()
            if text or first:
                events.append(Delta(sequence, text))
            if reason is not None:
                events.append(self._finished(sequence, state, "stop" if reason == "stop" else "length", now))
        for event in events:
            if isinstance(event, Finished):
                self._remove(event.id)
        return events

    def _finished(self, sequence: str, state: _Sequence, reason: Literal["stop", "length"], now: float) -> Finished:
        return Finished(
            id=sequence,
            text=state.growing.text,
            reason=reason,
            tokens_in=len(state.prompt),
            tokens_out=len(state.tokens),
            mean_logprob=float(np.mean(state.logprobs)),
            min_logprob=float(np.min(state.logprobs)),
            mean_entropy=float(np.mean(state.entropies)),
            admitted_at=state.admitted_at,
            first_token_at=state.first_token_at,
            ended_at=now,
            batch_mean=state.batch_sum / state.steps if state.steps else 1.0,
            energy_in_j=state.energy_in_j,
            energy_out_j=state.energy_out_j,
            tokens=tuple(state.tokens),
        )
