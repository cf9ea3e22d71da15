"""Profiles and symptoms."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from services.analyzer.decide import profile, symptoms
from services.analyzer.decide.domains import DOMAINS
from services.analyzer.tokens import TokenCounter
from shared import messages as m
from tests.samples import card

EAST, NORTH = np.array([1, 0], np.float32), np.array([0, 1], np.float32)


def test_affinity_prefers_the_card_whose_examples_are_near() -> None:
    """The nearest exemplars count most; a card without exemplars is judged by its description."""
    cards = {
        "near": np.stack([NORTH, EAST, EAST]),
        "far": np.stack([NORTH, NORTH, NORTH]),
        "bare": np.stack([EAST]),
    }
    known = profile.references(cards, {})
    found = profile.affinities(profile.similarities(EAST, known), known)
    assert found["near"] > found["far"]
    assert found["bare"] == 1.0


def test_only_the_nearest_exemplars_count() -> None:
    """A broad card is not punished for the exemplars that are far from this query."""
    narrow, broad = np.stack([NORTH, EAST, EAST, EAST]), np.stack([NORTH, EAST, EAST, EAST, NORTH, NORTH])
    known = profile.references({"narrow": narrow, "broad": broad}, {})
    found = profile.affinities(profile.similarities(EAST, known), known)
    assert found["narrow"] == found["broad"]


def test_domains_are_a_distribution_led_by_the_nearest() -> None:
    """Probabilities sum to one, and the domain whose prototypes are nearest leads."""
    known = profile.references({"c": np.stack([NORTH])}, {"a": np.stack([EAST]), "b": np.stack([NORTH])})
    found = profile.domains(profile.similarities(EAST, known), known)
    assert abs(sum(found.values()) - 1.0) < 1e-3
    assert found["a"] > 0.99


def test_a_profile_holds_what_the_planner_needs() -> None:
    """The embedding travels as float32 bytes; tokens and affinities are by name."""
    result = profile.make_profile(
        text="2 + 2",
        embedding=EAST,
        known=profile.references({"c": np.stack([EAST])}, {"mathematics": np.stack([EAST])}),
        tokens_in={"m": 3},
        tokens_out=40.0,
    )
    assert np.array_equal(np.frombuffer(result.embedding, "<f4"), EAST)
    assert result.affinity == {"c": 1.0}
    assert result.tokens_in == {"m": 3}
    assert 0.0 < result.difficulty <= 1.0


def test_the_text_of_a_conversation_is_its_user_turns() -> None:
    """The embedding reads the user's turns, newest first; token counts read every turn."""
    turns = [
        m.ChatMessage(role="system", content="s"),
        m.ChatMessage(role="user", content="one"),
        m.ChatMessage(role="assistant", content="a"),
        m.ChatMessage(role="user", content="two"),
    ]
    assert profile.query_text(m.Query(messages=turns)) == "two\none"
    assert profile.full_text(m.Query(messages=turns)) == "s\none\na\ntwo"


def test_every_domain_has_prototypes() -> None:
    """Each domain that cards may score has sentences to be recognised by."""
    labelled = profile.prototype_texts()
    assert {domain for domain, _ in labelled} == set(DOMAINS)


def test_symptoms_name_slow_cards_and_lost_workers() -> None:
    """A p95 over the objective, on enough answers, and a worker that is gone, are each reported."""
    slow = m.CardQos(card="slow", answered=30, latency_p95_s=9.0)
    few = m.CardQos(card="few", answered=3, latency_p95_s=9.0)
    policy = m.Policy(fleet="f", latency_slo_s=5.0)
    found = symptoms.find(m.Qos(cards=[slow, few]), policy, frozenset({"w1", "w2"}), frozenset({"w2"}), 1.0)
    assert [(s.kind, s.subject) for s in found] == [("slo_violation", "slow"), ("worker_lost", "w1")]


def test_tokens_are_estimated_only_where_no_context_can_be_exceeded(tmp_path: Path) -> None:
    """What fits whatever its tokens are is estimated from its length; what may not fit is counted."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({**alphabet, "ab": 256}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    (tmp_path / "m").mkdir()
    tokenizer.save(str(tmp_path / "m" / "tokenizer.json"))
    one = card("c")
    one = msgspec.structs.replace(one, artifact=msgspec.structs.replace(one.artifact, model="m", context=100))
    counter = TokenCounter(tmp_path, sample="ab" * 50 + "x" * 50)  # 100 tokens of 150 bytes
    counter.use([one])
    assert counter.count("ab" * 30) == {"m": 40}  # 60 bytes at 1.5 a token; 30 in truth
    assert counter.count("ab" * 50) == {"m": 50}  # as many bytes as the context has tokens
    assert counter.count("ä" * 20) == {"m": 40}
    assert counter.count("x" * 1000) == {"m": 1000}
