"""Routing decisions: hard constraints, utility, explanation."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.planner.decide import cost, explaining, routing
from services.planner.decide.routing import State
from shared import messages as m
from shared.utility import utility
from tests.samples import GB, analyzed, card, engine, spec, worker

POLICY = m.Policy(fleet="f", w_quality=1.0, w_latency=0.3, w_energy=0.1, latency_slo_s=5.0, energy_ref_j=50.0)


def _state(*cards: m.Card, workers: list[m.WorkerState] | None = None, **more: object) -> State:
    fleet = [worker(engines=[engine(c.artifact) for c in cards])] if workers is None else workers
    return State(cards={c.name: c for c in cards}, policy=POLICY, workers=fleet, **more)  # type: ignore[arg-type]


def _excluded(route: m.Route) -> dict[str, str | None]:
    return {c.card: c.excluded for c in route.candidates}


def test_the_better_card_for_the_domain_is_chosen() -> None:
    """Of two cards on the same artifact the one with the higher score in the query's domain wins."""
    state = _state(card("generalist", domains={"mathematics": 0.2}), card("tutor", domains={"mathematics": 0.6}))
    route = routing.decide(analyzed(domains={"mathematics": 1.0}), state, 0.0)
    assert route.order == ["tutor", "generalist"]
    assert route.reason == "best_utility"
    assert route.runner_up == "generalist"
    assert "tutor" in route.why
    assert "generalist would have been chosen with" in route.flip


def test_likeness_to_a_card_decides_between_equals() -> None:
    """With equal scores the card that the query resembles more wins."""
    state = _state(card("one"), card("two"))
    assert routing.decide(analyzed(affinity={"one": 0.2, "two": 0.6}), state, 0.0).order[0] == "two"


def test_what_no_worker_has_in_store_is_no_candidate_and_says_so() -> None:
    """A worker that lacks a model is not asked to load it; where all lack it the refusal says what to run."""
    here, away = spec("here-int8"), spec("away-int8")
    cards = (card("here", here, quality=0.2), card("away", away, quality=0.9))
    poor = worker("poor", lacks=["away-int8"])
    route = routing.decide(analyzed(), _state(*cards, workers=[poor]), 0.0)
    assert route.order == ["here"]
    assert _excluded(route)["away"] == "not_in_store"
    assert routing.decide(analyzed(), _state(*cards, workers=[poor, worker("rich")]), 0.0).order[0] == "away"
    asked = analyzed(m.Query(prompt="x", model="away"))
    state = _state(*cards, workers=[poor])
    refused = explaining.refusal(routing.decide(asked, state, 0.0), asked, state.cards)
    assert "calm models pull" in refused.remedy


def test_a_resident_model_beats_an_equal_one_that_must_load() -> None:
    """Load time and energy count: equal quality goes to the model that is resident."""
    here, away = spec("here-int8"), spec("away-int8")
    state = _state(card("here", here), card("away", away), workers=[worker(engines=[engine(here)])])
    route = routing.decide(analyzed(), state, 0.0)
    assert route.order == ["here", "away"]
    terms = {c.card: c.terms for c in route.candidates}
    assert terms["here"]["load_s"] == 0.0
    assert terms["away"]["load_s"] > 0.0


def test_a_long_queue_sends_the_query_elsewhere() -> None:
    """A slightly better model with many queries waiting loses to one that is free."""
    busy, free = spec("busy-int8"), spec("free-int8")
    cards = (card("busy", busy, quality=0.55), card("free", free, quality=0.5))
    assert routing.decide(analyzed(), _state(*cards), 0.0).order[0] == "busy"
    assert routing.decide(analyzed(), _state(*cards, waiting={"busy-int8": 40}), 0.0).order[0] == "free"


def test_each_hard_constraint_excludes_with_its_reason() -> None:
    """Every limit that a query may state excludes, and names itself."""
    small = spec("small-int8", context=20, slots=1)
    huge = spec("huge-int8", weights=5 * GB)
    state = _state(
        card("plain"), card("other"), card("short", small), card("huge", huge), card("untagged"),
        workers=[worker(engines=[engine(spec())])],
    )  # fmt: skip
    query = m.Query(prompt="x", constraints=m.Constraints(exclude=["other"]))
    route = routing.decide(analyzed(query, tokens_in={"small": 30, "a": 30}), state, 0.0)
    assert _excluded(route)["other"] == "excluded_by_query"
    assert _excluded(route)["short"] == "context_exceeded"
    assert _excluded(route)["huge"] == "does_not_fit"
    assert _excluded(route)["plain"] is None

    for limits, reason in (
        (m.Constraints(models=["other"]), "not_among_allowed_models"),
        (m.Constraints(tags=["law"]), "lacks_tag"),
        (m.Constraints(min_quality=0.99), "below_min_quality"),
        (m.Constraints(max_latency_s=1e-6), "over_max_latency"),
        (m.Constraints(max_energy_j=1e-6), "over_max_energy"),
    ):
        limited = routing.decide(analyzed(m.Query(prompt="x", constraints=limits)), state, 0.0)
        assert _excluded(limited)["plain"] == reason
    late = routing.decide(analyzed(deadline_at=0.0), state, 10.0)
    assert _excluded(late)["plain"] == "misses_deadline"


def test_a_refusal_names_the_nearest_offer() -> None:
    """When no model stands, the error says which limit to loosen and what could be had."""
    state = _state(card("one"))
    query = analyzed(m.Query(prompt="x", constraints=m.Constraints(max_energy_j=1e-6)))
    route = routing.decide(query, state, 0.0)
    assert route.order == []
    error = explaining.refusal(route, query, state.cards)
    assert error.code == "no_feasible_model"
    assert "constraints.max_energy_j" in error.remedy


def test_a_prompt_longer_than_every_context_is_told_so() -> None:
    """The typed error gives the prompt's tokens and the longest context."""
    state = _state(card("one"))
    query = analyzed(tokens_in={"a": 5000})
    route = routing.decide(query, state, 0.0)
    error = explaining.refusal(route, query, state.cards)
    assert (error.code, route.reason) == ("context_exceeded", "context_exceeded")
    assert "5000" in error.message
    assert "1000" in error.message


def test_a_named_model_leaves_routing_out() -> None:
    """`model` restricts the route to that card."""
    route = routing.decide(analyzed(m.Query(prompt="x", model="two")), _state(card("one"), card("two")), 0.0)
    assert route.order == ["two"]
    assert route.reason == "asked_for"


def test_a_request_s_own_preference_replaces_the_weights() -> None:
    """Who cares for energy alone gets the frugal model, who cares for quality alone the good one."""
    cheap, dear = spec("cheap-int8", weights=GB // 100), spec("dear-int8", weights=GB // 2)
    state = _state(card("cheap", cheap, quality=0.3), card("dear", dear, quality=0.9), workers=[
        worker(budget=4 * GB, engines=[engine(cheap), engine(dear)])
    ])  # fmt: skip

    def first(**weights: float) -> str:
        return routing.decide(analyzed(m.Query(prompt="x", preference=m.Preference(**weights))), state, 0.0).order[0]

    assert first(quality=0.0, latency=0.0, energy=1.0) == "cheap"
    assert first(quality=1.0, latency=0.0, energy=0.0) == "dear"


weights = st.floats(0.0, 5.0)
positive = st.floats(0.001, 100.0)


@given(st.floats(0, 1), positive, positive, weights, weights, weights, st.floats(0, 10))
def test_utility_is_monotone(q: float, lat: float, j: float, wq: float, wl: float, we: float, more: float) -> None:
    """Utility never falls with quality and never rises with latency or energy."""
    w = {"w_q": wq, "w_l": wl, "w_e": we, "latency_slo_s": 5.0, "energy_ref_j": 50.0}
    base = utility(q, lat, j, w)
    assert utility(q + more, lat, j, w) >= base
    assert utility(q, lat + more, j, w) <= base
    assert utility(q, lat, j + more, w) <= base


limits = st.builds(
    m.Constraints,
    min_quality=st.none() | st.floats(0, 1),
    max_latency_s=st.none() | st.floats(0.01, 20),
    max_energy_j=st.none() | st.floats(0.1, 500),
    exclude=st.lists(st.sampled_from(["c0", "c1", "c2"]), max_size=2),
)


@given(limits, st.lists(st.tuples(st.floats(0, 1), st.integers(1, 900)), min_size=3, max_size=3), st.integers(0, 50))
def test_no_hard_constraint_is_ever_violated(
    bounds: m.Constraints, models: list[tuple[float, int]], waiting: int
) -> None:
    """Whatever the fleet, each card of the order meets every limit; the same input gives the same decision."""
    cards = [
        card(f"c{i}", spec(f"m{i}-int8", weights=megabytes * 10**6), quality=q)
        for i, (q, megabytes) in enumerate(models)
    ]
    state = _state(*cards, workers=[worker(budget=2 * GB)], waiting={"m0-int8": waiting})
    query = analyzed(m.Query(prompt="x", constraints=bounds), tokens_in={"m0": 5, "m1": 5, "m2": 5})
    route = routing.decide(query, state, 0.0)
    for name in route.order:
        c = next(x for x in route.candidates if x.card == name)
        assert c.quality >= (bounds.min_quality or 0.0)
        assert c.latency_s <= (bounds.max_latency_s or float("inf"))
        assert c.energy_j <= (bounds.max_energy_j or float("inf"))
        assert name not in bounds.exclude
    utilities = [next(x.utility for x in route.candidates if x.card == name) for name in route.order]
    assert utilities == sorted(utilities, reverse=True)
    assert routing.decide(query, state, 0.0) == route


def test_learned_costs_replace_the_prior() -> None:
    """Telemetry for the artifact on the device class gives the estimate; batching is taken out and put back in."""
    artifact, device = spec(), worker().device
    qos = m.ArtifactQos(
        artifact=artifact.name, device_class=device.device_class, count=9, prefill_s_per_token=0.001, tpot_s=0.119,
        tpot_batch=2.0, energy_j_per_token_in=0.1, energy_j_per_token_out=0.2, loads=1, load_s=3.0,
    )  # fmt: skip
    unit = cost.unit_costs(artifact, device, qos)
    assert abs(unit.tpot_s - 0.1) < 1e-9
    cold = cost.estimate(artifact, worker(), unit, tokens_in=100, tokens_out=10, waiting=0)
    assert cold.load_s == 3.0
    assert abs(cold.prefill_s - 0.1) < 1e-9
    assert abs(cold.decode_s - 1.0) < 1e-9
    warm = cost.estimate(artifact, worker(engines=[engine(artifact)]), unit, tokens_in=100, tokens_out=10, waiting=0)
    assert warm.load_s == 0.0
    assert abs(warm.active_j - 12.0) < 1e-9
