"""Cascade, bandit and off-policy evaluation on small worlds whose truth is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared.learn import bandit, lines, offpolicy
from shared.learn.cascade import KEEP, LAST, SECOND, THIRD, Cascade, Plan, play
from shared.learn.quality import QualityModel
from shared.learn.readable import ReadableQuality
from shared.learn.topics import clusters

Array = NDArray[np.float64]


def exam(n: int, seed: int = 0) -> tuple[Array, Array, NDArray[np.bool_], NDArray[np.str_]]:
    """Answers of three models to four-way questions: quality, score, answered, answer. The third is the large one."""
    rng = np.random.default_rng(seed)
    easy = rng.random(n)
    quality = np.stack([0.2 + 0.6 * easy, 0.25 + 0.5 * easy, np.full(n, 0.85)], 1)
    right = rng.random((n, 3)) < quality
    wrong = rng.integers(1, 4, (n, 3))
    answered = rng.random((n, 3)) < [0.7, 0.75, 1.0]
    answer = np.where(answered, np.where(right, "0", wrong.astype("<U1")), "")
    return quality, (right & answered).astype(float), answered, answer


def net(plan: Plan, cost: Array, score: Array, answered: NDArray[np.bool_], answer: NDArray[np.str_]) -> float:
    """Mean score less the price of all that was asked."""
    played = play(plan, answered, answer)
    return float(score[np.arange(len(score)), played.final].mean() - (played.asked * cost).sum(1).mean())


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000), prices=st.tuples(*[st.floats(0.0, 0.6)] * 3), compare=st.booleans(),
    retry=st.booleans(), vote=st.booleans(),
)  # fmt: skip
def test_a_plan_played_at_once_takes_the_same_steps(
    seed: int, prices: tuple[float, float, float], compare: bool, retry: bool, vote: bool
) -> None:
    """`play` over all queries ends where `Plan.step` leads query by query, and a query ends after three at most."""
    quality, score, answered, answer = exam(60, seed)
    cascade = Cascade.fit(quality, score, answered, answer, vote=vote)
    plan = cascade.plan(
        quality, answered.mean(0) + 0.0 * quality, np.tile(prices, (60, 1)), compare=compare, retry=retry
    )
    played = play(plan, answered, answer)
    for i in range(60):
        heard: list[tuple[int, str]] = []
        what, model = plan.step(i, heard)
        while what == "ask":
            assert model not in [m for m, _ in heard], "nobody is asked twice"
            heard.append((model, str(answer[i, model])))
            what, model = plan.step(i, heard)
        assert len(heard) <= (3 if compare else 2)
        assert model == played.final[i]
        assert sorted(m for m, _ in heard) == np.flatnonzero(played.asked[i]).tolist()


def test_what_is_heard_is_worth_hearing() -> None:
    """Retries pay over one answer, second opinions over retries, on questions not learned from."""
    quality, score, answered, answer = exam(3000)
    judged = exam(3000, seed=1)
    cascade = Cascade.fit(quality, score, answered, answer)
    cost = np.tile([0.01, 0.01, 0.3], (3000, 1))
    nets = []
    for compare, retry in ((False, False), (False, True), (True, True)):
        plan = cascade.plan(judged[0], judged[2].mean(0) + 0.0 * quality, cost, compare=compare, retry=retry)
        nets.append(net(plan, cost, *judged[1:]))
        assert plan.worth.max(1).mean() == pytest.approx(nets[-1], abs=0.03), "what was promised is what came"
    assert nets[0] + 0.01 < nets[1]
    assert nets[1] + 0.01 < nets[2]


def peers(n: int, seed: int) -> tuple[Array, Array, NDArray[np.bool_], NDArray[np.str_]]:
    """Two equals and a weaker third, each right by itself, and wrong in nine different ways."""
    rng = np.random.default_rng(seed)
    quality = np.tile([0.5, 0.5, 0.35], (n, 1)) + rng.normal(0.0, 0.02, (n, 3))
    right, wrong = rng.random((n, 3)) < quality, rng.integers(1, 10, (n, 3))
    answer = np.where(right, "0", wrong.astype("<U1"))
    return quality, right.astype(float), np.ones((n, 3), bool), answer


def test_two_that_agree_against_a_third_are_believed_more_than_any_of_three_that_differ() -> None:
    """The lines that votes are learned as tell the two apart, in a world where wrong answers seldom coincide."""
    quality, score, answered, answer = peers(4000, 0)
    votes = Cascade.fit(quality, score, answered, answer, vote=True).votes
    assert votes is not None
    assert Cascade.fit(quality, score, answered, answer).votes is None
    chance = np.array([0.5])
    together = lines.at(votes.pair[0, 1, 2], (chance + 0.35) / 2.0)
    apart = [lines.at(votes.torn[0, 1, 2, place], chance) for place in range(3)]
    assert together[0] > max(apart)[0] + 0.2


@pytest.mark.parametrize(
    ("torn", "third", "taken"),
    [
        (KEEP, "x", 0), (THIRD, "x", 0), (THIRD, "y", 1), (KEEP, "y", 1), (KEEP, "z", 0), (SECOND, "z", 1),
        (THIRD, "z", 2), (THIRD, "", 0), (LAST, "x", 2), (LAST, "z", 2), (LAST, "", 1),
    ],
)  # fmt: skip
def test_a_third_opinion_is_counted_or_has_the_last_word(torn: int, third: str, taken: int) -> None:
    """The first said x and the second y: a vote decides between them or, alone, as planned; the last word is the last
    that could be read."""
    keep = np.full((1, 3), KEEP)
    plan = Plan(np.array([[1.0, 0.0, 0.0]]), keep, np.full((1, 3), 1), keep, np.full((1, 3), 2), np.full((1, 3), torn))
    answer = np.array([["x", "y", third]])
    assert plan.step(0, [(0, "x"), (1, "y")]) == ("ask", 2)
    assert plan.step(0, [(0, "x"), (1, "y"), (2, third)]) == ("take", taken)
    assert play(plan, answer != "", answer).final[0] == taken


def test_asking_for_free_is_never_declined_and_asking_at_any_price_never_done() -> None:
    """Of free models everybody asks the best and nobody another; at a price above any score nobody asks a second."""
    quality, score, answered, answer = exam(400)
    cascade = Cascade.fit(quality, score, answered, answer)
    chance = answered.mean(0) + 0.0 * quality
    free = cascade.plan(quality, chance, np.zeros((400, 3)), compare=False, retry=False)
    assert (free.first == 2).all()
    dear = cascade.plan(quality, chance, np.full((400, 3), 2.0))
    rows = np.arange(400)
    for array in (dear.none_then, dear.second):
        assert (array[rows, dear.first] == KEEP).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), price=st.floats(0.05, 1.0))
def test_a_higher_price_never_spends_more(seed: int, price: float) -> None:
    """Expected spending falls with the price: what the dual controller relies on."""
    quality, score, answered, answer = exam(200, seed)
    cascade = Cascade.fit(quality, score, answered, answer)
    chance, energy = answered.mean(0) + 0.0 * quality, np.tile([0.05, 0.06, 1.0], (200, 1))
    low = cascade.plan(quality, chance, price * energy).worth.max(1)
    high = cascade.plan(quality, chance, 1.5 * price * energy).worth.max(1)
    assert (high <= low + 1e-12).all()


def test_without_answers_to_compare_it_routes_and_retries() -> None:
    """No recorded answers: no second opinions. No record of what was readable: no retries either."""
    quality, score, answered, _ = exam(500)
    chance, cost = answered.mean(0) + 0.0 * quality, np.tile([0.02, 0.03, 0.4], (500, 1))
    plan = Cascade.fit(quality, score, answered).plan(quality, chance, cost, compare=False)
    assert (plan.second == KEEP).all()
    assert play(plan, answered, None).asked.sum(1).max() == 2
    blind = Cascade.fit(quality, score).plan(quality, np.ones((500, 3)), cost, compare=False)
    assert play(blind, np.ones((500, 3), bool), None).asked.sum() == 500


def kinds(n: int, seed: int) -> tuple[Array, Array]:
    """Features of two kinds of query and the three models' chances."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(2, size=n)
    x = np.eye(6)[kind] + 0.2 * rng.normal(size=(n, 6))
    return x, np.array([[0.8, 0.2, 0.1], [0.2, 0.7, 0.1]])[kind]


def chances(model: QualityModel | ReadableQuality, x: Array, rng: np.random.Generator, **budgets: float) -> Array:
    """With which each model is chosen for one query."""
    spread = model.spread(x)
    normal = rng.standard_normal(spread.shape(bandit.DRAWS))
    return bandit.distribution(model.predict(x[None, :]).mean[0], spread, normal, **budgets)


def test_it_learns_from_chosen_outcomes_alone() -> None:
    """After 400 outcomes of its own choices it takes the best model of each kind, and rarely the useless one."""
    x, chance = kinds(400, 0)
    rng = np.random.default_rng(1)
    model = QualityModel.start(("a", "b", "c"), x, 4)
    taken = []
    for row in range(400):
        choice = bandit.choose(chances(model, x[row], rng), rng.random())
        model.update(x[row], choice.model, float(rng.random() < chance[row, choice.model]))
        taken.append(choice.model)
    wanted, truth = kinds(200, 2)
    assert (model.predict(wanted).mean.argmax(1) == truth.argmax(1)).mean() > 0.95
    assert taken[200:].count(2) < 10


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), budget=st.floats(0.0, 1.0), floor=st.floats(0.0, 0.2))
def test_exploration_keeps_to_its_budget(seed: int, budget: float, floor: float) -> None:
    """Probabilities add up to one, none is below the floor, and the rest of the best guess's is within the budget."""
    x, _ = kinds(20, seed)
    model = QualityModel.start(("a", "b", "c"), x, 2)
    found = chances(model, x[0], np.random.default_rng(seed), budget=budget, floor=floor)
    best = int(model.predict(x[:1]).mean[0].argmax())
    assert found.sum() == pytest.approx(1.0)
    assert found.min() >= floor - 1e-12
    assert 1.0 - found[best] <= (1.0 - 3 * floor) * budget + 2 * floor + 1e-9


def test_choices_come_as_often_as_their_propensity_says() -> None:
    """Over evenly spread draws each model is chosen in its share."""
    shares = np.array([0.1, 0.0, 0.65, 0.25])
    drawn = [bandit.choose(shares, (i + 0.5) / 1000) for i in range(1000)]
    counts = np.bincount([c.model for c in drawn], minlength=4) / 1000
    np.testing.assert_allclose(counts, shares, atol=0.002)
    assert all(c.propensity == shares[c.model] for c in drawn)


@given(st.lists(st.integers(0, 32), min_size=2, max_size=8), st.floats(0.0, 1.0), st.floats(0.0, 0.5))
def test_challengers_get_their_share_and_probabilities_add_up(wins: list[int], duel: float, least: float) -> None:
    """Top-two sampling in closed form is a distribution; who wins no draw, or few, is not asked."""
    share = np.array(wins, float) / max(sum(wins), 1) if any(wins) else np.full(len(wins), 1.0 / len(wins))
    found = bandit.challenged(share, duel, least)
    assert found.sum() == pytest.approx(1.0)
    assert (found >= 0.0).all()
    if (share >= least).any():
        assert (found[share < least] == 0.0).all()
    assert (found[share == 0.0] == 0.0).all()


def test_challenging_is_drawing_until_another_wins() -> None:
    share, rng = np.array([0.6, 0.3, 0.1]), np.random.default_rng(0)
    counts = np.zeros(3)
    for _ in range(20_000):
        winner = rng.choice(3, p=share)
        if rng.random() < 0.5:
            first = winner
            while winner == first:
                winner = rng.choice(3, p=share)
        counts[winner] += 1
    np.testing.assert_allclose(bandit.challenged(share, 0.5), counts / 20_000, atol=0.015)


def test_what_cannot_be_read_is_learned_without_a_judgement() -> None:
    """Two models whose readable answers are equally good; one rambles on one kind of query, and nobody judges that."""
    x, _ = kinds(600, 0)
    rng = np.random.default_rng(1)
    model = ReadableQuality.start(("plain", "rambling"), clusters(x, (2, 4)))
    before = model.predict(x[:1])
    for row in range(600):
        asked = row % 2
        readable = asked == 0 or x[row, 0] < 0.5 or rng.random() < 0.4
        model.heard(x[row], asked, readable)
        if readable and row % 5 < 2:
            model.judged(x[row], asked, float(rng.random() < 0.5))
    wanted, _ = kinds(200, 2)
    mean = model.predict(wanted).mean
    rambles = wanted[:, 0] > 0.5
    assert mean[rambles, 1].mean() < 0.6 * mean[rambles, 0].mean()
    assert (mean[rambles, 1] < mean[rambles, 0]).all()
    assert abs(mean[~rambles, 1].mean() - mean[~rambles, 0].mean()) < 0.15
    assert model.predict(x[:1]).std.mean() < before.std.mean()
    assert chances(model, wanted[rambles][0], rng)[0] > 0.9


def test_two_factors_deviate_as_their_product_does() -> None:
    """The spread that is explored by is, to first order, that of what is predicted; and what is uncertain of all models
    alike moves them alike."""
    x, _ = kinds(400, 0)
    rng = np.random.default_rng(1)
    model = ReadableQuality.start(("a", "b"), clusters(x, (2, 4)))
    for row in range(400):
        model.heard(x[row], row % 2, float(rng.random() < 0.8))
        model.judged(x[row], row % 2, float(rng.random() < 0.5))
    spread = model.spread(x[0])
    np.testing.assert_allclose(spread.std, model.predict(x[:1]).std[0], rtol=1e-6)
    drawn = spread.deviations(rng.standard_normal(spread.shape(40_000)))
    np.testing.assert_allclose(np.cov(drawn.T), spread.shared @ spread.shared.T + np.diag(spread.own**2), atol=1e-4)
    fresh = ReadableQuality.start(("a", "b"), clusters(x, (2, 4))).spread(x[0])
    apart = fresh.deviations(rng.standard_normal(fresh.shape(10_000)))
    assert (apart[:, 0] - apart[:, 1]).std() < 0.8 * np.hypot(*fresh.std)


def logs(n: int, seed: int) -> tuple[offpolicy.Logged, Array, Array, Array]:
    """A log of a uniform policy, the candidate (mostly the best), the present policy, and the true chances."""
    chance = kinds(n, seed)[1]
    rng = np.random.default_rng(seed + 1)
    present = np.full((n, 3), 1.0 / 3.0)
    chosen = rng.integers(3, size=n)
    reward = (rng.random(n) < chance[np.arange(n), chosen]).astype(float)
    candidate = 0.1 / 3 + 0.9 * np.eye(3)[chance.argmax(1)]
    return offpolicy.Logged(chosen, np.full(n, 1.0 / 3.0), reward), candidate, present, chance


def test_estimates_hold_the_truth_as_often_as_they_say() -> None:
    """Of a hundred logs about 95 give an interval that holds the truth, with wrong predictions too, for all three."""
    held = np.zeros(4)
    widths = np.zeros(4)
    for seed in range(100):
        logged, candidate, _, chance = logs(400, 1000 + 7 * seed)
        truth = float((candidate * chance).sum(1).mean())
        wrong = np.full(chance.shape, 0.9)
        found = (
            offpolicy.ips(logged, candidate), offpolicy.snips(logged, candidate),
            offpolicy.doubly_robust(logged, candidate, chance), offpolicy.doubly_robust(logged, candidate, wrong),
        )  # fmt: skip
        held += [e.low <= truth <= e.high for e in found]
        widths += [e.high - e.low for e in found]
    assert (held >= 88).all(), held
    assert widths[2] < widths[1] < widths[0], "predictions that are right make the interval narrower"


def test_drawing_weights_in_makes_the_error_smaller_where_they_are_large() -> None:
    """A log that seldom shows what the candidate wants, predictions that are nearly right: `shrunk` is nearer."""
    errors: dict[str, list[float]] = {"plain": [], "shrunk": []}
    for seed in range(60):
        chance = kinds(500, seed)[1]
        rng = np.random.default_rng(seed + 1)
        present = np.full((500, 3), 0.02) + 0.94 * np.eye(3)[chance.argmin(1)]
        chosen = (present.cumsum(1) > rng.random((500, 1))).argmax(1)
        reward = (rng.random(500) < chance[np.arange(500), chosen]).astype(float)
        logged = offpolicy.Logged(chosen, present[np.arange(500), chosen], reward)
        candidate = 0.1 / 3 + 0.9 * np.eye(3)[chance.argmax(1)]
        truth = float((candidate * chance).sum(1).mean())
        plain = offpolicy.doubly_robust(logged, candidate, chance - 0.02)
        drawn = offpolicy.shrunk(logged, candidate, chance - 0.02)
        errors["plain"].append(abs(plain.value - truth))
        errors["shrunk"].append(abs(drawn.value - truth))
    assert np.mean(errors["shrunk"]) < 0.7 * np.mean(errors["plain"])


def test_drawing_weights_in_changes_little_where_they_are_small() -> None:
    logged, candidate, _, chance = logs(1500, 5)
    plain, drawn = (how(logged, candidate, chance) for how in (offpolicy.doubly_robust, offpolicy.shrunk))
    assert drawn.value == pytest.approx(plain.value, abs=0.02)


def test_only_a_certain_gain_is_promoted() -> None:
    """A better policy is promoted, one that is equal or worse or rests on a handful of decisions is not."""
    logged, candidate, present, chance = logs(1500, 5)
    assert offpolicy.judge(logged, candidate, present, chance).promote
    assert not offpolicy.judge(logged, present, candidate, chance).promote
    assert not offpolicy.judge(logged, present, present, chance).promote
    few = offpolicy.Logged(logged.chosen[:50], logged.propensity[:50], logged.reward[:50])
    verdict = offpolicy.judge(few, candidate[:50], present[:50], chance[:50])
    assert not verdict.promote
    assert "needed" in verdict.reason


def test_a_policy_that_was_never_logged_gets_no_false_certainty() -> None:
    """No logged decision supports it: the self-normalised estimate is unbounded, and nothing is promoted."""
    logged = offpolicy.Logged(np.zeros(100, np.int64), np.ones(100), np.ones(100))
    target = np.tile([0.0, 1.0], (100, 1))
    assert offpolicy.snips(logged, target).high == np.inf
    assert not offpolicy.judge(logged, target, np.tile([1.0, 0.0], (100, 1)), np.full((100, 2), 0.5)).promote


def test_every_end_of_a_plan_is_reachable() -> None:
    """For all that can be heard there is a next step, and it is to take an answer that was given if any was."""
    quality, score, answered, answer = exam(50)
    plan = Cascade.fit(quality, score, answered, answer).plan(
        quality, answered + 0.0, np.tile([0.01, 0.01, 0.2], (50, 1))
    )
    for i, says in itertools.product(range(50), itertools.product(("", "x", "y"), repeat=3)):
        heard: list[tuple[int, str]] = []
        what, model = plan.step(i, heard)
        while what == "ask":
            heard.append((model, says[len(heard)]))
            what, model = plan.step(i, heard)
        readable = [m for m, said in heard if said]
        assert model in (readable or [m for m, _ in heard])
