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

from services.planner.decide import cascade, objectives, patience, scoring
from services.planner.decide import learned as learning
from services.planner.decide import trial as trials
from services.planner.decide.candidates import Candidates
from services.planner.decide.explaining import flip, handed_on, why
from services.planner.decide.learned import Learned
from services.planner.decide.scoring import Limits
from services.planner.decide.standing import Standing, Standings
from shared import messages as m
from shared.learn.quality import Spread


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


@dataclass(frozen=True)
class Choice:
    """A decision, as far as a query waits for it."""

    route: m.Route
    """Without its candidates."""
    candidates: Candidates
    order: Sequence[int]
    """The route's cards, among the candidates."""

    def explained(self) -> m.Route:
        """The route with every candidate."""
        return msgspec.structs.replace(self.route, candidates=self.candidates.all())


def decide(analyzed: m.Analyzed, state: State, now: float, chance: Chance | None = None) -> m.Route:
    """Choose, with every candidate explained; see `choose`."""
    return choose(analyzed, state, now, chance).explained()


def choose(analyzed: m.Analyzed, state: State, now: float, chance: Chance | None = None) -> Choice:
    """Choose. The route's `order` is empty when no candidate stands; `explaining.refusal` then says why.

    With `chance`, a candidate other than the best is chosen now and then, where learning promises something from it.
    """
    query = analyzed.accepted.query
    weights = weights_of(query.preference, state.policy)
    found, spread = _candidates(analyzed, state, weights, now)
    order, reason, propensity, tried = found.order, _reason(query, found), 1.0, None
    if chance is not None and reason == "best_utility":
        order, propensity, tried = _explored(found, spread, weights, query, chance, state)
        if order[0] != found.order[0]:
            reason = "trial" if tried is not None and tried.candidate == found.name(order[0]) else "explored"
    steps: list[m.CascadeStep] = []
    if cascade.wanted(query, state.policy):
        drawn = reason in ("explored", "trial")
        order, steps = _cascade(analyzed, state, found, order, weights, now, first=drawn)
        if len(steps) > 1:
            reason, tried = "cascade" if reason == "best_utility" else reason, None
    best = found.of(order[0]) if order else None
    second = found.of(order[1]) if len(order) > 1 else None
    names = [found.name(k) for k in order]
    route = m.Route(
        query_id=analyzed.accepted.query_id,
        order=names,
        candidates=[],
        reason=reason,
        why=why(best, second, reason, analyzed.profile) + handed_on(names, steps),
        runner_up=second.card if second else None,
        margin=best.utility - second.utility if best and second else 0.0,
        flip=flip(best, second, weights, state.policy) if best and second and len(steps) < 2 else "",
        weights=weights,
        patience=_patience(analyzed, state, found, order, weights),
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
    return Choice(route, found, order)


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
) -> tuple[Candidates, Spread | None]:
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
    found = Candidates(standing, outside, q, terms, scores, tokens_in, tokens_out, query.constraints, left_s)
    return found, spread


def _outside(query: m.Query, standing: Standing, tokens_in: scoring.Array) -> list[str | None]:
    """1 to 3: why a card cannot be considered at all."""
    short = (tokens_in + 1 > standing.context).tolist()
    roomy, fits = standing.roomy_somewhere.tolist(), standing.fits_somewhere.tolist()
    limits = query.constraints
    anything = query.model is None and limits.models is None and not limits.exclude and not limits.tags
    return [
        (None if anything else _not_allowed(card, query))
        or ("context_exceeded" if short[k] else None)
        or (None if fits[k] else "not_in_store" if roomy[k] else "does_not_fit")
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
    analyzed: m.Analyzed, state: State, found: Candidates, order: Sequence[int], weights: Mapping[str, float]
) -> dict[str, int]:
    """After how many tokens the cards of the route are cut off (`patience`)."""
    learner = state.learned.learner if state.learned is not None else None
    if learner is None or not learner.patience:
        return {}
    accepted = analyzed.accepted
    standing = [found.of(k) for k in order]
    return patience.limits(
        accepted.query, accepted.query_id, state.policy, standing, learner.patience, weights, state.cards
    )


def _cascade(
    analyzed: m.Analyzed, state: State, found: Candidates, order: list[int], weights: Mapping[str, float], now: float,
    *, first: bool,
) -> tuple[list[int], list[m.CascadeStep]]:  # fmt: skip
    """The cards as a cascade asks them, with its steps (`cascade`)."""
    accepted = analyzed.accepted
    lines = state.learned.lines if state.learned is not None else {}
    left_s = accepted.deadline_at - now
    tried = {found.name(k): k for k in order[: cascade.TRIED]}
    asked, steps = cascade.steps(
        accepted.query, state.policy, [found.of(k) for k in tried.values()], lines, weights, state.cards, left_s,
        first=first,
    )  # fmt: skip
    return [*(tried[c.card] for c in asked), *order[cascade.TRIED :]], steps


def _explored(
    found: Candidates, spread: Spread | None, weights: Mapping[str, float], query: m.Query, chance: Chance, state: State
) -> tuple[list[int], float, m.Tried | None]:
    """The cards with the one that is drawn in front, the probability that it had, and what weights on trial made of
    it."""
    order = found.order
    std = None if spread is None else spread.std[order]
    uncertain = std is not None and bool(std.any())
    if not uncertain and state.trial is None:
        return order, 1.0, None
    # How far quality may be from what is expected, [draws, k]; nothing is drawn where nothing is uncertain.
    apart = (
        spread.deviations(chance.normal)[:, order] if uncertain and spread is not None else np.zeros((1, len(order)))
    )
    utility = found.utilities(order)
    share, tried = learning.shares(utility, weights["w_q"] * apart, state.policy.explore), None
    if state.trial is not None:
        wanted = weights_of(query.preference, objectives.own(state.policy, state.trial))
        other = trials.utilities([found.of(k) for k in order], weights, wanted)
        preferred = found.name(order[int(other.argmax())])
        tried = m.Tried(version=state.trial.version, present=found.name(order[0]), candidate=preferred)
        by_trial = learning.shares(other, wanted["w_q"] * apart, state.policy.explore)
        share = trials.mixture(share, by_trial, state.trial.share)
    chosen = learning.draw(share, chance.uniform)
    if uncertain and std is not None:
        found.note(order[chosen], explore_spread=float(weights["w_q"] * std[chosen]), explored=float(chosen != 0))
    return [order[chosen], *order[:chosen], *order[chosen + 1 :]], float(share[chosen]), tried


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


def _reason(query: m.Query, found: Candidates) -> str:
    if found.order:
        if query.model is not None:
            return "asked_for"
        return "best_utility" if len(found.order) > 1 else "only_candidate"
    allowed = set(found.excluded) - {
        "other_model_asked_for", "not_among_allowed_models", "excluded_by_query", "lacks_tag"
    }  # fmt: skip
    return "context_exceeded" if allowed == {"context_exceeded"} else "no_feasible_model"
