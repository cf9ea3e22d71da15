"""From OpenAI's requests to our queries."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.decide import parameters
from services.gateway.decide.request import Asked, chat, may_be_replaced, text
from shared import messages as m
from shared.errors import BadRequest, CalmError, NotReady
from tests.samples import card

CARDS = {name: card(name) for name in ("small", "large")}
HELLO = [{"role": "user", "content": "hello"}]


def asked(**body: Any) -> Asked:
    data = msgspec.json.encode({"messages": HELLO, **body})
    return chat(data, cards=CARDS, policy=None, new_id="new")


def refused(**body: Any) -> BadRequest:
    with pytest.raises(BadRequest) as error:
        asked(**body)
    assert error.value.remedy
    return error.value


def test_every_parameter_that_our_query_has_is_carried_over() -> None:
    """Ours and OpenAI's names for the same thing."""
    got = asked(
        model="small", stream=True, stream_options={"include_usage": True}, max_completion_tokens=7, temperature=1,
        top_p=0.5, top_k=3, seed=11, stop="END", metadata={"team": "a"}, user="u", store=True, n=1, tools=None,
        presence_penalty=0, logit_bias={}, logprobs=False, response_format={"type": "text"}, tool_choice="auto",
        calm={"deadline_s": 9, "priority": "lo", "preference": {"latency": 2}, "constraints": {"tags": ["x"]},
              "id": "mine", "expect": {"kind": "number"}},
    )  # fmt: skip
    assert got.query == m.Query(
        messages=[m.ChatMessage(role="user", content="hello")], id="mine", stream=True, model="small", max_tokens=7,
        temperature=1.0, top_p=0.5, top_k=3, seed=11, stop=["END"], metadata={"team": "a"}, deadline_s=9.0,
        priority="lo", preference=m.Preference(latency=2.0), constraints=m.Constraints(tags=["x"]),
        expect=m.ExpectNumber(),
    )  # fmt: skip
    assert (got.stream, got.include_usage, got.json_object, got.own_id) == (True, True, False, True)


def test_nothing_but_messages_leaves_everything_to_the_fleet() -> None:
    """The smallest request is our smallest query with the id at hand."""
    got = asked()
    assert got == Asked(query=m.Query(messages=[m.ChatMessage(role="user", content="hello")], id="new"))


@pytest.mark.parametrize(("name", "card_"), [(None, None), ("calm", None), ("auto", None), ("large", "large")])
def test_a_model_is_a_card_or_routing(name: str | None, card_: str | None) -> None:
    """`calm`, `auto` and none at all leave the choice to routing; a card's name forces that card."""
    assert asked(model=name).query.model == card_


def test_a_card_of_that_name_comes_before_routing() -> None:
    """A fleet may have a card that is called `auto`."""
    body = msgspec.json.encode({"messages": HELLO, "model": "auto"})
    assert chat(body, cards={"auto": card("auto")}, policy=None, new_id="q").query.model == "auto"


def test_unknown_models_are_told_with_what_there_is() -> None:
    """The error names the nearest card and all others; names that no card could have are told the same way."""
    near = refused(model="smal")
    assert (near.code, near.field) == ("unknown_model", "model")
    assert "`small`?" in near.remedy
    assert "calm" in near.remedy
    assert refused(model="org/some.thing").code == "unknown_model"
    assert refused(model=5).code == "invalid_query"
    with pytest.raises(NotReady):
        chat(msgspec.json.encode({"messages": HELLO, "model": "small"}), cards={}, policy=None, new_id="q")


@pytest.mark.parametrize("name", sorted(parameters.REFUSED))
def test_what_would_change_the_answer_is_refused_by_name(name: str) -> None:
    """Neutral values pass, any other is refused with the parameter's name."""
    neutral, _ = parameters.REFUSED[name]
    for value in neutral:
        assert asked(**{name: value}).query == asked().query
    error = refused(**{name: {"odd": 1}})
    assert (error.code, error.field) == ("unsupported", name)


@pytest.mark.parametrize("name", sorted(parameters.IGNORED))
def test_what_is_harmless_is_ignored(name: str) -> None:
    """Whatever its value."""
    assert asked(**{name: {"any": "thing"}}).query == asked().query


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 5.5}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"seed": -1}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
        ({"metadata": {"a": 1}}, "metadata[...]"),
        ({"colour": "red"}, "colour"),
        ({"calm": 5}, "calm"),
        ({"calm": {"colour": "red"}}, "calm.colour"),
        ({"calm": {"model": "small"}}, "calm.model"),
        ({"calm": {"priority": "top"}}, "calm.priority"),
        ({"calm": {"constraints": {"min_quality": 2}}}, "calm.constraints.min_quality"),
        ({"calm": {"constraints": {"colour": 1}}}, "calm.constraints"),
        ({"calm": {"expect": {"kind": "choice", "of": ["A"]}}}, "calm.expect.of"),
        ({"calm": {"id": "a b"}}, "calm.id"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "calm": {"expect": {"kind": "number"}}}, "response_format"),
        ({"messages": "hello"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ],
)
def test_bad_values_are_refused_with_the_name_of_the_parameter(body: dict[str, Any], field: str) -> None:
    """The parameter that a client has to look at, as a path."""
    assert refused(**body).field == field


def test_messages_as_openai_s_clients_send_them() -> None:
    """Parts of text, the developer's role, and an earlier answer sent back with all its fields."""
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "name": "ann"},
        {"role": "assistant", "content": "fine", "refusal": None, "annotations": [], "audio": None, "tool_calls": None},
        {"role": "user", "content": "more"},
    ]
    got = asked(messages=turns).query.messages or []
    assert [(one.role, one.content) for one in got] == [
        ("system", "Be brief."), ("user", "one\ntwo"), ("assistant", "fine"), ("user", "more")
    ]  # fmt: skip


def test_json_is_expected_where_the_format_says_so() -> None:
    """`json_object` expects JSON, with the keys that an extension names; its stream waits for the whole."""
    got = asked(response_format={"type": "json_object"}, stream=True)
    assert (got.query.expect, got.json_object, got.stream, got.query.stream) == (m.ExpectJson(), True, True, False)
    keys = {"expect": {"kind": "json", "keys": ["a"]}}
    got = asked(response_format={"type": "json_object"}, calm=keys)
    assert got.query.expect == m.ExpectJson(keys=["a"])


def test_words_that_may_be_taken_back_are_not_streamed() -> None:
    """Where another model may be asked after an answer, the query is not streamed though its client's answer is."""
    expecting = card("e", expect=m.ExpectNumber())
    plain, fleet = m.Query(prompt="x"), m.Policy(fleet="f")
    retrying, cascading = m.Policy(fleet="f", retries=1), m.Policy(fleet="f", cascade=True)
    assert not may_be_replaced(plain, [], None)
    assert not may_be_replaced(plain, [expecting], fleet)
    assert not may_be_replaced(plain, [card("c")], retrying)
    assert may_be_replaced(plain, [expecting], retrying)
    assert may_be_replaced(plain, [], cascading)
    assert not may_be_replaced(m.Query(prompt="x", model="e"), [expecting], retrying)
    assert not may_be_replaced(m.Query(prompt="x", cascade=False), [], cascading)
    assert may_be_replaced(m.Query(prompt="x", cascade=True), [], fleet)
    assert may_be_replaced(m.Query(prompt="x", retries=1, expect=m.ExpectNumber()), [], fleet)
    body = msgspec.json.encode({"messages": HELLO, "stream": True, "calm": {"cascade": True}})
    got = chat(body, cards=CARDS, policy=fleet, new_id="q")
    assert (got.stream, got.query.stream) == (True, False)


def test_prompts_of_the_older_kind() -> None:
    """A string, or a list of one; several prompts and tokens are refused."""
    for prompt in ("hello", ["hello"]):
        got = text(msgspec.json.encode({"prompt": prompt, "model": "small"}), cards=CARDS, policy=None, new_id="q")
        assert got.query == m.Query(prompt="hello", model="small", id="q")
    for prompt, code in ((["a", "b"], "unsupported"), ([1, 2], "unsupported"), (None, "invalid_query")):
        with pytest.raises(BadRequest) as error:
            text(msgspec.json.encode({"prompt": prompt}), cards=CARDS, policy=None, new_id="q")
        assert (error.value.code, error.value.field) == (code, "prompt")


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"5", b'"x"', b"\xff\xfe", b"[" * 5000])
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    """As bad input, whatever it is."""
    with pytest.raises(BadRequest) as error:
        chat(body, cards=CARDS, policy=None, new_id="q")
    assert error.value.code == "invalid_query"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([
    "model", "messages", "stop", "stream", "stream_options", "response_format", "calm", "max_tokens",
    *parameters.PASSED_ON, *parameters.IGNORED, *parameters.REFUSED,
])  # fmt: skip


@given(
    st.dictionaries(NAMES, JSON, max_size=6), st.dictionaries(st.sampled_from(parameters.EXTENSIONS), JSON, max_size=4)
)
def test_whatever_a_client_sends_it_is_understood_or_refused_in_our_own_way(
    body: dict[str, Any], own: dict[str, Any]
) -> None:
    """Any JSON object gives a query that its own types accept, or a typed error with a remedy."""
    data = msgspec.json.encode({"messages": HELLO, "calm": own, **body})
    try:
        got = chat(data, cards=CARDS, policy=None, new_id="q")
    except CalmError as error:
        assert error.message
        assert error.remedy
    else:
        assert msgspec.convert(msgspec.to_builtins(got.query), m.Query) == got.query
