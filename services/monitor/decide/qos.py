"""QoS windows: what the last ends, loads and judgements say about each artifact and each card. Pure."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from shared import messages as m
from shared.bounded import put

WINDOW = 200
"""Ends and judgements remembered, per artifact and device class and per card."""
LOADS = 20
"""Loads remembered per artifact and device class."""


@dataclass(frozen=True)
class _Run:
    """Cost of one answer on one device class."""

    tokens_in: int
    tokens_out: int
    prefill_s: float
    decode_s: float
    in_j: float
    out_j: float
    batch_mean: float
    source: str


@dataclass(frozen=True)
class _Answered:
    """One answer as the client saw it."""

    tokens_out: int
    total_s: float
    ttft_s: float
    energy_j: float


@dataclass
class _Artifact:
    runs: deque[_Run] = field(default_factory=lambda: deque(maxlen=WINDOW))
    loads: deque[float] = field(default_factory=lambda: deque(maxlen=LOADS))


@dataclass
class _Card:
    ends: deque[_Answered | None] = field(default_factory=lambda: deque(maxlen=WINDOW))
    """None for a failure."""
    scores: OrderedDict[str, float] = field(default_factory=OrderedDict)
    """The latest judgement by query, oldest first."""


class Windows:
    """The windows. `changes` counts what has been observed."""

    def __init__(self) -> None:
        self._artifacts: dict[tuple[str, str], _Artifact] = {}
        self._cards: dict[str, _Card] = {}
        self.changes = 0

    def observe(self, done: m.Done) -> None:
        """A query has ended. A query that was cancelled, or that no card took, says nothing."""
        answer = done.answer
        card = done.card or (answer.model if answer else "")
        if answer is None:
            if card and not (done.failure and done.failure.code == "cancelled"):
                self._card(card).ends.append(None)
                self.changes += 1
            return
        self._card(card).ends.append(
            _Answered(
                tokens_out=answer.usage.tokens_out,
                total_s=answer.timings.total_s,
                ttft_s=answer.timings.total_s - answer.timings.decode_s,
                energy_j=answer.energy.joules,
            )
        )
        self._artifact(done.artifact or answer.artifact, done.device_class).runs.append(_run(done, answer))
        self.changes += 1

    def observe_load(self, artifact: str, device_class: str, seconds: float) -> None:
        """An artifact has become resident, `seconds` after the load began."""
        self._artifact(artifact, device_class).loads.append(seconds)
        self.changes += 1

    def observe_feedback(self, card: str, query_id: str, score: float) -> None:
        """A user has judged an answer of `card`; a later judgement of the same query replaces it."""
        scores = self._card(card).scores
        scores.pop(query_id, None)
        put(scores, query_id, score, WINDOW)
        self.changes += 1

    def snapshot(self, version: int, at: float) -> m.Qos:
        """The state of all windows."""
        return m.Qos(
            version=version,
            artifacts=[
                _artifact_qos(name, device, window) for (name, device), window in sorted(self._artifacts.items())
            ],
            cards=[_card_qos(name, window) for name, window in sorted(self._cards.items())],
            at=at,
        )

    def _artifact(self, name: str, device_class: str) -> _Artifact:
        return self._artifacts.setdefault((name, device_class), _Artifact())

    def _card(self, name: str) -> _Card:
        return self._cards.setdefault(name, _Card())


def _run(done: m.Done, answer: m.Answer) -> _Run:
    timings, joules = answer.timings, answer.energy.joules - answer.energy.retried_j
    in_j, out_j = done.energy_in_j, done.energy_out_j
    if not in_j and not out_j and joules:  # the worker does not know the split: by time, as power is about constant
        share = _ratio(timings.prefill_s, timings.prefill_s + timings.decode_s)
        in_j, out_j = joules * share, joules * (1.0 - share)
    return _Run(
        tokens_in=answer.usage.tokens_in - answer.usage.tokens_cached,  # rates are those of tokens that were read
        tokens_out=answer.usage.tokens_out,
        prefill_s=timings.prefill_s,
        decode_s=timings.decode_s,
        in_j=in_j,
        out_j=out_j,
        batch_mean=max(done.batch_mean, 1.0),
        source=answer.energy.source,
    )


def _artifact_qos(name: str, device_class: str, window: _Artifact) -> m.ArtifactQos:
    runs = window.runs
    # The first token comes out of prefill, so n tokens take n - 1 decode steps.
    steps = [max(run.tokens_out - 1, 0) for run in runs]
    tokens_in = sum(run.tokens_in for run in runs)
    return m.ArtifactQos(
        artifact=name,
        device_class=device_class,
        count=len(runs),
        prefill_s_per_token=_ratio(sum(run.prefill_s for run in runs), tokens_in),
        tpot_s=_ratio(sum(run.decode_s for run, n in zip(runs, steps, strict=True) if n), sum(steps)),
        tpot_batch=_ratio(sum(run.batch_mean * n for run, n in zip(runs, steps, strict=True)), sum(steps)) or 1.0,
        load_s=_mean(window.loads),
        loads=len(window.loads),
        energy_j_per_token_in=_ratio(sum(run.in_j for run in runs), tokens_in),
        energy_j_per_token_out=_ratio(sum(run.out_j for run in runs), sum(run.tokens_out for run in runs)),
        energy_source=runs[-1].source if runs else "model",
    )


def _card_qos(name: str, window: _Card) -> m.CardQos:
    answered = [end for end in window.ends if end is not None]
    latencies = sorted(end.total_s for end in answered)
    return m.CardQos(
        card=name,
        answered=len(answered),
        failed=len(window.ends) - len(answered),
        tokens_out_mean=_mean([end.tokens_out for end in answered]),
        latency_p50_s=percentile(latencies, 0.5),
        latency_p95_s=percentile(latencies, 0.95),
        ttft_p50_s=percentile(sorted(end.ttft_s for end in answered), 0.5),
        energy_j_mean=_mean([end.energy_j for end in answered]),
        feedback_count=len(window.scores),
        feedback_mean=_mean(window.scores.values()),
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest of the ascending values that at least `share` of them do not exceed; 0 of none."""
    if not ordered:
        return 0.0
    rank = -(-len(ordered) * round(share * 100) // 100)  # ceiling, in whole numbers
    return ordered[max(rank, 1) - 1]


def _mean(values: Iterable[float]) -> float:
    given = list(values)
    return sum(given) / len(given) if given else 0.0


def _ratio(amount: float, count: float) -> float:
    return amount / count if count else 0.0
