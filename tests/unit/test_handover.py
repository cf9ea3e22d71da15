"""What leaves the engine's thread."""

from __future__ import annotations

from services.workers.engine.batcher import Delta, Event, Failed
from services.workers.engine.handover import TOGETHER_S, Handover
from shared.errors import EngineFailed


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def end(sequence: str) -> Event:
    return Failed(sequence, EngineFailed("It ended.", "Nothing."))


def test_text_that_nobody_streams_stays() -> None:
    """Nor does the mark of a first token pass; the end does, at once."""
    handover = Handover(lambda sequence: sequence == "streamed", Clock())
    assert handover.pass_on([Delta("quiet", ""), Delta("quiet", "some text")]) == []
    assert handover.pass_on([last := end("quiet")]) == [last]


def test_quick_text_goes_together_and_in_order() -> None:
    """A stream's first text waits for nothing, what follows within `TOGETHER_S` goes with the next, and an end takes
    everything along, whoever's it is."""
    clock = Clock()
    handover = Handover(lambda _: True, clock)
    one, two, three, four = (Delta("a", text) for text in ("one", "two", "three", "four"))
    assert handover.pass_on([one]) == [one]
    clock.now_s += TOGETHER_S / 2
    assert handover.pass_on([two]) == []
    clock.now_s += TOGETHER_S / 2
    assert handover.pass_on([three]) == [two, three]
    clock.now_s += TOGETHER_S / 2
    assert handover.pass_on([four]) == []
    assert handover.pass_on([begun := Delta("b", "begun")]) == [four, begun]
    assert handover.pass_on([four]) == []
    assert handover.pass_on([last := end("b")]) == [four, last]


def test_slow_text_goes_token_by_token() -> None:
    """Steps that take longer than `TOGETHER_S` give each token its own chunk."""
    clock = Clock()
    handover = Handover(lambda _: True, clock)
    for text in "abc":
        clock.now_s += TOGETHER_S
        assert handover.pass_on([delta := Delta("a", text)]) == [delta]


def test_a_sequence_that_begins_again_is_a_new_stream() -> None:
    """After its end, or its cancellation, the first text of the same id is not held back."""
    handover = Handover(lambda _: True, Clock())
    first = Delta("a", "text")
    assert handover.pass_on([first]) == [first]
    handover.forget("a")
    assert handover.pass_on([first]) == [first]
    handover.pass_on([end("a")])
    assert handover.pass_on([first]) == [first]
