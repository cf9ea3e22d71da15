"""When simulated queries arrive, and which recorded query each repeats."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.sim.data import Outcomes, Trace
from services.simulator.engine import Workload

Array = NDArray[Any]


def poisson(count: int, rate_per_s: float, rng: np.random.Generator) -> Array:
    """`count` arrival times in seconds, exponential gaps."""
    return np.cumsum(rng.exponential(1.0 / rate_per_s, count))


def like_trace(trace: Trace, count: int, rate_per_s: float, rng: np.random.Generator) -> Array:
    """Arrival times with the gaps of the trace in their order, from a random start and round again, scaled in time so
    that the mean rate is `rate_per_s`: bursts keep their shape."""
    gaps = np.diff(trace.arrival_s, append=trace.arrival_s[-1] + np.diff(trace.arrival_s).mean())
    start = int(rng.integers(len(gaps)))
    taken = np.resize(np.roll(gaps, -start), count)
    return np.cumsum(taken * (count / rate_per_s / max(float(taken.sum()), 1e-9)))


def in_any_order(judge: Outcomes, count: int, rng: np.random.Generator) -> Array:
    """Rows: every query once in random order, again from the start when `count` is larger."""
    rounds = -(-count // len(judge))
    return np.concatenate([rng.permutation(len(judge)) for _ in range(rounds)])[:count]


def shifting(
    judge: Outcomes, arrival_s: Array, rng: np.random.Generator, *, every_s: float, alpha: float = 0.15
) -> tuple[Array, Array]:
    """Rows whose mix of categories changes every `every_s` seconds, and [windows, categories] the mixes.

    Each window's mix is drawn from a Dirichlet distribution with parameter `alpha`: small values leave two or three
    categories with nearly all queries.
    """
    names = sorted({c or "" for c in judge.categories})
    rows_of = [np.array([r for r, c in enumerate(judge.categories) if (c or "") == name]) for name in names]
    window = (arrival_s // every_s).astype(int)
    mixes = rng.dirichlet([alpha] * len(names), int(window.max()) + 1)
    rows = np.empty(len(arrival_s), int)
    for i, w in enumerate(window):
        rows[i] = rng.choice(rows_of[rng.choice(len(names), p=mixes[w])])
    return rows, mixes


def workload(
    judge: Outcomes, arrival_s: Array, rows: Array, models: list[int], *, tokens: Trace | None = None
) -> Workload:
    """The queries at `rows`, arriving then, for the models in these columns.

    With `tokens`, prompts are as long as the trace says, and answers too: each model's share of its own mean length
    is kept, scaled so that the mean over models is the trace's.
    """
    tokens_in = judge.tokens_in[rows].astype(float)
    tokens_out = judge.tokens_out[rows][:, models].astype(float)
    if tokens is not None:
        order = np.arange(len(rows)) % len(tokens)
        tokens_in = tokens.tokens_in[order].astype(float)
        mean = np.nanmean(judge.tokens_out[:, models], axis=0)
        tokens_out = tokens.tokens_out[order][:, None].astype(float) * (mean / mean.mean())
    tokens_out = np.where(np.isnan(tokens_out), np.nanmean(judge.tokens_out[:, models], axis=0), tokens_out)
    names = sorted({c or "" for c in judge.categories})
    group = np.array([names.index(judge.categories[r] or "") for r in rows])
    answered = None if judge.answered is None else judge.answered[rows][:, models]
    return Workload(arrival_s, rows, tokens_in, tokens_out, judge.score[rows][:, models].astype(float), answered, group)
