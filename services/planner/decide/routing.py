"""Which model answers a query: hard constraints first, then utility. Pure.

The decision, in order (the numbers stand in the code too):

1. A card the query did not allow, excluded, or whose tags do not fit, is out.
2. A card whose context cannot hold the prompt is out.
3. A card that no worker could ever hold is out.
4. Quality, latency and energy are predicted on the best worker for the card (`scoring`), one that keeps the limits
   if there is any.
5. A card that breaks the query's own limits (quality, latency, energy, deadline) is out.
6. The rest is ordered by utility U = w_q q - w_l f(L / SLO) - w_e E / E_ref - what it costs others; the order is
   the fallback order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from services.planner.decide import cascade, patience, scoring
from services.planner.decide import learned as learning
from services.planner.decide import trial as trials
from services.planner.decide.learned import Learned
from services.planner.decide.scoring import Limits, Scores
from services.planner.decide.standing import Predictor, Standing, Standings
from shared import messages as m
from shared.errors import CalmError, ContextExceeded, NoFeasibleModel
from shared.learn.quality import Spread
from shared.utility import latency_penalty


@dataclass(frozen=True)
class State:
    """What the planner knows when it decides."""

    cards: Mapping[str, m.Card]
    policy: m.Policy
    workers: Sequence[m.WorkerState]
    qos: m.Qos = field(default_factory=m.Qos)
    waiting: Mapping[str, int] = field(default_factory=dict)
    """Queries waiting or running, by artifact."""
    planner: str = ""
    charges: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    """What loading an artifact costs others: (burden, delay_s, sharing), told by the residency planner."""
    predictor: Predictor | None = None
    """Learned quality; the cards' own scores without it."""
    learned: Learned | None = None
    """What judgements say, and which cards are trusted; None leaves both out."""
    trial: m.Trial | None = None
    """Weights on trial beside those of the policy."""
    standings: Standings = field(default_factory=Standings)
    """Arrays kept between decisions; a fresh one only costs time."""


@dataclass(frozen=True)
class Chance:
    """Randomness for exploration: standard normal draws (`learned.normals`) and a uniform number from 0 to 1."""

    normal: scoring.Array
    uniform: float


def decide(analyzed: m.Analyzed, state: State, now: float, chance: Chance | None = None) -> m.Route:
    """Choose. The route's `order` is empty when no candidate stands; `refusal` then says why.

    With `chance`, a candidate other than the best is chosen now and then, where learning promises something from it.
    """
    query = analyzed.accepted.query
    weights = weights_of(query.preference, state.policy)
    candidates, spread = _candidates(analyzed, state, weights, now)
    standing = sorted((c for c in candidates if c.excluded is None), key=lambda c: (-c.utility, c.latency_s, c.card))
    reason = _reason(query, standing, candidates)
    propensity, tried = 1.0, None
    if chance is not None and reason == "best_utility":
        front, rows = standing[0], {c.card: row for row, c in enumerate(candidates)}
        order = [rows[c.card] for c in standing]
        standing, propensity, tried = _explored(standing, order, spread, weights, query, chance, state)
        if standing[0] is not front and standing[0].card != front.card:
            reason = "trial" if tried is not None and tried.candidate == standing[0].card else "explored"
    steps: list[m.CascadeStep] = []
    if cascade.wanted(query, state.policy):
        drawn = reason in ("explored", "trial")
        standing, steps = _cascade(analyzed, state, standing, weights, now, first=drawn)
        if len(steps) > 1:
            reason, tried = "cascade" if reason == "best_utility" else reason, None
    best = standing[0] if standing else None
    second = standing[1] if len(standing) > 1 else None
    return m.Route(
        query_id=analyzed.accepted.query_id,
        order=[c.card for c in standing],
        candidates=candidates,
        reason=reason,
        why=_why(best, second, reason, analyzed.profile) + _handed_on(standing, steps),
        runner_up=second.card if second else None,
        margin=best.utility - second.utility if best and second else 0.0,
        flip=_flip(best, second, weights, state.policy) if best and second and len(steps) < 2 else "",
        weights=weights,
        patience=_patience(analyzed, state, standing, weights),
        cascade=steps,
        propensity=propensity,
        trial=tried,
        knowledge_version=state.qos.version,
        learned_version=state.learned.version if state.learned is not None else 0,
        lengths_version=state.learned.lengths_version if state.learned is not None else 0,
        confidence_version=state.learned.lines_version if steps and state.learned is not None else 0,
        domains=analyzed.profile.domains,
        decided_at=now,
        planner=state.planner,
    )


def refusal(route: m.Route, analyzed: m.Analyzed, state: State) -> CalmError:
    """Why no candidate stood, as a typed error with the nearest feasible offer. For a route with no order."""
    if route.reason == "context_exceeded":
        short = [c.card for c in route.candidates if c.excluded == "context_exceeded"]
        fits = max((state.cards[name].artifact.context for name in short), default=0)
        tokens = max(analyzed.profile.tokens_in.values(), default=0)
        return ContextExceeded(
            f"The prompt has {tokens} tokens; the longest context that may be used holds {fits}.",
            f"Shorten the prompt to under {fits} tokens (and leave room for the answer),"
            " or raise `context` of a model in the fleet file.",
        )
    reasons = ", ".join(f"{c.card}: {c.excluded}" for c in route.candidates)
    return NoFeasibleModel(f"No model may answer this query ({reasons}).", _offer(route))


def weights_of(preference: m.Preference, policy: m.Policy) -> dict[str, float]:
    """The request's own weights where given, else the fleet's; with their scales."""
    return {
        "w_q": policy.w_quality if preference.quality is None else preference.quality,
        "w_l": policy.w_latency if preference.latency is None else preference.latency,
        "w_e": policy.w_energy if preference.energy is None else preference.energy,
        "latency_slo_s": policy.latency_slo_s,
        "energy_ref_j": policy.energy_ref_j,
    }


@dataclass(frozen=True)
class _Weights:
    """A policy with the query's own preference."""

    w_quality: float
    w_latency: float
    w_energy: float
    latency_slo_s: float
    energy_ref_j: float


def _candidates(
    analyzed: m.Analyzed, state: State, weights: Mapping[str, float], now: float
) -> tuple[list[m.Candidate], Spread | None]:
    """Every card with its terms, and how far its quality may be from what is expected, where that is learned."""
    query, profile, policy = analyzed.accepted.query, analyzed.profile, state.policy
    standing = state.standings.of(state.cards, state.workers, state.qos)
    cards = standing.cards
    in_of = {spec.model: profile.tokens_in.get(spec.model, profile.prompt_chars // 4) for spec in standing.specs}
    tokens_in = np.array([in_of[card.artifact.model] for card in cards], np.float64)
    expected = np.where(np.isnan(standing.tokens_mean), profile.tokens_out, standing.tokens_mean)
    if state.learned is not None:
        expected = learning.tokens_out(state.learned, profile, cards, expected)
    room = np.maximum(standing.context - tokens_in, 0.0)
    tokens_out = np.minimum(np.minimum(expected, query.max_tokens or standing.most_tokens), room)
    spread = None
    if state.learned is not None:  # 4
        promised, terms = standing.promise.predict(profile)
        expects = query.expect is not None
        q, spread, terms = learning.predict(state.learned, profile, cards, promised, terms, expects=expects)
    elif state.predictor is not None:
        q, terms = state.predictor(analyzed, cards)
    else:
        q, terms = standing.prior.predict(profile)
    if not state.workers or all(w.draining for w in state.workers):
        scores = None
    else:
        standing.update(
            state.workers, state.waiting, float(tokens_in.mean()), float(tokens_out.mean()), state.charges
        )  # fmt: skip
        limits = query.constraints
        scores = scoring.score(
            standing.fleet, standing.artifact_of, q, tokens_in, tokens_out,
            _Weights(weights["w_q"], weights["w_l"], weights["w_e"], policy.latency_slo_s, policy.energy_ref_j),
            Limits(
                max_latency_s=math.inf if limits.max_latency_s is None else limits.max_latency_s,
                max_energy_j=math.inf if limits.max_energy_j is None else limits.max_energy_j,
                left_s=analyzed.accepted.deadline_at - now,
            ),
        )  # fmt: skip
    outside = _outside(query, standing, tokens_in)
    if state.learned is not None and query.model is None:
        outside = _quarantine(outside, standing, state.learned)
    left_s = analyzed.accepted.deadline_at - now
    found = _explain(
        query, standing, outside, q.tolist(), terms, scores, tokens_in.tolist(), tokens_out.tolist(), left_s
    )
    return found, spread


def _outside(query: m.Query, standing: Standing, tokens_in: scoring.Array) -> list[str | None]:
    """1 to 3: why a card cannot be considered at all."""
    short = (tokens_in + 1 > standing.context).tolist()
    fits = standing.fits_somewhere.tolist()
    limits = query.constraints
    anything = query.model is None and limits.models is None and not limits.exclude and not limits.tags
    return [
        (None if anything else _not_allowed(card, query))
        or ("context_exceeded" if short[k] else None)
        or (None if fits[k] else "does_not_fit")
        for k, card in enumerate(standing.cards)
    ]


def _quarantine(outside: list[str | None], standing: Standing, learned: Learned) -> list[str | None]:
    """1: a quarantined card is out, unless nothing else is in. Who asks for it by name gets it."""
    if not learned.standings:
        return outside
    strict = [
        reason or ("quarantined" if learned.quarantined(card.name) else None)
        for reason, card in zip(outside, standing.cards, strict=True)
    ]
    return strict if any(reason is None for reason in strict) else outside


def _patience(
    analyzed: m.Analyzed, state: State, standing: Sequence[m.Candidate], weights: Mapping[str, float]
) -> dict[str, int]:
    """After how many tokens the cards of the route are cut off (`patience`)."""
    learner = state.learned.learner if state.learned is not None else None
    if learner is None or not learner.patience:
        return {}
    accepted = analyzed.accepted
    return patience.limits(
        accepted.query, accepted.query_id, state.policy, standing, learner.patience, weights, state.cards
    )


def _cascade(
    analyzed: m.Analyzed, state: State, standing: list[m.Candidate], weights: Mapping[str, float], now: float, *,
    first: bool,
) -> tuple[list[m.Candidate], list[m.CascadeStep]]:  # fmt: skip
    """The candidates as a cascade asks them, with its steps (`cascade`)."""
    accepted = analyzed.accepted
    lines = state.learned.lines if state.learned is not None else {}
    left_s = accepted.deadline_at - now
    return cascade.steps(accepted.query, state.policy, standing, lines, weights, state.cards, left_s, first=first)


def _explored(
    standing: list[m.Candidate], order: list[int], spread: Spread | None, weights: Mapping[str, float], query: m.Query,
    chance: Chance, state: State,
) -> tuple[list[m.Candidate], float, m.Tried | None]:  # fmt: skip
    """The candidates with the one that is drawn in front, the probability that it had, and what weights on trial made
    of it; `order` are their places in `spread`."""
    std = None if spread is None else spread.std[order]
    uncertain = std is not None and bool(std.any())
    if not uncertain and state.trial is None:
        return standing, 1.0, None
    # How far quality may be from what is expected, [draws, k]; nothing is drawn where nothing is uncertain.
    apart = (
        spread.deviations(chance.normal)[:, order] if uncertain and spread is not None else np.zeros((1, len(order)))
    )
    utility = np.array([c.utility for c in standing])
    share, tried = learning.shares(utility, weights["w_q"] * apart, state.policy.explore), None
    if state.trial is not None:
        wanted = weights_of(query.preference, trials.policy_of(state.policy, state.trial))
        other = trials.utilities(standing, weights, wanted)
        tried = m.Tried(version=state.trial.version, present=standing[0].card, candidate=standing[other.argmax()].card)
        by_trial = learning.shares(other, wanted["w_q"] * apart, state.policy.explore)
        share = trials.mixture(share, by_trial, state.trial.share)
    chosen = learning.draw(share, chance.uniform)
    front = standing[chosen]
    if uncertain and std is not None:
        bonus = {"explore_spread": float(weights["w_q"] * std[chosen]), "explored": float(chosen != 0)}
        front = msgspec.structs.replace(front, terms={**front.terms, **bonus})
    return [front, *standing[:chosen], *standing[chosen + 1 :]], float(share[chosen]), tried


def _explain(
    query: m.Query,
    standing: Standing,
    outside: Sequence[str | None],
    q: Sequence[float],
    terms: Sequence[Mapping[str, float]],
    scores: Scores | None,
    tokens_in: Sequence[float],
    tokens_out: Sequence[float],
    left_s: float,
) -> list[m.Candidate]:
    """Candidates with every term, from the arrays of the decision."""
    cards, names = standing.cards, standing.workers
    if scores is None:
        return [
            m.Candidate(card=c.name, artifact=c.artifact.name, excluded=outside[k] or "no_worker",
                        quality=0.0 if outside[k] else q[k])
            for k, c in enumerate(cards)
        ]  # fmt: skip
    columns = [
        getattr(scores, name).tolist()
        for name in (
            "utility", "worker", "latency_s", "energy_j", "queue_s", "load_s", "prefill_s", "decode_s", "active_j",
            "load_j", "u_quality", "u_latency", "u_energy", "u_crowding", "u_burden",
        )
    ]  # fmt: skip
    limits, result = query.constraints, []
    limited = limits.min_quality is not None or limits.max_latency_s is not None or limits.max_energy_j is not None
    for k, row in enumerate(zip(*columns, strict=True)):
        card, excluded = cards[k], outside[k]
        if excluded:
            result.append(m.Candidate(card=card.name, artifact=card.artifact.name, excluded=excluded))
            continue
        (u, worker, latency, energy, queue, load, prefill, decode, active_j, load_j,
         u_quality, u_latency, u_energy, u_crowding, u_burden) = row  # fmt: skip
        if u == -math.inf:
            result.append(m.Candidate(card=card.name, artifact=card.artifact.name, excluded="no_worker", quality=q[k]))
            continue
        result.append(
            m.Candidate(
                card=card.name, artifact=card.artifact.name, worker=names[worker],
                excluded=_over_limit(limits, q[k], latency, energy, load + prefill, left_s)  # 5
                if limited or load + prefill > left_s else None,
                quality=q[k], latency_s=latency, energy_j=energy, utility=u,
                terms={
                    **terms[k], "tokens_in": tokens_in[k], "tokens_out": tokens_out[k], "queue_s": queue,
                    "load_s": load, "prefill_s": prefill, "decode_s": decode, "active_j": active_j, "load_j": load_j,
                    "u_quality": u_quality, "u_latency": u_latency, "u_energy": u_energy,
                    "u_crowding": u_crowding, "u_burden": u_burden,
                },
            )
        )  # fmt: skip
    return result


def _not_allowed(card: m.Card, query: m.Query) -> str | None:
    limits = query.constraints
    if query.model is not None and card.name != query.model:
        return "other_model_asked_for"
    if limits.models is not None and card.name not in limits.models:
        return "not_among_allowed_models"
    if card.name in limits.exclude:
        return "excluded_by_query"
    if any(tag not in card.tags for tag in limits.tags):
        return "lacks_tag"
    return None


def _over_limit(
    limits: m.Constraints, q: float, latency_s: float, energy_j: float, first_s: float, left_s: float
) -> str | None:
    if limits.min_quality is not None and q < limits.min_quality:
        return "below_min_quality"
    if limits.max_latency_s is not None and latency_s > limits.max_latency_s:
        return "over_max_latency"
    if limits.max_energy_j is not None and energy_j > limits.max_energy_j:
        return "over_max_energy"
    if first_s > left_s:
        return "misses_deadline"
    return None


def _reason(query: m.Query, standing: Sequence[m.Candidate], candidates: Sequence[m.Candidate]) -> str:
    if standing:
        if query.model is not None:
            return "asked_for"
        return "best_utility" if len(standing) > 1 else "only_candidate"
    allowed = {c.excluded for c in candidates} - {
        "other_model_asked_for", "not_among_allowed_models", "excluded_by_query", "lacks_tag"
    }  # fmt: skip
    return "context_exceeded" if allowed == {"context_exceeded"} else "no_feasible_model"


def _why(best: m.Candidate | None, second: m.Candidate | None, reason: str, profile: m.Profile) -> str:
    if best is None:
        return f"no model stood: {reason.replace('_', ' ')}"
    figures = f"quality {best.quality:.2f}, about {best.latency_s:.1f} s and {best.energy_j:.0f} J"
    if reason == "asked_for":
        return f"{best.card} was asked for by name ({figures})"
    if reason == "cascade":
        return f"{best.card} is asked first ({figures})"
    domain = max(profile.domains.items(), key=lambda item: item[1], default=("general", 0.0))[0]
    if second is None:
        return f"{best.card} is the only model that meets the constraints ({figures})"
    return (
        f"{best.card} has the best utility for {domain}: {best.utility:.3f} ({figures}),"
        f" before {second.card} with {second.utility:.3f}"
    )


def _handed_on(standing: Sequence[m.Candidate], steps: Sequence[m.CascadeStep]) -> str:
    said = [
        f"to {following.card} while the chance of being right is below {step.below:.2f}"
        for step, following in zip(steps, standing[1 : len(steps)], strict=False)
    ]
    return "; handed on " + ", ".join(said) if said else ""


def _flip(best: m.Candidate, second: m.Candidate, weights: Mapping[str, float], policy: m.Policy) -> str:
    margin = best.utility - second.utility
    ways = []
    if weights["w_q"] > 0:
        ways.append(f"{margin / weights['w_q']:.3f} more quality")
    if weights["w_l"] > 0:
        penalty = latency_penalty(second.latency_s / policy.latency_slo_s) - margin / weights["w_l"]
        if penalty > 0:
            faster = policy.latency_slo_s * (2.0**penalty - 1.0)
            ways.append(f"{faster:.2f} s instead of {second.latency_s:.2f} s")
    if weights["w_e"] > 0:
        energy = second.energy_j - margin * policy.energy_ref_j / weights["w_e"]
        if energy > 0:
            ways.append(f"{energy:.1f} J instead of {second.energy_j:.1f} J")
    return f"{second.card} would have been chosen with " + " or ".join(ways) if ways else ""


def _offer(route: m.Route) -> str:
    """The nearest feasible offer: what the least restricted candidate could have given."""
    near = [c for c in route.candidates if c.excluded in _LIMITS]
    if not near and any(c.excluded == "does_not_fit" for c in route.candidates):
        return "No worker has memory enough for it: raise CALM_WORKER_MEMORY, or lower `slots` or `context`."
    if not near:
        return "Loosen `model`, `constraints.models`, `constraints.exclude` or `constraints.tags`."
    best = max(near, key=lambda c: c.utility)
    return (
        f"{best.card} comes nearest: quality {best.quality:.2f}, about {best.latency_s:.1f} s and"
        f" {best.energy_j:.0f} J. Loosen `{_LIMITS[best.excluded or '']}`."
    )


_LIMITS = {
    "below_min_quality": "constraints.min_quality",
    "over_max_latency": "constraints.max_latency_s",
    "over_max_energy": "constraints.max_energy_j",
    "misses_deadline": "deadline_s",
}
