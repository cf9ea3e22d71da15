"""Weights that hold the stated objectives: one price per constraint, raised while it is broken. Pure.

The planner maximises, query by query, the Lagrangian of "best quality subject to the objectives":

    U = w_q q - w_l f(L / S) - w_e E / J

with S the objective for the 95th percentile of latency, J that for the mean energy of a query, and f a concave curve.
(The Lagrangian proper has the probability of being late in place of f. It was tried and holds less quality at the same
percentile: a query that is not late itself still makes others so, and f charges for that.) The weights are prices.
Each follows online mirror descent in the dual with the entropy as mirror map (Balseiro, Lu & Mirrokni, "The Best of
Many Worlds: Dual Mirror Descent for Online Allocation Problems", Operations Research 71, 2023): it is multiplied by
exp(step x violation) at every query, where

    energy      violation = E / J - 1
    latency     violation = P(late) / a - 1     (quantile tracking on exceedances, not on means: Gibbs & Candes,
                                                 "Adaptive Conformal Inference under Distribution Shift", NeurIPS 2021)
    quality     violation = 1 - q / (r q_ref)

An end comes late, and whether one query was late is a noisy witness, so a price moves by what was *predicted* when
the query was routed, times the ratio of what came to what had been predicted over the ends known so far: no delay,
little noise, and no bias that lasts. For energy a term in proportion to the violation of the recent *ends* is added, as
in Angelopoulos, Candes & Tibshirani, "Conformal PID Control for Time Series Prediction", NeurIPS 2023. Lateness comes
in bursts: there the price moves slowly, and the predicted waiting time in the utility answers the burst itself. `a` is
below 0.05 by what it takes to hold a window of `WINDOW` queries.

`decided`, `late` and `ended` take a state and what happened, and give the next state; `weights` reads one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import msgspec

from shared import messages as m

WINDOW = 500
"""Queries over which an objective is to hold."""
TAIL = 0.05
"""Share of queries that may exceed the latency objective: it is stated for the 95th percentile."""
CONFIDENCE_Z = 1.6
"""Standard deviations between the share aimed at and `TAIL`: 0.95 of windows, were exceedances independent."""
ENERGY_MARGIN = 0.06
"""The energy objective is aimed at with this much to spare."""
HORIZON = 8000.0
"""Queries whose violations a step remembers: it is 1 / root(sum of squared violations) (AdaGrad: Duchi, Hazan & Singer,
JMLR 2011), which is 1 / (spread x root(n)) after n queries. Older ones are forgotten, so that a step does not fall to
nothing and a change of load is followed. From 500 to 32,000 made no difference that could be told from noise."""
GAIN = {"latency": 0.0, "energy": 1.0, "quality": 0.0}
"""Change of a price's logarithm for a recent mean violation of 1 by what has ended."""
MEMORY = 60.0
"""Ends over which recent means reach back."""
RATIO_MEMORY = 300.0
"""Ends over which the ratio of outcomes to predictions reaches back."""
RATIO_PRIOR = 50.0
"""Ends that the belief in unbiased predictions is worth."""
CLIP = 10.0
"""Largest violation that one query may count: an outlier must not move a price out of all proportion."""
HIGHEST = {"latency": 1.5, "energy": 3.0, "quality": 20.0}
"""Upper bounds of the prices, in units of quality: above, choices no longer change, and the price would only have a
long way back. The lower bounds are the fleet's own weights: what the fleet prefers anyway, objectives only add to. The
price of quality multiplies the fleet's own weight."""
LEAST = 0.001
"""A price is never nothing: it could not grow."""
SPREAD = 0.5
"""Standard deviation of log(latency / predicted latency) before any has been seen."""
LEAST_SPREAD, GREATEST_SPREAD = 0.1, 1.5
SLOPE = math.sqrt(8.0 / math.pi)
DEAD_BAND = 0.02
"""A weight that moved by less than this share since it was last told is not told again."""


@dataclass(frozen=True)
class Decided:
    """A query has been routed: what was predicted of the card that was chosen."""

    at: float
    """Unix seconds."""
    latency_s: float
    energy_j: float
    quality: float = 0.0
    reference: float | None = None
    """Predicted quality of the objectives' reference card for the same query; None when it is not a candidate."""


@dataclass(frozen=True)
class Ended:
    """A query has ended."""

    latency_s: float
    energy_j: float
    predicted: Decided
    known_late: bool = False
    """That it is late has been told before, by `late`."""


@dataclass(frozen=True)
class Price:
    """One constraint: `log` is the price's integral, `mean` the recent mean of what ended, relative to the limit."""

    log: float = 0.0
    lowest: float = 1.0
    count: int = 0
    outcome: float = 0.0
    """Discounted sums over ends of what came and of what had been predicted, in the constraint's own unit."""
    expected: float = 0.0
    recent: float = 0.0
    """Recent mean violation of the ends."""
    squares: float = 0.0
    """Discounted sum of squared violations that the price has moved by."""


@dataclass(frozen=True)
class State:
    """The controller's whole memory."""

    latency: Price = field(default_factory=Price)
    energy: Price = field(default_factory=Price)
    quality: Price = field(default_factory=Price)
    spread: float = SPREAD
    """Standard deviation of log(latency / predicted latency), recent."""
    bias: float = 0.0
    """Mean of the same."""
    latencies: tuple[float, ...] = ()
    """Of the last `WINDOW` ends, oldest first."""
    energies: tuple[float, ...] = ()
    arrived_at: float = 0.0
    gap_s: float = 0.0
    """Recent mean time between two arrivals."""


@dataclass(frozen=True)
class Held:
    """How the objectives stand over the last `WINDOW` ends. None where nothing is known."""

    count: int = 0
    latency_p95_s: float | None = None
    energy_j_mean: float | None = None
    energy_j_per_hour: float | None = None
    infeasible: tuple[str, ...] = ()
    """Objectives that are broken with the price at its bound."""


def start(policy: m.Policy) -> State:
    """The state before any observation: the fleet's own weights as prices."""
    w_l, w_e = max(policy.w_latency, LEAST), max(policy.w_energy, LEAST)
    return State(latency=Price(math.log(w_l), w_l), energy=Price(math.log(w_e), w_e))


def decided(state: State, objectives: m.Objectives, seen: Decided) -> State:
    """A query has been routed: each price moves by its predicted violation."""
    state = _arrived(state, seen.at)
    if objectives.latency_p95_s is not None:
        tardy = late_probability(seen.latency_s / objectives.latency_p95_s, state.spread)
        violation = min(tardy * ratio(state.latency), 1.0) / exceedance_target() - 1.0
        state = replace(state, latency=_move(state.latency, "latency", violation))
    if (limit := energy_limit_j(objectives, state.gap_s)) is not None:
        violation = seen.energy_j * ratio(state.energy) / (limit * (1.0 - ENERGY_MARGIN)) - 1.0
        state = replace(state, energy=_move(state.energy, "energy", violation))
    if objectives.min_quality_ratio is not None and seen.reference:
        violation = 1.0 - seen.quality / (seen.reference * objectives.min_quality_ratio)
        state = replace(state, quality=_move(state.quality, "quality", violation))
    return state


def ended(state: State, objectives: m.Objectives, seen: Ended) -> State:
    """A query has ended: the ratios of outcomes to predictions move."""
    expected = seen.predicted
    state = replace(state, latencies=(*state.latencies[-(WINDOW - 1) :], seen.latency_s))
    if expected.latency_s > 0.0 and seen.latency_s > 0.0:
        error = math.log(seen.latency_s / expected.latency_s)
        variance = state.spread**2 + ((error - state.bias) ** 2 - state.spread**2) / RATIO_MEMORY
        state = replace(
            state,
            bias=state.bias + (error - state.bias) / RATIO_MEMORY,
            spread=max(LEAST_SPREAD, min(math.sqrt(variance), GREATEST_SPREAD)),
        )
    if objectives.latency_p95_s is not None and not seen.known_late:
        state = _witness(state, objectives.latency_p95_s, expected, late=seen.latency_s > objectives.latency_p95_s)
    state = replace(state, energies=(*state.energies[-(WINDOW - 1) :], seen.energy_j))
    if (limit := energy_limit_j(objectives, state.gap_s)) is not None:
        state = replace(state, energy=_learn(state.energy, seen.energy_j, expected.energy_j, limit))
    return state


def late(state: State, objectives: m.Objectives, predicted: Decided) -> State:
    """A query has not ended within the latency objective: it counts as late now, not when it ends at last."""
    if objectives.latency_p95_s is None:
        return state
    return _witness(state, objectives.latency_p95_s, predicted, late=True)


def weights(state: State, objectives: m.Objectives, policy: m.Policy) -> m.Policy:
    """The fleet's policy with the weights as moved, S and J in the places of its scales.

    Where there is no objective, the policy's own weight stands.
    """
    changes: dict[str, float] = {}
    if objectives.latency_p95_s is not None:
        changes["latency_slo_s"] = objectives.latency_p95_s
        changes["w_latency"] = _value(state.latency, "latency")
    if (limit := energy_limit_j(objectives, state.gap_s)) is not None:
        changes["energy_ref_j"] = limit
        changes["w_energy"] = _value(state.energy, "energy")
    if objectives.min_quality_ratio is not None:
        changes["w_quality"] = policy.w_quality * _value(state.quality, "quality")
    return msgspec.structs.replace(policy, **changes)


def held(state: State, objectives: m.Objectives) -> Held:
    """How the objectives stand, for people and for the knowledge base."""
    p95 = percentile95(state.latencies)
    mean = sum(state.energies) / len(state.energies) if state.energies else None
    limit = energy_limit_j(objectives, state.gap_s)
    broken: Mapping[str, bool] = {
        "latency_p95_s": objectives.latency_p95_s is not None
        and p95 is not None
        and p95 > objectives.latency_p95_s
        and _at_bound(state.latency, "latency"),
        "energy_j": limit is not None and mean is not None and mean > limit and _at_bound(state.energy, "energy"),
        "min_quality_ratio": objectives.min_quality_ratio is not None and _at_bound(state.quality, "quality"),
    }
    return Held(
        count=len(state.latencies),
        latency_p95_s=p95,
        energy_j_mean=mean,
        energy_j_per_hour=mean / state.gap_s * 3600.0 if mean is not None and state.gap_s > 0.0 else None,
        infeasible=tuple(name for name, is_broken in broken.items() if is_broken),
    )


def told(before: m.Policy | None, now: m.Policy) -> bool:
    """Whether the weights moved enough, or the objectives changed, since `before` was told to the planners."""
    if before is None or before.latency_slo_s != now.latency_slo_s:
        return True
    pairs = (
        (before.w_quality, now.w_quality),
        (before.w_latency, now.w_latency),
        (before.w_energy / before.energy_ref_j, now.w_energy / now.energy_ref_j),
    )
    return any(abs(new - old) > DEAD_BAND * max(abs(old), 1e-9) for old, new in pairs)


def late_probability(relative: float, spread: float) -> float:
    """P(L > S) for a prediction that is `relative` to S, latency being log-logistic about its prediction.

    The log-logistic with the scale of a normal of standard deviation `spread` (times sqrt(8 / pi), about 1.6, which
    matches their slopes at the median) is within 0.02 of the log-normal, has the heavier tail that queues show, and
    costs one power.
    """
    return 1.0 / (1.0 + relative ** (-SLOPE / spread)) if relative > 0.0 else 0.0


def exceedance_target(window: int = WINDOW, z: float = CONFIDENCE_Z) -> float:
    """Share of exceedances to aim at, so that a window of `window` queries stays within `TAIL`.

    The root of a + z sqrt(a (1 - TAIL) / window) = TAIL.
    """
    b = z * math.sqrt((1.0 - TAIL) / window)
    return ((math.sqrt(b * b + 4.0 * TAIL) - b) / 2.0) ** 2


def energy_limit_j(objectives: m.Objectives, gap_s: float) -> float | None:
    """Joules a query may take on average: as stated, or what a stated power leaves each at the present rate."""
    limits = []
    if objectives.energy_j_per_query is not None:
        limits.append(objectives.energy_j_per_query)
    if objectives.energy_j_per_hour is not None and gap_s > 0.0:
        limits.append(objectives.energy_j_per_hour / 3600.0 * gap_s)
    return min(limits) if limits else None


def percentile95(values: tuple[float, ...]) -> float | None:
    """The smallest value that at least 95 % do not exceed; None of none."""
    return sorted(values)[max(math.ceil(len(values) * (1.0 - TAIL)) - 1, 0)] if values else None


def ratio(price: Price) -> float:
    """What came, relative to what had been predicted; 1 while little is known."""
    prior = RATIO_PRIOR / max(price.count, 1.0) * price.expected
    floor = max(price.expected + prior, 1e-12)
    return max(0.2, min((price.outcome + prior) / floor, 5.0)) if price.expected > 0.0 else 1.0


def _witness(state: State, objective_s: float, predicted: Decided, *, late: bool) -> State:
    expected = late_probability(predicted.latency_s / objective_s, state.spread)
    return replace(state, latency=_learn(state.latency, float(late), expected, exceedance_target()))


def _arrived(state: State, at: float) -> State:
    if state.arrived_at <= 0.0:
        return replace(state, arrived_at=at)
    gap = max(at - state.arrived_at, 0.0)
    mean = gap if state.gap_s <= 0.0 else state.gap_s + (gap - state.gap_s) / MEMORY
    return replace(state, arrived_at=max(at, state.arrived_at), gap_s=mean)


def _move(price: Price, name: str, violation: float) -> Price:
    """Integrate within the bounds. At a bound the integral waits there, so that it turns at once (no wind-up)."""
    seen = max(-1.0, min(violation, CLIP))
    squares = price.squares * (1.0 - 1.0 / HORIZON) + seen * seen
    log = price.log + seen / math.sqrt(CLIP * CLIP + squares)
    return replace(price, log=_bounded(log, price, name), count=price.count + 1, squares=squares)


def _learn(price: Price, outcome: float, predicted: float, limit: float) -> Price:
    keep = 1.0 - 1.0 / RATIO_MEMORY
    violation = min(outcome / limit - 1.0, CLIP)
    return replace(
        price,
        outcome=price.outcome * keep + outcome,
        expected=price.expected * keep + predicted,
        recent=price.recent + (violation - price.recent) / MEMORY,
    )


def _value(price: Price, name: str) -> float:
    """Integral and proportional part together, within the bounds."""
    return math.exp(_bounded(price.log + GAIN[name] * max(-1.0, min(price.recent, 1.0)), price, name))


def _at_bound(price: Price, name: str) -> bool:
    return price.log >= math.log(max(HIGHEST[name], price.lowest)) - 1e-9


def _bounded(log: float, price: Price, name: str) -> float:
    return max(math.log(price.lowest), min(log, math.log(max(HIGHEST[name], price.lowest))))
