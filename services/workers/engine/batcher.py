"""Continuous batching: sequences join and leave between steps, and long prompts are read in pieces.

One `step` reads prompts for as long as `Pace` allows beside those that decode, and gives every running sequence one
token, so that a long prompt never stalls running streams. Synchronous; the caller owns the thread.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from services.workers.engine import sampling
from services.workers.engine.drafting import Drafter, Widths
from services.workers.engine.energy import AttributedMeter, Meter
from services.workers.engine.gate import Gate, Open
from services.workers.engine.lora import APART, Choice, Stack
from services.workers.engine.pace import JOINED, STALL, Pace
from services.workers.engine.runner import Logits, Runner
from services.workers.engine.schedule import Move, Schedule
from services.workers.engine.text import Growing, Text
from shared.errors import CalmError, ContextExceeded, DeadlineExpired
from shared.messages import ChatMessage, Sampling

PREFILL_CHUNK = 256
"""Most prompt tokens read in one piece: 512 took as long as twice 256 (SmolLM2-135M, 576 and 568 ms)."""

LONG = 384
"""Prompt tokens to read from which on streams beside them are held up less (`pace.JOINED`) than by shorter prompts,
which are soon read (`pace.STALL`)."""


@dataclass(frozen=True)
class Request:
    """A sequence to generate. Times are Unix seconds; `prompt` is used instead of `messages` when given."""

    id: str
    messages: list[ChatMessage]
    sampling: Sampling
    deadline_at: float | None = None
    prompt: list[int] | None = None
    urgent: bool = True
    """Read before those that are not."""
    adapter: str = ""
    """LoRA adapter over the model; empty for none."""
    streamed: bool = True
    """Its text is wanted as it grows, and not only at its end."""
    prompt_lookup: bool = False
    """While it runs alone, guess tokens out of its own text and verify several at once: the answer is the same."""


@dataclass(frozen=True)
class Delta:
    """Text that a running sequence gained in a step; empty text marks its first token. Of one that is not streamed all
    may come with its end."""

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
    tokens_cached: int = 0
    """Of `tokens_in`, those that lay in the KV cache already and were not read."""
    tokens_drafted: int = 0
    """Tokens that were guessed and verified."""
    tokens_accepted: int = 0
    """Of these, those that were right."""


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
    adapter: int = 0
    drafter: Drafter | None = None
    tokens_drafted: int = 0
    tokens_accepted: int = 0
    tokens_cached: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    batch_sum: int = 0
    steps: int = 0
    energy_in_j: float = 0.0
    energy_out_j: float = 0.0


@dataclass(frozen=True)
class _Piece:
    """Tokens of a prompt that are to be read behind its first `start`."""

    sequence: str
    tokens: list[int]
    start: int


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
        timer: Callable[[], float] = time.perf_counter,
        prefill_chunk: int = PREFILL_CHUNK,
        long: int = LONG,
        schedule: Schedule | None = None,
        gate: Gate | None = None,
        adapters: Choice | None = None,
    ) -> None:
        """`clock` gives Unix seconds, `timer` measures steps; `schedule` is made for `slots` when left out. Streams are
        held up less beside prompts of more than `long` tokens, where the runner reads and decodes in one pass."""
        self._runner = runner
        self._text = text
        self._context = context
        self._meter = meter
        self._clock = clock
        self._timer = timer
        self._pace = Pace(prefill_chunk)
        self._long = long
        self._schedule = schedule or Schedule(slots, compact=runner.compact)
        gate = gate or Open()
        self._gate = meter.gated(gate) if isinstance(meter, AttributedMeter) else gate
        self._adapters = adapters or Stack()
        self._widths = Widths()
        self._chooser = sampling.Chooser(runner.vocab)
        self._sequences: dict[str, _Sequence] = {}
        self._came: list[Event] = []
        self._on_end: Callable[[list[Event]], None] | None = None
        self._deadlines: dict[str, float] = {}
        self._counted_j = 0.0
        self._moves: list[Move] = []
        """Rows to copy before the cache is used again."""

    @property
    def active(self) -> int:
        """Sequences taken in and not yet ended."""
        return len(self._sequences)

    @property
    def free_slots(self) -> int:
        return self._schedule.free

    @property
    def short_of_memory(self) -> bool:
        """Somebody waits for KV memory although there is a row: what is taken in now waits behind it."""
        return self._schedule.short_of_memory

    def add(self, request: Request) -> None:
        """Take a request in; it is prefilled by later steps.

        Raises:
            ContextExceeded: its prompt does not fit the context and leave room for an answer.
            ModelMissing: it asks for an adapter that is not held here.
        """
        adapter = self._adapters.number(request.adapter)
        prompt = self._text.prompt(request.messages) if request.prompt is None else request.prompt
        if len(prompt) >= self._context:
            raise ContextExceeded(
                f"The prompt has {len(prompt)} tokens with the chat template; the context holds {self._context}.",
                f"Shorten the prompt to under {self._context} tokens, or raise `context` in the fleet file.",
            )
        limit = min(request.sampling.max_tokens, self._context - len(prompt))
        self._sequences[request.id] = _Sequence(
            request, prompt, limit, Growing(self._text.tokenizer, request.sampling.stop, late=not request.streamed),
            sampling.generator(request.sampling.seed), adapter,
            Drafter(prompt) if request.prompt_lookup and self._runner.verifies else None,
        )  # fmt: skip
        if request.deadline_at is not None:
            self._deadlines[request.id] = request.deadline_at
        self._schedule.add(
            request.id, _keys(prompt, adapter), reserve=len(prompt) + limit, urgent=request.urgent, now_s=self._clock()
        )

    def rehearse(self) -> None:
        """Render, encode and decode some text, so that the first prompt does not find everything cold: the chat
        template of SmolLM2 takes 4 ms to compile, and others wait for the interpreter meanwhile."""
        with contextlib.suppress(CalmError):  # of a template that is refused: the query is told
            growing = Growing(self._text.tokenizer, [])
            for token in self._text.prompt([ChatMessage(role="user", content="rehearsal")]):
                growing.push(token)
            growing.finish()

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
        self._apply(self._schedule.forget())  # what a failed step left there is not to be trusted
        return ids

    def step(self, on_end: Callable[[list[Event]], None] | None = None) -> list[Event]:
        """Read prompts for a while and advance each running sequence by a token; empty when nothing is to do.

        `on_end` is told, as soon as an answer has ended, all that the step has brought so far, before the texts of the
        other sequences are made; and so it is of the first token of a prompt that was read apart, before the decoding
        that follows. What it is not told of is returned.
        """
        self._on_end = on_end
        self._came = self._expire()
        if self._sequences:
            with self._gate:
                self._counted_j = self._meter.read_j()
                piece = self._read()
                self._apply([])
                if self._schedule.span:
                    self._decode(piece)
        came, self._came = self._came, []
        return came

    # --- inside ---

    def _expire(self) -> list[Event]:
        if not self._deadlines:
            return []
        now = self._clock()
        late = [sequence for sequence, at in self._deadlines.items() if now >= at]
        for sequence in late:
            self._remove(sequence)
        error = DeadlineExpired(
            "The deadline passed while the answer was being generated.",
            "Raise `deadline_s`, or ask for fewer `max_tokens`.",
        )
        return [Failed(sequence, error) for sequence in late]

    def _apply(self, moves: list[Move]) -> None:
        """Carry out what earlier ends left to do, then these."""
        for move in [*self._moves, *moves]:
            self._runner.apply(move)
        self._moves.clear()

    def _remove(self, sequence: str) -> None:
        self._moves += self._schedule.remove(sequence)  # carried out with the next step: an answer does not wait for it
        self._deadlines.pop(sequence, None)
        del self._sequences[sequence]

    def _charge_j(self) -> float:
        """Joules since the last call, or since the step began: each is charged once."""
        before_j, self._counted_j = self._counted_j, self._meter.read_j()
        return self._counted_j - before_j

    def _read(self) -> _Piece | None:
        """Read pieces of prompts, of several when they are short, within the time that `Pace` allows; what is to be
        read with the decoding that follows is returned."""
        left_s, apart = 0.0, False
        while True:
            sequence, moves = self._schedule.next_prefill(self._clock())
            if sequence is None:
                return None
            if not apart:
                left_s = self._pace.budget_s(len(self._schedule.decoding), contended=self._gate.contended)
            began = self._timer()
            self._apply(moves)
            state = self._sequences[sequence]
            if not state.admitted_at:
                state.admitted_at = self._clock()
                state.tokens_cached = self._schedule.reused[sequence]
            most = self._pace.chunk(left_s)
            piece = None if apart else self._joined(sequence, most)
            if piece is not None:
                return piece
            self._read_piece(sequence, most)
            apart = True
            left_s -= self._timer() - began
            unfinished = sequence in self._sequences and not self._sequences[sequence].tokens
            if unfinished or not self._pace.enough(left_s):
                return None

    def _joined(self, sequence: str, most: int) -> _Piece | None:
        """What of a prompt to read in one pass with those that decode. A prompt that can be read at once is read apart:
        so can the next one in the same step. And so are those that are not long while engines take turns."""
        state, start, rows = self._sequences[sequence], len(self._schedule.tokens(sequence)), self._schedule.span
        first, unread = start == state.tokens_cached, len(state.prompt) - state.tokens_cached
        if not (self._runner.joins and rows) or state.adapter or (first and unread <= most):
            return None
        if unread <= self._long and self._gate.contended:  # steps are rare: each is to hold what several prompts need
            return None
        stall = JOINED if unread > self._long else STALL
        tokens = self._pace.joined(rows, contended=self._gate.contended, first=first, stall=stall)
        return _Piece(sequence, state.prompt[start : start + tokens], start)

    def _read_piece(self, sequence: str, most: int) -> None:
        state, schedule = self._sequences[sequence], self._schedule
        held = schedule.tokens(sequence)
        start = len(held)
        piece = state.prompt[start : start + most]
        self._adapters.select([state.adapter])
        began = self._timer()
        logits = self._runner.prefill(schedule.row_of(sequence), piece, start)
        self._pace.has_read(len(piece), self._timer() - began)
        held += _keys(piece, state.adapter)
        state.energy_in_j += self._charge_j()
        if len(held) < len(state.prompt):
            return
        self._apply(schedule.prefilled(sequence))
        self._take(np.asarray(logits)[None], [sequence])
        self._tell()

    def _decode(self, piece: _Piece | None) -> None:
        schedule = self._schedule
        if piece is None and len(schedule.decoding) == 1:
            alone = schedule.decoding[0]
            draft = self._draft(self._sequences[alone])
            if draft:
                self._verify(alone, draft)
                return
        began = self._timer()
        after: Logits | None = None
        """Logits behind a prompt that has been read to its end."""
        tokens, lengths, adapters = [], [], []
        decoding: list[tuple[int, str]] = []
        for index, row in enumerate(schedule.rows[: schedule.span]):
            if row.owner is None or row.reading:  # what is written behind its tokens is never read
                del row.tokens[self._context - 1 :]
                tokens.append(0)
                adapters.append(0)
            else:
                decoding.append((index, row.owner))
                tokens.append(self._sequences[row.owner].tokens[-1])
                adapters.append(self._sequences[row.owner].adapter)
            lengths.append(len(row.tokens))
        self._adapters.select(adapters)
        if piece is None:
            logits = self._runner.decode(tokens, lengths)
            seconds = self._timer() - began
            self._pace.has_decoded(len(decoding), seconds)
            if len(decoding) == 1:
                self._widths.took(0, seconds)
            share = self._charge_j() / len(decoding)
        else:
            reader, target = self._sequences[piece.sequence], schedule.row_of(piece.sequence)
            ends = piece.start + len(piece.tokens) == len(reader.prompt)
            logits = self._runner.join(target, piece.tokens, piece.start, tokens, lengths, ends=ends)
            self._pace.has_joined(len(piece.tokens), len(decoding), self._timer() - began)
            share = self._charge_j() / (len(piece.tokens) + len(decoding))
            reader.energy_in_j += share * len(piece.tokens)
            schedule.rows[target].tokens += piece.tokens
            after, logits = (logits[:1], logits[1:]) if ends else (None, logits)
        for index, sequence in decoding:
            schedule.rows[index].tokens.append(tokens[index] + APART * adapters[index])
            state = self._sequences[sequence]
            state.batch_sum += len(decoding)
            state.steps += 1
            state.energy_out_j += share
        rows = [index for index, _ in decoding]
        self._take(logits if len(rows) == len(tokens) else logits[rows], [s for _, s in decoding])
        if piece is not None and after is not None:
            self._apply(schedule.prefilled(piece.sequence))
            self._take(after, [piece.sequence])

    def _draft(self, state: _Sequence) -> list[int]:
        """Guesses worth verifying; never more than the answer may still have beside the token that is certain."""
        if state.drafter is None:
            return []
        return state.drafter.draft(state.limit - len(state.tokens) - 1, self._widths.slope)

    def _verify(self, sequence: str, draft: list[int]) -> None:
        """Read the last token and what is guessed to follow it, and choose as ever after each: what is chosen after a
        right guess is what another step would have chosen. What lies behind the first wrong one is read again."""
        state, held = self._sequences[sequence], self._schedule.tokens(sequence)
        tokens = [state.tokens[-1], *draft]
        self._adapters.select([state.adapter])
        began = self._timer()
        logits = self._runner.verify(self._schedule.row_of(sequence), tokens, len(held))
        self._widths.took(len(draft), self._timer() - began)
        state.energy_out_j += self._charge_j()
        state.batch_sum += 1
        state.steps += 1
        state.tokens_drafted += len(draft)
        for place, token in enumerate(tokens):
            held.append(token + APART * state.adapter)
            right = place < len(draft)
            self._take(logits[place : place + 1], [sequence])
            right = right and state.tokens[-1] == draft[place]
            state.tokens_accepted += right
            if not right or sequence not in self._sequences:
                return

    def _take(self, logits: Logits, running: list[str]) -> None:
        """Choose a token for each row of `logits` [n, vocab], and say what came of it: first of those that end."""
        states = [self._sequences[sequence] for sequence in running]
        choices = [
            self._chooser.choose(logits[row], state.request.sampling, state.source) for row, state in enumerate(states)
        ]
        now = self._clock()  # choosing, for all rows of the step, is part of generating
        chosen = list(zip(states, choices, strict=True))
        ending = [self._ends(*each) for each in chosen]
        if any(ending):
            for (state, choice), ends in zip(chosen, ending, strict=True):
                if ends:
                    self._advance(state, choice, now)
            self._tell()
        for (state, choice), ends in zip(chosen, ending, strict=True):
            if not ends:
                self._advance(state, choice, now)

    def _tell(self) -> None:
        """What the step has brought so far goes now, to whoever listens."""
        if self._on_end is not None and self._came:
            came, self._came = self._came, []
            self._on_end(came)

    def _ends(self, state: _Sequence, choice: sampling.Choice) -> bool:
        """Whether this token is the last, as far as can be told before its text is made."""
        return choice.token in self._text.stop_ids or len(state.tokens) + 1 >= state.limit

    def _advance(self, state: _Sequence, choice: sampling.Choice, now: float) -> None:
        sequence, first = state.request.id, not state.tokens
        state.tokens.append(choice.token)
        if state.drafter is not None:
            state.drafter.add(choice.token)
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
            self._came.append(Delta(sequence, text))
        if reason is not None:
            self._came.append(self._finished(sequence, state, "stop" if reason == "stop" else "length", now))
            self._remove(sequence)

    def _finished(self, sequence: str, state: _Sequence, reason: Literal["stop", "length"], now: float) -> Finished:
        return Finished(
            id=sequence,
            text=state.growing.text,
            reason=reason,
            tokens_in=len(state.prompt),
            tokens_out=len(state.tokens),
            mean_logprob=math.fsum(state.logprobs) / len(state.logprobs),
            min_logprob=min(state.logprobs),
            mean_entropy=math.fsum(state.entropies) / len(state.entropies),
            admitted_at=state.admitted_at,
            first_token_at=state.first_token_at,
            ended_at=now,
            batch_mean=state.batch_sum / state.steps if state.steps else 1.0,
            energy_in_j=state.energy_in_j,
            energy_out_j=state.energy_out_j,
            tokens=tuple(state.tokens),
            tokens_cached=state.tokens_cached,
            tokens_drafted=state.tokens_drafted,
            tokens_accepted=state.tokens_accepted,
        )


def _keys(tokens: list[int], adapter: int) -> list[int]:
    """What the schedule compares prefixes by: the same token under another adapter is another."""
    return [token + APART * adapter for token in tokens] if adapter else tokens
