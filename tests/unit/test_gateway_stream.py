"""What of a streamed answer is passed on to a client that cannot unread it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.decide.telling import Telling
from shared import messages as m
from shared.errors import Restarted


def chunk(text: str, seq: int, attempt: int = 1) -> m.Chunk:
    return m.Chunk(id="q", seq=seq, attempt=attempt, text=text, restarted=seq == 0 and attempt > 1)


def test_text_is_passed_on_as_it_comes_and_the_end_adds_what_is_left() -> None:
    """Chunk by chunk, and nothing twice."""
    telling = Telling()
    assert [telling.heard(chunk(text, n)) for n, text in enumerate(("a", "b", "c"))] == ["a", "b", "c"]
    assert telling.ended("abcd") == "d"
    assert telling.sent == "abcd"


def test_an_attempt_that_says_the_same_again_goes_on_unnoticed() -> None:
    """What was sent is not sent again; the new attempt continues it, wherever its chunks are cut."""
    telling = Telling()
    telling.heard(chunk("The capital", 0))
    assert [telling.heard(chunk(text, n, 2)) for n, text in enumerate(("The ", "capital is", " Paris"))] == [
        "", " is", " Paris"
    ]  # fmt: skip
    assert telling.ended("The capital is Paris.") == "."


def test_an_attempt_that_says_something_else_is_an_error_at_its_first_other_word() -> None:
    """Never two models' words in one answer."""
    telling = Telling()
    telling.heard(chunk("The capital", 0))
    assert telling.heard(chunk("The ", 0, 2)) == ""
    with pytest.raises(Restarted):
        telling.heard(chunk("answer", 1, 2))


def test_an_attempt_that_starts_over_before_anything_was_sent_is_no_matter() -> None:
    """Its text is simply the answer's."""
    telling = Telling()
    assert telling.heard(chunk("x", 0, 3)) == "x"
    assert telling.heard(chunk("late", 1, 2)) == ""
    assert telling.ended("xy") == "y"


def test_an_earlier_answer_taken_after_all_is_an_error_unless_it_continues_what_was_sent() -> None:
    """A final answer may be of another attempt than the last chunk."""
    telling = Telling()
    telling.heard(chunk("second", 0, 2))
    with pytest.raises(Restarted):
        telling.ended("first")


def test_chunks_that_were_lost_are_made_up_for_by_the_final_answer() -> None:
    """After a gap nothing more is passed on until the whole text is there."""
    telling = Telling()
    assert telling.heard(chunk("a", 0)) == "a"
    assert telling.heard(chunk("c", 2)) == ""
    assert telling.heard(chunk("b", 1)) == ""
    assert telling.ended("abcd") == "bcd"


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[m.Chunk], str]:
    """Some attempts, each cut into chunks, some lost, some late, each but the last broken off; the answer's text."""
    texts = draw(st.lists(st.text(alphabet="ab", max_size=6), min_size=1, max_size=3))
    told: list[m.Chunk] = []
    for attempt, whole in enumerate(texts, start=1):
        cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=4)))
        pieces = [p for p in (whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)) if p]
        last = attempt == len(texts)
        kept = pieces if last else pieces[: draw(st.integers(0, len(pieces)))]
        told += [chunk(p, n, attempt) for n, p in enumerate(kept) if draw(st.integers(0, 9))]
    return told, texts[-1]


@given(streams(), st.randoms(use_true_random=False))
def test_whatever_is_lost_or_late_what_was_sent_is_the_answer_or_the_stream_ends_as_an_error(
    stream: tuple[list[m.Chunk], str], random: object
) -> None:
    """All that a client ever reads is a beginning of one attempt's text, and in the end all of the answer's."""
    told, answer = stream
    if len(told) > 1:
        place = random.randrange(len(told) - 1)  # type: ignore[attr-defined]
        told[place], told[place + 1] = told[place + 1], told[place]
    telling, sent = Telling(), ""
    try:
        for one in told:
            sent += telling.heard(one)
        sent += telling.ended(answer)
    except Restarted:
        assert not answer.startswith(sent) or any(one.attempt > 1 for one in told)
    else:
        assert sent == answer == telling.sent
