"""Attempts whose answers cannot be read: how one is ended, handed on, and taken after all when nothing better comes.
Pure; times are Unix seconds."""

from __future__ import annotations

from msgspec.structs import replace

from shared import messages as m
from shared import reading

TAIL = 500
"""Characters of an unreadable answer that are kept: its end, where the answer ought to have been."""
SETTLED = "settled"
"""Stamp of an end that an executor claimed, with an answer that cannot be read."""


def ended(work: m.Work, done: m.Done) -> m.Done:
    """The end of an attempt of which something is expected, or that follows one: read, with what earlier ones took."""
    answer = done.answer
    if answer is None:
        return done
    if work.expect is not None:
        cut = answer.finish_reason == "length"
        answer = replace(answer, reading=reading.read(answer.text, work.expect, cut=cut))
    before = work.unread
    if before is None or before.answer is None:
        return replace(done, answer=answer)
    earlier, own = before.answer.energy, answer.energy
    energy = m.Energy(
        joules=own.joules + earlier.joules,
        source="model" if earlier.estimated else own.source,
        retried_j=earlier.joules,
    )
    return replace(done, answer=replace(answer, energy=energy), unread=[*before.unread, _unread(before, before.answer)])


def may_go_on(work: m.Work, done: m.Done) -> bool:
    """Whether another model is to be asked, if the executor finds one: this answer was to be read and cannot be."""
    answer = done.answer
    unreadable = answer is not None and answer.reading is not None and answer.reading.value is None
    return unreadable and work.retries > 0 and work.rank + 1 < len(work.planned.route.order)


def failed(work: m.Work, done: m.Done, at: float) -> m.AttemptFailed:
    """An answer that cannot be read, for an executor to decide what follows."""
    why = done.answer.reading.why if done.answer is not None and done.answer.reading is not None else ""
    failure = m.Failure(
        code="unreadable", message=f"{work.card} gave no readable answer ({why}).", retryable=True, id=work.query_id
    )
    return m.AttemptFailed(
        work=work, failure=failure, worker=done.worker, attempt=done.attempt, at=at, unread=done
    )  # fmt: skip


def settled(done: m.Done, now: float) -> m.Done:
    """An answer that was not read, taken after all: the time since its last token went into later attempts."""
    answer = done.answer
    if answer is None:
        return done
    late_s = max(0.0, now - done.stamps.get("generated", now))
    times = answer.timings
    times = replace(times, retried_s=times.retried_s + late_s, total_s=times.total_s + late_s)
    return replace(done, answer=replace(answer, timings=times))


def taken(done: m.Done) -> list[tuple[str, int, bool, bool | None]]:
    """Every answer that a query's end knows of, the last one last: card, output tokens, whether it was cut off at its
    limit, and whether it could be read (None when nothing was expected of it)."""
    found: list[tuple[str, int, bool, bool | None]] = [
        (one.card, one.tokens_out, one.finish_reason == "length", False) for one in done.unread
    ]
    if (answer := done.answer) is not None:
        readable = None if answer.reading is None else answer.reading.value is not None
        card = done.card or answer.model
        found.append((card, answer.usage.tokens_out, answer.finish_reason == "length", readable))
    return found


def _unread(done: m.Done, answer: m.Answer) -> m.Unread:
    times = done.stamps
    return m.Unread(
        card=done.card,
        artifact=done.artifact,
        worker=done.worker,
        attempt=done.attempt,
        why=answer.reading.why if answer.reading is not None else "",
        tokens_in=answer.usage.tokens_in,
        tokens_out=answer.usage.tokens_out,
        finish_reason=answer.finish_reason,
        energy_j=answer.energy.joules - answer.energy.retried_j,
        seconds=times.get("generated", 0.0) - times.get("dispatched", 0.0),
        text=answer.text[-TAIL:],
    )
