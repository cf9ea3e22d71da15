"""Learned quality, trust and exploration in routing decisions; objectives as data."""

from __future__ import annotations

from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.planner.decide import learned as learning
from services.planner.decide import objectives, routing
from services.planner.decide.learned import Learned
from shared import messages as m
from shared.errors import InvalidObjective
from shared.learn import bandit
from shared.learn.kept import pieces
from shared.learn.live import RENEW, START, Learner, first_quality
from tests import samples

SPEC_A, SPEC_B = samples.spec("a-int8"), samples.spec("b-int8")
CARDS = {"alpha": samples.card("alpha", SPEC_A, quality=0.6), "beta": samples.card("beta", SPEC_B, quality=0.5)}
WORKER = samples.worker(engines=[samples.engine(SPEC_A), samples.engine(SPEC_B)])
X = np.array([1.0, 0.0, 0.0, 0.0])


def taught(**scores: list[float]) -> Learner:
    """A learner after these judgements of queries like `X`."""
    learner = Learner(list(CARDS))
    draw = np.random.default_rng(0)
    for _ in range(START):
        first = learner.seen(X + draw.normal(0.0, 0.1, 4))
    assert first is not None
    learner.begin(first_quality(learner.cards, first))
    for card, given_scores in scores.items():
        for score in given_scores:
            assert learner.judged(card, X, CARDS[card].quality, score)
    return learner


def route(learned: Learned | None, chance: routing.Chance | None = None, **policy: object) -> m.Route:
    own = m.Policy(fleet="f", w_latency=0.0, w_energy=0.0, **policy)  # type: ignore[arg-type]
    state = routing.State(cards=CARDS, policy=own, workers=[WORKER], learned=learned)
    return routing.decide(samples.analyzed(embedding=X.astype("<f4").tobytes()), state, 0.0, chance)


def candidate(found: m.Route, card: str) -> m.Candidate:
    return next(c for c in found.candidates if c.card == card)


def test_the_cards_promise_decides_until_something_has_been_learned() -> None:
    assert route(Learned()).order == ["alpha", "beta"]
    assert candidate(route(Learned()), "alpha").quality == pytest.approx(0.6)


def test_judgements_turn_the_choice_and_the_terms_say_how() -> None:
    learner = taught(alpha=[0.0] * 40, beta=[1.0] * 40)
    found = route(Learned(learner, version=7))
    assert found.order[0] == "beta"
    assert found.learned_version == 7
    beta = candidate(found, "beta")
    assert beta.terms["prior"] == pytest.approx(0.5)
    assert beta.terms["learned"] > 0.2
    assert beta.terms["std"] > 0.0
    assert beta.quality == pytest.approx(beta.terms["prior"] + beta.terms["learned"])


def test_a_quarantined_card_is_left_out_unless_it_is_asked_for_or_nothing_else_is_left() -> None:
    bad = m.CardStanding(card="alpha", state="quarantined")
    found = route(Learned(standings={"alpha": bad}))
    assert found.order == ["beta"]
    assert candidate(found, "alpha").excluded == "quarantined"
    all_bad = {name: m.CardStanding(card=name, state="quarantined") for name in CARDS}
    assert route(Learned(standings=all_bad)).order == ["alpha", "beta"]
    state = routing.State(
        cards=CARDS, policy=m.Policy(fleet="f"), workers=[WORKER], learned=Learned(standings={"alpha": bad})
    )
    assert routing.decide(samples.analyzed(m.Query(prompt="x", model="alpha")), state, 0.0).order == ["alpha"]


def test_a_card_taken_back_at_a_lower_level_is_scaled() -> None:
    found = route(Learned(standings={"alpha": m.CardStanding(card="alpha", scale=0.5)}))
    assert found.order[0] == "beta"
    assert candidate(found, "alpha").quality == pytest.approx(0.3)


def test_exploration_stays_within_its_budget_and_its_propensities_add_up() -> None:
    learner = taught(alpha=[1.0, 0.0], beta=[1.0])
    normal = np.random.default_rng(1).standard_normal(learning.normals(Learned(learner), len(CARDS)))
    first = [route(Learned(learner), routing.Chance(normal, u), explore=0.2) for u in np.linspace(0.001, 0.999, 50)]
    by_card = {found.order[0]: found.propensity for found in first}
    assert sum(by_card.values()) == pytest.approx(1.0)
    best = max(by_card, key=lambda card: by_card[card])
    assert by_card[best] >= 0.8
    explored = [found for found in first if found.order[0] != best]
    assert explored
    assert all(found.reason == "explored" and found.margin <= 0.0 for found in explored)
    still = route(Learned(learner), routing.Chance(normal, 0.999), explore=0.0)
    assert (still.order[0], still.propensity) == (best, 1.0)


def test_a_query_is_explored_as_the_bench_explores() -> None:
    """The planner's propensities are those of `bandit.distribution` over the same knowledge and the same draws."""
    learner = taught(alpha=[1.0, 0.0], beta=[1.0])
    normal = np.random.default_rng(1).standard_normal(learning.normals(Learned(learner), len(CARDS)))
    found = {
        one.order[0]: one.propensity
        for one in (
            route(Learned(learner), routing.Chance(normal, u), explore=1.0) for u in np.linspace(0.01, 0.99, 40)
        )
    }
    assert learner.quality is not None
    promised = np.array([CARDS[card].quality for card in learner.cards])
    mean = learner.quality.predict(X[None], promised[None]).mean[0]
    wanted = bandit.distribution(mean, learner.quality.spread(X), normal, duel=bandit.DUEL)
    assert found == pytest.approx(dict(zip(learner.cards, wanted, strict=True)))


def test_what_was_learned_survives_storing_and_a_changed_fleet() -> None:
    learner = taught(alpha=[0.0] * 10)
    again = Learner.from_bytes(b"".join(pieces(learner.to_bytes(), 1000)))
    assert again.judgements == 10
    assert again.quality is not None
    assert learner.quality is not None
    assert np.allclose(again.quality.predict(X[None]).mean, learner.quality.predict(X[None]).mean)
    again.use(["alpha", "gamma"])
    assert again.cards == ("alpha", "gamma")
    assert again.quality.predict(X[None]).mean[0, 0] < -0.05
    with pytest.raises(ValueError, match="learner"):
        Learner.from_bytes(b"nonsense")


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=6), st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(0, 99))
def test_shares_are_a_distribution_that_favours_the_best(
    utility: list[float], spread: float, budget: float, seed: int
) -> None:
    normal = np.random.default_rng(seed).standard_normal((16, len(utility)))
    share = learning.shares(np.array(utility), spread * normal, budget)
    assert share.sum() == pytest.approx(1.0)
    assert (share >= 0.0).all()
    assert share[int(np.argmax(utility))] >= 1.0 - budget - 1e-9
    assert 0 <= learning.draw(share, 1.0) < len(utility)


def test_moved_weights_hold_only_for_the_objectives_and_the_fleet_that_they_were_moved_for() -> None:
    policy = m.Policy(fleet="f", w_energy=0.1)
    in_force = m.InForce(objectives=m.Objectives(energy_j_per_query=5.0, w_quality=2.0), version=3)
    moved = m.Moved(version=3, fleet="f", weights={"w_energy": 0.7, "energy_ref_j": 5.0}, at=1.0)
    assert objectives.effective(policy, in_force, moved).w_energy == 0.7
    for other in (
        msgspec.structs.replace(moved, version=2),
        msgspec.structs.replace(moved, fleet="g"),
        None,
    ):
        found = objectives.effective(policy, in_force, other)
        assert (found.w_energy, found.energy_ref_j, found.w_quality) == (0.1, 5.0, 2.0)
    assert objectives.effective(policy, None, moved) == policy


def test_clearing_and_setting_the_same_objective_is_refused() -> None:
    asked = m.Control(action="set", objectives=m.Objectives(latency_p95_s=1.0), clear=["latency_p95_s"])
    with pytest.raises(InvalidObjective, match="both"):
        objectives.change(None, asked, {"alpha"}, 0.0)


def begun(width: int = 4) -> Learner:
    """A learner whose topics have been made."""
    learner, draw = Learner(list(CARDS)), np.random.default_rng(0)
    made = [first for _ in range(START) if (first := learner.seen(draw.normal(0.0, 1.0, width))) is not None]
    learner.begin(first_quality(learner.cards, made[0]))
    return learner


def means(learner: Learner, x: np.ndarray[tuple[int], np.dtype[np.float64]]) -> list[float]:
    assert learner.quality is not None
    return [float(value) for value in learner.quality.predict(x[None]).mean[0]]


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["alpha", "beta"]), st.integers(0, 1)), max_size=30))
def test_a_second_judgement_of_an_answer_takes_the_place_of_the_first(given: list[tuple[int, str, int]]) -> None:
    """However often answers are judged, what is known is what their last judgements say."""
    queries = np.random.default_rng(1).normal(0.0, 1.0, (6, 4))
    often, once = begun(), begun()
    for i, card, score in given:
        assert often.judged(card, queries[i], 0.5, float(score), f"q{i}")
    for (i, card), score in {(i, card): score for i, card, score in given}.items():
        assert once.judged(card, queries[i], 0.5, float(score), f"q{i}")
    assert means(often, queries[0]) == pytest.approx(means(once, queries[0]), abs=1e-9)
    assert often.judgements == once.judgements


def test_a_judgement_changed_after_the_card_did_takes_back_only_what_still_counts() -> None:
    learner, plain = begun(), begun()
    for one in (learner, plain):
        for i in range(5):
            one.judged("alpha", X, 0.5, 1.0, f"q{i}")
        one.changed("alpha", 0.1)
    learner.judged("alpha", X, 0.5, 1.0, "q0")
    assert plain.quality is not None
    assert learner.quality is not None
    counts = [one.quality.sums.count[0] for one in (plain, learner)]  # type: ignore[union-attr]
    assert counts == pytest.approx([0.5, 0.4 + 1.0])


def test_topics_are_made_anew_from_more_queries_and_what_was_learned_is_learned_again() -> None:
    """The first queries are all of one kind; topics from them cannot tell the two kinds that come later."""
    draw = np.random.default_rng(3)
    kinds = np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    learner = Learner(list(CARDS))
    made: list[int] = []
    for i in range(RENEW[0]):
        kind = 0 if i < START else i % 2
        x = kinds[kind] + draw.normal(0.0, 0.05, 4)
        if (first := learner.seen(x)) is not None:
            made.append(len(first))
            learner.begin(first_quality(learner.cards, first))
        if learner.quality is not None:
            card = ("alpha", "beta")[i // 2 % 2]
            learner.judged(card, x, 0.5, float((card == "alpha") == (kind == 0)), f"q{i}")
    assert made == [START, RENEW[0]]
    assert learner.topics_version == 2
    again = Learner.from_bytes(learner.to_bytes())
    again.take_outcomes(learner.outcomes_to_bytes())
    for one in (learner, again):
        assert [int(np.argmax(means(one, x))) for x in kinds] == [0, 1]
        assert one.knows("q100", "alpha") or one.knows("q100", "beta")
    with pytest.raises(ValueError, match="outcomes"):
        again.take_outcomes(b"nonsense")


def test_outcomes_of_a_card_that_leaves_are_not_taken_back_when_it_returns() -> None:
    learner = begun()
    learner.judged("beta", X, 0.5, 1.0, "q1")
    learner.use(["alpha"])
    learner.use(["alpha", "beta"])
    assert not learner.knows("q1", "beta")
    learner.judged("beta", X, 0.5, 0.0, "q1")
    assert learner.quality is not None
    assert learner.quality.sums.count[1] == 1.0


def asked(learner: Learner, query: m.Query) -> m.Route:
    state = routing.State(
        cards=CARDS, policy=m.Policy(fleet="f", w_latency=0.0, w_energy=0.0), workers=[WORKER], learned=Learned(learner)
    )
    return routing.decide(samples.analyzed(query, embedding=X.astype("<f4").tobytes()), state, 0.0)


def test_a_card_whose_answers_cannot_be_read_loses_the_queries_that_expect_something_and_only_those() -> None:
    """No judgement is needed: alpha promises more, and half of its answers are of no use to such a query."""
    learner = begun()
    for i in range(40):
        learner.heard("alpha", X, i % 2 == 0, f"a{i}")
        learner.heard("beta", X, True, f"b{i}")
    expects = asked(learner, m.Query(prompt="hi", expect=m.ExpectNumber()))
    assert expects.order == ["beta", "alpha"]
    alpha = candidate(expects, "alpha")
    assert alpha.terms["readable"] == pytest.approx(0.5, abs=0.1)
    assert alpha.quality == pytest.approx(alpha.terms["readable"] * (alpha.terms["prior"] + alpha.terms["learned"]))
    plain = asked(learner, m.Query(prompt="hi"))
    assert plain.order == ["alpha", "beta"]
    assert "readable" not in candidate(plain, "alpha").terms


@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), max_size=12), st.randoms(use_true_random=False)
)
def test_judgements_of_unreadable_answers_teach_nothing_whichever_is_known_first(
    events: list[tuple[int, bool, bool]], random: Random
) -> None:
    """Judgement and reading of an answer come in either order; what is learned is the same."""
    queries = np.random.default_rng(1).normal(0.0, 1.0, (5, 4))
    readable = {i: can for i, can, _ in events}
    scores = {i: float(score) for i, _, score in events}
    told = [("heard", i) for i in readable] + [("judged", i) for i in scores]
    random.shuffle(told)
    one, other = begun(), begun()
    for what, i in told:
        if what == "heard":
            one.heard("alpha", queries[i], readable[i], f"q{i}")
        else:
            one.judged("alpha", queries[i], 0.5, scores[i], f"q{i}")
    for i, can in readable.items():
        if can:
            other.judged("alpha", queries[i], 0.5, scores[i], f"q{i}")
    assert means(one, queries[0]) == pytest.approx(means(other, queries[0]), abs=1e-9)
    assert one.judgements == other.judgements
    assert one.readings == len(readable)


def test_readings_are_stored_taken_up_and_learned_again_with_new_topics() -> None:
    """What came before there were topics is not lost, nor is anything by a restart or by topics made anew."""
    learner, draw = Learner(list(CARDS)), np.random.default_rng(0)
    assert not learner.heard("alpha", X, False, "early")
    made = [first for _ in range(START) if (first := learner.seen(draw.normal(0.0, 1.0, 4))) is not None]
    learner.begin(first_quality(learner.cards, made[0]))
    assert learner.heard("alpha", X, False, "later")
    assert not learner.heard("alpha", X, False, "later")  # once for each answer
    again = Learner.from_bytes(learner.to_bytes())
    again.take_readings(learner.readings_to_bytes())
    anew = Learner.from_bytes(learner.to_bytes())
    anew.take_readings(learner.readings_to_bytes())
    assert anew.quality is not None
    anew.begin(anew.quality)
    for one in (learner, again, anew):
        assert one.ready
        assert one.readings == 2
        assert one.readable is not None
        assert one.readable.sums.count[0] == pytest.approx(2.0)
        assert one.readable.predict(X[None], np.ones((1, 2))).mean[0, 0] < 0.9
    with pytest.raises(ValueError, match="readings"):
        again.take_readings(b"nonsense")


def test_what_was_stored_before_readings_were_learned_is_taken_up() -> None:
    learner = begun()
    learner.judged("alpha", X, 0.5, 1.0, "q1")
    again = Learner.from_bytes(learner.to_bytes())
    assert again.readings == 0
    assert again.heard("alpha", X, False, "q2")
