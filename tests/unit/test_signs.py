"""What is to be seen of an answer: signs of their lengths, and how long to wait for one."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.executor.decide import attempts
from services.planner.decide import patience
from shared import messages as m
from shared.learn import signs
from shared.learn.kept import Heard, Kept, learned_tables
from shared.learn.live import Learner, first_quality
from shared.learn.live_patience import Table, tables
from shared.learn.signs import Signs
from tests import samples

X = np.array([1.0, 0.0, 0.0, 0.0])
CARDS = {name: samples.card(name, samples.spec(f"{name}-int8")) for name in ("alpha", "beta", "gamma")}
NUMBER = m.ExpectNumber()


def test_the_sign_of_an_answer_follows_its_length_where_judgements_do() -> None:
    rng = np.random.default_rng(0)
    tokens = np.exp(rng.normal(4.0, 0.7, 400)).astype(int) + 1
    score = (rng.random(400) < np.where(tokens > 60, 0.2, 0.6)).astype(float)
    answers = [("alpha", int(t)) for t in tokens]
    found = signs.learn(answers, [(*one, float(s)) for one, s in zip(answers, score, strict=True)])
    assert found.of("alpha", 20) > 1.2 > 0.8 > found.of("alpha", 300)
    assert found.of("alpha", 20, readable=False) == 0.0
    assert found.of("never seen", 20) == found.of("alpha", 0) == 1.0
    # relative to the model's own: another that writes three times as much is no worse for it
    twice = signs.learn([*answers, *(("beta", 3 * t) for _, t in answers)], [])
    assert twice.slope == 0.0
    known = Signs({**twice.usual}, found.level, found.slope, found.mean)
    assert known.of("beta", 180) == pytest.approx(known.of("alpha", 60), abs=0.02)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 5000), st.floats(0, 1)), max_size=40))
def test_a_sign_is_between_nought_and_its_bound(judged: list[tuple[str, int, float]]) -> None:
    found = signs.learn([(card, tokens) for card, tokens, _ in judged], judged)
    for card, tokens, _ in judged:
        assert 0.0 < found.of(card, tokens) <= signs.HIGHEST


def test_lengths_teach_the_learner_without_judgements() -> None:
    """Long answers are wrong, which few judgements show; one card writes long ones on one kind of query, unjudged."""
    rng, kinds = np.random.default_rng(1), np.eye(4)[:2]
    learner = Learner(["alpha", "beta"])
    for i in range(600):
        kind = i % 2
        x = kinds[kind] + rng.normal(0.0, 0.05, 4)
        if (first := learner.seen(x)) is not None:
            learner.begin(first_quality(learner.cards, first))
        card = ("alpha", "beta")[i // 2 % 2]
        long = rng.random() < (0.6 if card == "alpha" and kind == 0 else 0.1)
        learner.heard(card, x, True, f"q{i}", 400 if long else 40)
        if i % 2 == 1 or i % 20 == 0:
            learner.judged(card, x, 0.5, float(rng.random() < (0.1 if long else 0.6)), f"q{i}")
    assert learner.readable is not None
    expected = learner.readable.predict(kinds, np.ones((2, 2))).mean
    assert expected[0, 0] < 0.8 * expected[0, 1]
    again = Learner.from_bytes(learner.to_bytes())
    assert (again.signs, again.patience) == (learner.signs, learner.patience)


def rambling(n: int, seed: int = 0) -> list[tuple[int, float, float]]:
    """Answers of which a tenth ramble, and are then rarely right."""
    rng = np.random.default_rng(seed)
    long = rng.random(n) < 0.1
    tokens = np.where(long, rng.integers(600, 900, n), rng.integers(50, 110, n))
    return [(int(t), float(rng.random() < (0.05 if r else 0.6)), 1.0) for t, r in zip(tokens, long, strict=True)]


def test_a_card_that_rambles_is_cut_off_where_that_pays() -> None:
    plain = [(80, float(i % 2), 1.0) for i in range(400)]
    found = tables({"alpha": rambling(400), "beta": plain})
    assert "beta" not in found  # nothing of it is beyond three medians
    limit = found["alpha"].limit(0.0001, 0.01)
    assert limit is not None
    assert 200 < limit < 600
    assert found["alpha"].limit(0.0, 1.0) is None  # another answer is too dear
    assert tables({"alpha": rambling(40), "beta": plain}) == {}  # too few
    assert tables({"alpha": rambling(400)}) == {}  # nobody else to ask
    assert Table().limit(1.0, 0.0) is None


def test_what_was_cut_off_is_no_evidence_of_what_it_would_have_been() -> None:
    heard = {(f"{i}", "alpha"): Heard(b"", True, tokens=t) for i, (t, _, _) in enumerate(rambling(400))}
    kept = {(f"{i}", "alpha"): Kept(b"", 0.5, s) for i, (_, s, _) in enumerate(rambling(400))}
    heard |= {(f"b{i}", "beta"): Heard(b"", True, tokens=80) for i in range(200)}
    kept |= {(f"b{i}", "beta"): Kept(b"", 0.5, 0.5) for i in range(200)}
    free = learned_tables(heard, kept)
    assert "alpha" in free
    cut = {(f"c{i}", "alpha"): Heard(b"", False, tokens=300, limited=True) for i in range(500)}
    assert learned_tables({**heard, **cut}, kept) == free
    # an unreadable answer counts as much as a judged share of readable ones: none of these was judged
    never = {key: one for key, one in kept.items() if key[1] == "beta"}
    assert "alpha" not in learned_tables(heard, never)


def limits_of(query: m.Query, query_id: str = "q1", *, w_e: float = 1.0, retries: int = 0) -> dict[str, int]:
    standing = [
        m.Candidate(card=name, artifact=f"{name}-int8", energy_j=8.0, terms={"tokens_out": 80.0}) for name in CARDS
    ]
    table = {"alpha": tables({"alpha": rambling(400), "beta": [(80, 0.5, 1.0)] * 100})["alpha"]}
    policy = m.Policy(fleet="f", retries=retries, energy_ref_j=100.0)
    weights = {"w_q": 1.0, "w_l": 0.0, "w_e": w_e}
    return patience.limits(query, query_id, policy, standing, table, weights, CARDS)


def test_limits_are_for_queries_that_may_ask_again() -> None:
    expects = m.Query(prompt="hi", expect=NUMBER, retries=1)
    assert list(limits_of(expects)) == ["alpha"]
    assert limits_of(m.Query(prompt="hi", expect=NUMBER)) == {}
    assert list(limits_of(m.Query(prompt="hi", expect=NUMBER), retries=1)) == ["alpha"]
    assert limits_of(m.Query(prompt="hi", retries=1)) == {}
    shares = [bool(limits_of(expects, f"q{i}")) for i in range(200)]
    assert 0.7 < sum(shares) / 200 < 0.9  # the others show what answers would have been
    assert limits_of(expects)["alpha"] <= limits_of(expects, w_e=0.0).get("alpha", 10**6)


def test_an_attempt_is_cut_off_only_where_another_follows() -> None:
    route = m.Route(
        query_id="q", order=["alpha", "beta"], candidates=[], reason="r", patience={"alpha": 20, "beta": 30}
    )
    query = m.Query(prompt="hi", expect=NUMBER, retries=2)
    accepted = m.Accepted(query=query, query_id="q", deadline_at=1e12)
    planned = m.Planned(accepted=accepted, route=route)
    first = attempts.work(planned, CARDS, 0, 1, 0.0)
    assert first.sampling.max_tokens == 20
    assert attempts.work(planned, CARDS, 1, 2, 0.0).sampling.max_tokens == CARDS["beta"].max_tokens
    assert attempts.work(planned, {"alpha": CARDS["alpha"]}, 0, 1, 0.0).sampling.max_tokens > 20
    short = msgspec.structs.replace(planned, accepted=msgspec.structs.replace(accepted, query=m.Query(
        prompt="hi", expect=NUMBER, retries=2, max_tokens=5)))  # fmt: skip
    assert attempts.work(short, CARDS, 0, 1, 0.0).sampling.max_tokens == 5
    for changed in (m.Query(prompt="hi", expect=NUMBER, retries=0), m.Query(prompt="hi", retries=2)):
        free = msgspec.structs.replace(planned, accepted=msgspec.structs.replace(accepted, query=changed))
        assert attempts.work(free, CARDS, 0, 1, 0.0).sampling.max_tokens == CARDS["alpha"].max_tokens
    # a card that differs from the one cut off in nothing would ramble as well: it is passed over
    twin = {**CARDS, "beta": samples.card("beta", samples.spec("alpha-int8")), "gamma": CARDS["gamma"]}
    order = msgspec.structs.replace(planned, route=msgspec.structs.replace(route, order=["alpha", "beta", "gamma"]))
    tried = attempts.work(order, twin, 0, 1, 0.0)
    assert tried.sampling.max_tokens == 20
    failure = m.Failure(code="unreadable", message="x", retryable=True)
    failed = m.AttemptFailed(work=tried, failure=failure, worker="w", attempt=1, at=1.0)
    assert attempts.after_handed_on(failed, twin, lambda _: True, 1.0) == 2
