"""Reading answers: what counts as readable, what does not, and that nothing makes it fail or slow."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import messages as m
from shared.reading import problem, read

LETTERS = m.ExpectChoice(of=["A", "B", "C", "D"])
WORDS = m.ExpectChoice(of=["yes", "no", "not sure"])


@pytest.mark.parametrize(
    ("text", "value", "why"),
    [
        ("The answer is (C).", "C", "announced"),
        ("Let us think. First A is wrong. The answer is (A). Wait: the correct answer is **B**", "B", "announced"),
        ("**Answer:** C) Paris", "C", "announced"),
        (r"So the final answer is $\boxed{\text{D}}$.", "D", "announced"),
        ("The answer is option (B), since", "B", "announced"),
        ("C", "C", "alone"),
        (" **(D)**.\n", "D", "alone"),
        ("Paris is the capital.\n\nC", "C", "only"),
        ("I would take option B here.", "B", "only"),
        ("It must be (A), as a matter of course.", "A", "only"),
        ("The answer is not A.", None, "nothing"),
        ("A good question about vitamin C and plan B", None, "nothing"),
        ("A) no\nB) yes", None, "several"),
        ("the answer is a matter of taste", None, "nothing"),
        ("", None, "nothing"),
    ],
)
def test_letters_are_found_where_they_are_announced_or_marked(text: str, value: str | None, why: str) -> None:
    assert read(text, LETTERS) == m.Reading(value=value, why=why)


@pytest.mark.parametrize(
    ("text", "value", "why"),
    [
        ("YES", "yes", "alone"),
        ("Yes, because nobody said no.", "yes", "first"),
        ("Not sure: it depends.", "not sure", "first"),
        ("I think so, yes", "yes", "only"),
        ("It is neither yes nor no", None, "several"),
        ("No one knows", "no", "only"),
        ("Yesterday", None, "nothing"),
        ("Answer: not sure, or yes", "not sure", "announced"),
    ],
)
def test_longer_choices_are_found_as_whole_words_in_any_case(text: str, value: str | None, why: str) -> None:
    assert read(text, WORDS) == m.Reading(value=value, why=why)


@pytest.mark.parametrize(
    ("text", "value", "why"),
    [
        ("5 and 7 make 12.\n#### 12", "12", "announced"),
        ("The answer is $1,234.50 in all, of 3 parts", "1234.50", "announced"),
        ("The answer is -5", "-5", "announced"),
        ("It costs 3 dollars, so 5 pens cost 10 dollars", "10", "last"),
        ("from 3-5", "5", "last"),
        ("about 1e-3", "1e-3", "last"),
        ("version v2", None, "nothing"),
        ("1,2345", "2345", "last"),
    ],
)
def test_a_number_is_the_announced_one_else_the_last(text: str, value: str | None, why: str) -> None:
    assert read(text, m.ExpectNumber()) == m.Reading(value=value, why=why)


@pytest.mark.parametrize(
    ("text", "keys", "value", "why"),
    [
        (' {"a": 1}\n', ["a"], '{"a": 1}', "whole"),
        ('Here it is:\n```json\n{"a": [1]}\n```\nDone.', [], '{"a": [1]}', "fenced"),
        ('Sure! {"a": {"b": 2}} I hope', ["a"], '{"a": {"b": 2}}', "within"),
        ('{"b": 1}', ["a"], None, "keys_missing"),
        ("[1, 2]", ["a"], None, "keys_missing"),
        ("42", [], None, "no_json"),
        ('{"a": 1', [], None, "no_json"),
        ("null", [], None, "no_json"),
        ('{"a": NaN}', [], None, "no_json"),
    ],
)
def test_json_is_the_whole_answer_or_one_object_in_it(text: str, keys: list[str], value: str | None, why: str) -> None:
    assert read(text, m.ExpectJson(keys=keys)) == m.Reading(value=value, why=why)


def test_an_answer_that_was_cut_off_counts_only_for_what_it_had_said() -> None:
    """Half of a line of reasoning names numbers and choices that are no answer."""
    assert read("First, 3 times 4 is", m.ExpectNumber(), cut=True).why == "cut_off"
    assert read("Take (A): it would be", LETTERS, cut=True).why == "cut_off"
    assert read("The answer is (A) because", LETTERS, cut=True).value == "A"
    assert read("The answer is 4, for", m.ExpectNumber(), cut=True).value == "4"
    assert read('{"a": 1, "b": ', m.ExpectJson(), cut=True).value is None


def test_pieces_of_text_are_found_in_any_case() -> None:
    expect = m.ExpectContains(any_of=["SELECT ", "with "])
    assert read("```sql\nselect 1\n```", expect) == m.Reading(value="SELECT ", why="contained")
    assert read("I cannot.", expect) == m.Reading(value=None, why="nothing")


WORD = st.text(min_size=1, max_size=12)
EXPECTS = st.one_of(
    st.builds(m.ExpectChoice, of=st.lists(WORD, min_size=2, max_size=8)),
    st.just(m.ExpectNumber()),
    st.builds(m.ExpectJson, keys=st.lists(st.text(max_size=4), max_size=3)),
    st.builds(m.ExpectContains, any_of=st.lists(WORD, min_size=1, max_size=4)),
)
PIECES = st.lists(
    st.one_of(
        st.text(max_size=10),
        st.sampled_from(["the answer is ", "(A)", "**B**", "#### ", "-1,234.5", "```json\n", "```", "{", "}", "[",
                         "\\boxed{", "answer", " ", "\n", "yes", '"a": 1', "\ud800", "\x00", "İ"]),
    ),
    max_size=30,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(pieces=PIECES, expect=EXPECTS, cut=st.booleans())
def test_reading_never_fails_and_finds_only_what_is_there(pieces: list[str], expect: m.Expect, cut: bool) -> None:
    text = "".join(pieces)
    found = read(text, expect, cut=cut)
    assert found.why
    if found.value is None:
        return
    if isinstance(expect, m.ExpectChoice):
        assert found.value in expect.of
        assert problem(expect) or found.value.lower() in text.lower()
    elif isinstance(expect, m.ExpectNumber):
        float(found.value)
    elif isinstance(expect, m.ExpectJson):
        assert found.value in text
        value = msgspec.json.decode(found.value)
        assert all(key in value for key in expect.keys)
    else:
        assert found.value in expect.any_of


@pytest.mark.parametrize(("of", "said"), [(["=", "0"], "="), (["-x", "x + 1"], "-x"), (["the", "a"], "the")])
def test_a_choice_that_looks_like_punctuation_is_read(of: list[str], said: str) -> None:
    assert read(f"Well. The answer is: {said}\nand so on", m.ExpectChoice(of=of)).value == said
    assert read(f"The answer is = {of[1]}", m.ExpectChoice(of=of)).value == of[1]


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=8), data=st.data())
def test_an_announced_choice_is_read_whatever_it_is(words: list[str], data: st.DataObject) -> None:
    expect = m.ExpectChoice(of=words)
    if problem(expect) is not None:
        return
    word = data.draw(st.sampled_from(words))
    assert read(f"Well. The answer is: {word}\nand so on", expect).value is not None


@pytest.mark.parametrize(
    "piece", ["answer is ", "####", "[", "{", "```", "(A", "**", "1,", " ", "\\boxed{", "answer    "]
)
@pytest.mark.parametrize("expect", [LETTERS, WORDS, m.ExpectNumber(), m.ExpectJson(keys=["a"])])
def test_answers_made_to_be_slow_are_not(piece: str, expect: m.Expect) -> None:
    """Half a million characters of what a bad pattern takes for ever over; the test's own time-out is the bound."""
    read(piece * (500_000 // len(piece)), expect)


@pytest.mark.parametrize(
    ("expect", "says"),
    [
        (m.ExpectChoice(of=["A", "a"]), "`A` and `a`"),
        (m.ExpectChoice(of=["(A)", "(B)"]), "`(A)`"),
        (m.ExpectChoice(of=["yes", " "]), "empty"),
        (m.ExpectContains(any_of=["  "]), "empty"),
    ],
)
def test_what_cannot_work_is_said(expect: m.Expect, says: str) -> None:
    found = problem(expect)
    assert found is not None
    assert says in found[0]
    assert found[1]


def test_what_can_work_has_no_problem() -> None:
    for expect in (LETTERS, WORDS, m.ExpectNumber(), m.ExpectJson(keys=["a"]), m.ExpectContains(any_of=["x"])):
        assert problem(expect) is None
