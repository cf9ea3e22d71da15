"""Which model answers a query: hard constraints first, then utility. Pure.

The decision, in order (the numbers stand in the code too):

1. A card the query did not allow, excluded, or whose tags do not fit, is out.
2. A card whose context cannot hold the prompt is out.
3. A card that no worker could ever hold is out.
4. Quality, latency and energy are predicted on the best worker for the card.
5. A card that breaks the query's own limits (quality, latency, energy, deadline) is out.
6. The rest is ordered by utility U = w_q q - w_l f(L / SLO) - w_e E / E_ref; the order is the fallback order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.planner.decide import cost, dual, quality
from shared import messages as m
from shared.errors import CalmError, ContextExceeded, NoFeasibleModel


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


def decide(analyzed: m.Analyzed, state: State, now: float) -> m.Route:
    """Choose. The route's `order` is empty when no candidate stands; `refusal` then says why."""
    query = analyzed.accepted.query
    weights = weights_of(query.preference, state.policy)
    costs = {(a.artifact, a.device_class): a for a in state.qos.artifacts}
    cards = {c.card: c for c in state.qos.cards}
    left_s = analyzed.accepted.deadline_at - now
    candidates = [
        _candidate(card, analyzed, state, weights, costs, cards.get(card.name), left_s)
        for card in sorted(state.cards.values(), key=lambda c: c.name)
    ]
    standing = sorted((c for c in candidates if c.excluded is None), key=lambda c: (-c.utility, c.latency_s, c.card))
    reason = _reason(query, standing, candidates)
    best = standing[0] if standing else None
    second = standing[1] if len(standing) > 1 else None
    return m.Route(
        query_id=analyzed.accepted.query_id,
        order=[c.card for c in standing],
        candidates=candidates,
        reason=reason,
        why=_why(best, second, reason, analyzed.profile),
        runner_up=second.card if second else None,
        margin=best.utility - second.utility if best and second else 0.0,
        flip=_flip(best, second, weights, state.policy) if best and second else "",
        weights=weights,
        knowledge_version=state.qos.version,
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
    """The request's own weights where given, else the fleet's."""
    return {
        "w_q": policy.w_quality if preference.quality is None else preference.quality,
        "w_l": policy.w_latency if preference.latency is None else preference.latency,
        "w_e": policy.w_energy if preference.energy is None else preference.energy,
    }


LATE_TILT = 0.05
"""Weight of the curve beside the probability, so that the faster of two certainly late candidates is preferred."""


def latency_penalty(ratio: float, spread: float = 0.0) -> float:
    """f(L / SLO): 0 at 0, 1 at the objective, growing ever more slowly beyond it.

    With a `spread` (standard deviation of log latency about its prediction) it is the probability of being late,
    plus a little of that curve: the Lagrangian of an objective on the 95th percentile needs the probability.
    """
    curve = math.log1p(max(ratio, 0.0)) / math.log(2.0)
    if spread <= 0.0 or ratio <= 0.0:
        return curve if spread <= 0.0 else 0.0
    return dual.late_probability(ratio, spread) + LATE_TILT * curve


def utility(q: float, latency_s: float, energy_j: float, weights: Mapping[str, float], policy: m.Policy) -> float:
    """U = w_q q - w_l f(L / SLO) - w_e E / E_ref: monotone in quality, antitone in latency and energy."""
    return (
        weights["w_q"] * q
        - weights["w_l"] * latency_penalty(latency_s / policy.latency_slo_s, policy.latency_spread)
        - weights["w_e"] * energy_j / policy.energy_ref_j
    )


def _candidate(
    card: m.Card,
    analyzed: m.Analyzed,
    state: State,
    weights: Mapping[str, float],
    costs: Mapping[tuple[str, str], m.ArtifactQos],
    card_qos: m.CardQos | None,
    left_s: float,
) -> m.Candidate:
    query, profile, spec = analyzed.accepted.query, analyzed.profile, card.artifact
    tokens_in = profile.tokens_in.get(spec.model, profile.prompt_chars // 4)
    excluded = (
        _not_allowed(card, query)  # 1
        or ("context_exceeded" if tokens_in + 1 > spec.context else None)  # 2
        or (None if any(w.budget_bytes >= spec.footprint_bytes for w in state.workers) else "does_not_fit")  # 3
    )
    if excluded:
        return m.Candidate(card=card.name, artifact=spec.name, excluded=excluded)
    expected = card_qos.tokens_out_mean if card_qos and card_qos.answered >= 5 else profile.tokens_out
    tokens_out = min(expected, query.max_tokens or card.max_tokens, spec.context - tokens_in)
    q, terms = quality.predict(card, profile, card_qos)  # 4
    options = [
        cost.estimate(
            spec, worker,
            cost.unit_costs(spec, worker.device, costs.get((spec.name, worker.device.device_class))),
            tokens_in=tokens_in, tokens_out=tokens_out, waiting=_share(spec.name, worker, state),
        )
        for worker in state.workers
        if worker.budget_bytes >= spec.footprint_bytes and not worker.draining
    ]  # fmt: skip
    if not options:
        return m.Candidate(card=card.name, artifact=spec.name, excluded="no_worker", quality=q)
    best = min(options, key=lambda e: (e.latency_s, e.energy_j, e.worker))
    value = utility(q, best.latency_s, best.energy_j, weights, state.policy)
    return m.Candidate(
        card=card.name,
        artifact=spec.name,
        worker=best.worker,
        excluded=_over_limit(query.constraints, q, best, left_s),  # 5
        quality=q,
        latency_s=best.latency_s,
        energy_j=best.energy_j,
        utility=value,
        terms={
            **terms,
            "tokens_in": float(tokens_in),
            "tokens_out": float(tokens_out),
            "queue_s": best.queue_s,
            "load_s": best.load_s,
            "prefill_s": best.prefill_s,
            "decode_s": best.decode_s,
            "active_j": best.active_j,
            "load_j": best.load_j,
            "u_quality": weights["w_q"] * q,
            "u_latency": -weights["w_l"]
            * latency_penalty(best.latency_s / state.policy.latency_slo_s, state.policy.latency_spread),
            "u_energy": -weights["w_e"] * best.energy_j / state.policy.energy_ref_j,
        },
    )


def _share(artifact: str, worker: m.WorkerState, state: State) -> int:
    """Queries of the artifact that this worker will have before the new one: all of them, over its holders."""
    holders = [w.worker for w in state.workers for e in w.engines if e.artifact == artifact and e.state == "ready"]
    if holders and worker.worker not in holders:
        return 0
    return state.waiting.get(artifact, 0) // max(len(holders), 1)


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


def _over_limit(limits: m.Constraints, q: float, costs: cost.Estimate, left_s: float) -> str | None:
    if limits.min_quality is not None and q < limits.min_quality:
        return "below_min_quality"
    if limits.max_latency_s is not None and costs.latency_s > limits.max_latency_s:
        return "over_max_latency"
    if limits.max_energy_j is not None and costs.energy_j > limits.max_energy_j:
        return "over_max_energy"
    if costs.load_s + costs.prefill_s > left_s:
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
    domain = max(profile.domains.items(), key=lambda item: item[1], default=("general", 0.0))[0]
    if second is None:
        return f"{best.card} is the only model that meets the constraints ({figures})"
    return (
        f"{best.card} has the best utility for {domain}: {best.utility:.3f} ({figures}),"
        f" before {second.card} with {second.utility:.3f}"
    )


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
