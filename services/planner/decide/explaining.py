"""Decisions in words: why this card, what would have changed it, and what to do where no card stands. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shared import messages as m
from shared.errors import CalmError, ContextExceeded, NoFeasibleModel
from shared.utility import latency_penalty


def refusal(route: m.Route, analyzed: m.Analyzed, cards: Mapping[str, m.Card]) -> CalmError:
    """Why no candidate stood, as a typed error with the nearest feasible offer. For a route with no order."""
    if route.reason == "context_exceeded":
        short = [c.card for c in route.candidates if c.excluded == "context_exceeded"]
        fits = max((cards[name].artifact.context for name in short), default=0)
        tokens = max(analyzed.profile.tokens_in.values(), default=0)
        return ContextExceeded(
            f"The prompt has {tokens} tokens; the longest context that may be used holds {fits}.",
            f"Shorten the prompt to under {fits} tokens (and leave room for the answer),"
            " or raise `context` of a model in the fleet file.",
        )
    reasons = ", ".join(f"{c.card}: {c.excluded}" for c in route.candidates)
    return NoFeasibleModel(f"No model may answer this query ({reasons}).", _offer(route))


def why(best: m.Candidate | None, second: m.Candidate | None, reason: str, profile: m.Profile) -> str:
    """The reason of a decision."""
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


def handed_on(order: Sequence[str], steps: Sequence[m.CascadeStep]) -> str:
    """To which cards an answer goes on, where it is a cascade; `order` are the route's cards."""
    said = [
        f"to {following} while the chance of being right is below {step.below:.2f}"
        for step, following in zip(steps, order[1 : len(steps)], strict=False)
    ]
    return "; handed on " + ", ".join(said) if said else ""


def flip(best: m.Candidate, second: m.Candidate, weights: Mapping[str, float], policy: m.Policy) -> str:
    """What would have turned the choice to the runner-up."""
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
    if not near and any(c.excluded == "not_in_store" for c in route.candidates):
        return "No worker has it in its model store: run `calm models pull` where workers run."
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
