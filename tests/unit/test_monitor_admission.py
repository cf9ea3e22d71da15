"""Admission of queries."""

from __future__ import annotations

import msgspec
import pytest

from services.monitor.decide import admission
from shared import codec
from shared import messages as m
from shared.errors import CalmError, InvalidQuery, NotReady, PromptTooLarge, UnknownModel

_SPEC = m.ArtifactSpec(
    name="s-int8", model="s", variant="int8", weights_bytes=1, kv_bytes_per_token=1, slots=1, context=64
)
CARDS = {
    "lawyer": m.Card(name="lawyer", artifact=_SPEC, description="Law", tags=["local"]),
    "doctor": m.Card(name="doctor", artifact=_SPEC, description="Medicine"),
}


def _admit(query: m.Query, cards: dict[str, m.Card] | None = CARDS, **more: object) -> m.Accepted:
    options: dict[str, object] = {
        "new_id": "made-up",
        "reply": "_INBOX.x",
        "encoding": "json",
        "received_at": 100.0,
        "accepted_at": 100.5,
    }
    return admission.admit(query, cards=cards, **{**options, **more})  # type: ignore[arg-type]


def _chat(*turns: tuple[str, str]) -> list[m.ChatMessage]:
    return [m.ChatMessage(role=role, content=content) for role, content in turns]  # type: ignore[arg-type]


def test_a_good_query_is_accepted_with_its_times() -> None:
    """The deadline counts from receipt, and a query without an id gets one."""
    accepted = _admit(m.Query(prompt="hello", deadline_s=30))
    assert accepted.query_id == "made-up"
    assert accepted.deadline_at == 130.0
    assert accepted.stamps == {"received": 100.0, "accepted": 100.5}
    assert accepted.reply == "_INBOX.x"


def test_the_clients_id_is_kept() -> None:
    """A query keeps the id that its client chose."""
    assert _admit(m.Query(prompt="hello", id="mine")).query_id == "mine"


@pytest.mark.parametrize(
    "query",
    [
        m.Query(messages=_chat(("system", "be brief"), ("user", "x"))),
        m.Query(messages=_chat(("user", "x"), ("assistant", "y"), ("user", "z"))),
        m.Query(prompt="x", model="lawyer"),
        m.Query(prompt="x", constraints=m.Constraints(models=["lawyer", "doctor"], exclude=["doctor"], tags=["local"])),
    ],
)
def test_well_formed_queries_pass(query: m.Query) -> None:
    """Conversations, named models and constraints that the fleet knows are accepted unchanged."""
    assert _admit(query).query == query


@pytest.mark.parametrize(
    ("query", "kind", "says"),
    [
        (m.Query(), InvalidQuery, "neither"),
        (m.Query(prompt="x", messages=_chat(("user", "x"))), InvalidQuery, "both"),
        (m.Query(prompt=" \n\t"), InvalidQuery, "empty"),
        (m.Query(messages=[]), InvalidQuery, "empty"),
        (m.Query(messages=_chat(("user", "x"), ("assistant", "y"))), InvalidQuery, "assistant"),
        (m.Query(messages=_chat(("user", "  "))), InvalidQuery, "empty"),
        (m.Query(prompt="x", stop=["a", ""]), InvalidQuery, "stop"),
        (m.Query(prompt="x", model="lawer"), UnknownModel, "lawer"),
        (m.Query(prompt="x", constraints=m.Constraints(models=["nobody"])), UnknownModel, "constraints.models"),
        (m.Query(prompt="x", constraints=m.Constraints(exclude=["nobody"])), UnknownModel, "constraints.exclude"),
        (m.Query(prompt="x", constraints=m.Constraints(models=[])), InvalidQuery, "empty list"),
        (m.Query(prompt="x", constraints=m.Constraints(tags=["moon"])), InvalidQuery, "moon"),
    ],
)
def test_bad_queries_are_refused_with_a_remedy(query: m.Query, kind: type[CalmError], says: str) -> None:
    """Each bad query gets the error of its kind, naming what is wrong and what to change."""
    with pytest.raises(kind, match=says) as caught:
        _admit(query)
    assert type(caught.value) is kind
    assert caught.value.remedy
    assert not caught.value.retryable


def test_an_unknown_model_is_answered_with_the_nearest_and_all() -> None:
    """The remedy suggests what was probably meant and lists the fleet's cards."""
    with pytest.raises(UnknownModel) as caught:
        _admit(m.Query(prompt="x", model="lawer"))
    assert "Did you mean `lawyer`?" in caught.value.remedy
    assert "doctor, lawyer" in caught.value.remedy


def test_an_unknown_tag_is_answered_with_the_known_ones() -> None:
    """The remedy lists the tags in use, or says that there are none."""
    query = m.Query(prompt="x", constraints=m.Constraints(tags=["moon"]))
    with pytest.raises(InvalidQuery) as caught:
        _admit(query)
    assert "local" in caught.value.remedy
    untagged = {"a": msgspec.structs.replace(CARDS["doctor"], tags=[])}
    with pytest.raises(InvalidQuery) as caught:
        _admit(query, untagged)
    assert "no tags" in caught.value.remedy


def test_an_unknown_fleet_is_a_reason_to_try_again() -> None:
    """Before the registry is published a good query gets a retryable error, and a bad one its own error."""
    with pytest.raises(NotReady) as caught:
        _admit(m.Query(prompt="x"), None)
    assert caught.value.retryable
    assert caught.value.remedy
    with pytest.raises(InvalidQuery):
        _admit(m.Query(prompt=""), None)


def test_size_is_checked_at_the_limit() -> None:
    """Exactly the limit passes; one byte more is refused with both figures."""
    admission.check_size(1000, 1000)
    with pytest.raises(PromptTooLarge, match="1001 bytes") as caught:
        admission.check_size(1001, 1000)
    assert "1000" in str(caught.value)
    assert "CALM_MAX_PROMPT_BYTES" in caught.value.remedy


def test_reply_subjects_of_the_system_are_refused() -> None:
    """Answers must not be sent where services would take them for work."""
    admission.check_reply("")
    admission.check_reply("_INBOX.abc")
    for subject in ("calm.queries.new", "$KV.calm_models.x", "$JS.API.STREAM.DELETE.CALM_DONE"):
        with pytest.raises(InvalidQuery) as caught:
            admission.check_reply(subject)
        assert caught.value.remedy


@pytest.mark.parametrize(
    ("query", "says"),
    [
        (m.Query(prompt="x", expect=m.ExpectChoice(of=["A", "a"])), "cannot be told apart"),
        (m.Query(prompt="x", retries=1), "`retries`"),
        (m.Query(prompt="x", retries=1, model="lawyer", expect=m.ExpectNumber()), "`lawyer` alone"),
        (m.Query(prompt="x", cascade=True, model="lawyer"), "`cascade` .* `lawyer` alone"),
    ],
)
def test_expectations_that_cannot_work_are_refused_with_what_to_change(query: m.Query, says: str) -> None:
    with pytest.raises(InvalidQuery, match=says) as refused:
        _admit(query)
    assert refused.value.remedy


def test_retries_need_no_expectation_where_a_card_has_one() -> None:
    cards = {**CARDS, "clerk": m.Card(name="clerk", artifact=_SPEC, description="Forms", expect=m.ExpectJson())}
    assert _admit(m.Query(prompt="x", retries=1), cards).query.retries == 1
    assert _admit(m.Query(prompt="x", retries=0)).query.retries == 0


@pytest.mark.parametrize(
    "expect",
    ['{"kind": "choice"}', '{"kind": "choice", "of": ["A"]}', '{"kind": "regex", "pattern": "(a+)+"}', '"json"',
     '{"kind": "json", "key": ["a"]}', '{"of": ["A", "B"]}'],
)  # fmt: skip
def test_a_malformed_expectation_is_refused_with_all_that_may_be_expected(expect: str) -> None:
    with pytest.raises(InvalidQuery, match="expect") as refused:
        codec.decode_public(f'{{"prompt": "x", "expect": {expect}}}'.encode(), m.Query, "json")
    assert '{"kind": "choice", "of": ["A", "B"]}' in refused.value.remedy
