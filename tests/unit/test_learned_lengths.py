"""Lengths of answers, learned from every answer and used by routing."""

from __future__ import annotations

import numpy as np
import pytest

from services.planner.decide import routing
from services.planner.decide.learned import Learned
from shared import messages as m
from shared.learn.live_length import START, TRUSTED_FROM, Lengths, first_lengths
from tests import samples

SPEC_A, SPEC_B = samples.spec("a-int8"), samples.spec("b-int8")
CARDS = {"alpha": samples.card("alpha", SPEC_A, quality=0.6), "beta": samples.card("beta", SPEC_B, quality=0.6)}
WORKER = samples.worker(engines=[samples.engine(SPEC_A), samples.engine(SPEC_B)])
SHORT, LONG = np.array([1.0, 0.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0, 0.0])


def taught(rounds: int = 40, *, cut: bool = False) -> Lengths:
    """Alpha writes 20 tokens to one kind of query and 200 to the other; beta 60 to both."""
    lengths, draw = Lengths(list(CARDS)), np.random.default_rng(0)
    for i in range(START + rounds):
        kind = SHORT if i % 2 else LONG
        x = kind + draw.normal(0.0, 0.05, 4)
        if i % 4 < 2:
            assert lengths.answered("alpha", x, 20 if i % 2 else 200, cut=False)
        else:
            assert lengths.answered("beta", x, 60, cut=cut)
        if lengths.may_begin:
            lengths.begin(first_lengths(lengths.cards, lengths.first()))
    return lengths


def test_lengths_are_learned_by_card_and_kind_of_query() -> None:
    """The queries that made the topics count as well, and each card's lengths are within half."""
    lengths = taught()
    assert lengths.answers == START + 40
    names = ["alpha", "beta", "unknown"]
    short, long = lengths.expected(SHORT, names), lengths.expected(LONG, names)
    assert short[0] == pytest.approx(20, rel=0.5)
    assert long[0] == pytest.approx(200, rel=0.5)
    assert short[1] == pytest.approx(60, rel=0.5)
    assert np.isnan(short[2])


def test_answers_cut_off_at_their_limit_do_not_make_a_card_look_short() -> None:
    """Sixty tokens that were cut off count for no less than what was expected."""
    assert taught(cut=True).expected(SHORT, ["beta"])[0] > taught().expected(SHORT, ["beta"])[0]


def test_a_card_of_which_little_is_known_keeps_the_mean() -> None:
    """Below a number of answers nothing is said."""
    lengths = taught()
    lengths.use(["alpha", "beta", "new"])
    for _ in range(TRUSTED_FROM - 1):
        lengths.answered("new", SHORT, 10, cut=False)
    assert np.isnan(lengths.expected(SHORT, ["new"])[0])
    lengths.answered("new", SHORT, 10, cut=False)
    assert lengths.expected(SHORT, ["new"])[0] < 60
    assert lengths.expected(SHORT, ["alpha"])[0] == pytest.approx(taught().expected(SHORT, ["alpha"])[0], rel=0.3)


def test_what_was_learned_survives_storing() -> None:
    """Before and after the topics are made."""
    lengths = taught()
    again = Lengths.from_bytes(lengths.to_bytes())
    assert again.answers == lengths.answers
    assert again.expected(LONG, list(CARDS)) == pytest.approx(lengths.expected(LONG, list(CARDS)))
    young = Lengths(list(CARDS))
    young.answered("alpha", SHORT, 5, cut=True)
    assert Lengths.from_bytes(young.to_bytes()).to_bytes() == young.to_bytes()
    with pytest.raises(ValueError, match="no learned lengths"):
        Lengths.from_bytes(b"x")


def test_routing_expects_the_learned_length_and_so_prefers_who_is_brief() -> None:
    """Two cards of equal quality: the query's kind decides which is faster, and the decision names the version."""
    policy = m.Policy(fleet="f", w_latency=1.0, w_energy=0.0, explore=0.0)
    state = routing.State(
        cards=CARDS, policy=policy, workers=[WORKER], learned=Learned(lengths=taught(), lengths_version=9)
    )
    chosen = {}
    for name, x in (("short", SHORT), ("long", LONG)):
        found = routing.decide(samples.analyzed(embedding=x.astype("<f4").tobytes()), state, 0.0)
        assert found.lengths_version == 9
        chosen[name] = found.order[0]
        alpha = next(c for c in found.candidates if c.card == "alpha")
        assert alpha.terms["tokens_out"] == pytest.approx(20 if name == "short" else 200, rel=0.5)
    assert chosen == {"short": "alpha", "long": "beta"}
