"""Attempts whose answers are not taken, since they cannot be read or are likely wrong: how one is ended, handed on, and
taken after all when nothing better comes. Pure; times are Unix seconds."""

from __future__ import annotations

from msgspec.structs import replace

from shared import messages as m
from shared import reading
from shared.chance import chance

TAIL = 500
"""Characters that are kept of an answer that is not taken: its end, where the answer ought to have been."""
SETTLED = "settled"
"""Stamp of an end that an executor claimed, with an answer that had been handed on."""
UNSURE = "unsure"


def ended(work: m.Work, done: m.Done) -> m.Done:
    """The end of an attempt of which something is expected, whose answer may be handed on, or that follows such a one:
    read, with its chance of being right and with what other attempts took. Where an earlier answer is likelier to be
    right than this one, it is the end of the query with that."""
    answer = done.answer
    if answer is None:
        return done
    if work.expect is not None:
        cut = answer.finish_reason == "length"
        answer = replace(answer, reading=reading.read(answer.text, work.expect, cut=cut))
    if work.cascade is not None:
        answer = replace(answer, chance=_chance(work.cascade, answer))
    done, before = replace(done, answer=answer), work.unread
    if before is None or before.answer is None:
        return done
    own_j, earlier_j = answer.energy.joules, before.answer.energy.joules
    earlier_better = _better(before, done)
    taken, passed = (before, done) if earlier_better else (done, before)
    if taken.answer is None or passed.answer is None:
        return taken
    others = [*before.unread, _unread(passed, passed.answer)]
    energy = m.Energy(
        joules=own_j + earlier_j,
        source="model" if before.answer.energy.estimated else answer.energy.source,
        retried_j=before.answer.energy.retried_j + own_j if earlier_better else earlier_j,
    )
    passed_over = [m.PassedOver(model=o.card, attempt=o.attempt, why=o.why, chance=o.chance) for o in others]
    return replace(taken, answer=replace(taken.answer, energy=energy, passed_over=passed_over), unread=others)


def may_go_on(work: m.Work, done: m.Done) -> bool:
    """Whether another model is to be asked, if the executor finds one: the answer at hand was to be read and cannot be,
    or is likely enough to be wrong."""
    answer, route = done.answer, work.planned.route
    if answer is None or work.rank + 1 >= len(route.order):
        return False
    if unreadable(answer) and work.retries > 0:
        return True
    step = work.cascade
    if step is None or work.rank + 1 >= len(route.cascade) or _agreed(done):
        return False
    return (answer.chance or 0.0) < step.below


def failed(work: m.Work, done: m.Done, at: float, attempt: int | None = None) -> m.AttemptFailed:
    """An answer that is handed on, for an executor to decide what follows; `attempt` is the one that has ended, where
    `done` is the end of an earlier one."""
    answer = done.answer
    if answer is not None and unreadable(answer) and work.retries > 0:
        why = answer.reading.why if answer.reading is not None else ""
        code, message = "unreadable", f"{work.card} gave no readable answer ({why})."
    else:
        sure = answer.chance if answer is not None and answer.chance is not None else 0.0
        code, message = UNSURE, f"After {work.card} the best answer is right with a chance of {sure:.2f}."
    failure = m.Failure(code=code, message=message, retryable=True, id=work.query_id)
    return m.AttemptFailed(
        work=work, failure=failure, worker=done.worker, attempt=done.attempt if attempt is None else attempt, at=at,
        unread=done,
    )  # fmt: skip


def settled(done: m.Done, now: float) -> m.Done:
    """An answer that had been handed on, taken after all: the time since its last token went into later attempts."""
    answer = done.answer
    if answer is None:
        return done
    late_s = max(0.0, now - done.stamps.get("generated", now))
    times = answer.timings
    times = replace(times, retried_s=times.retried_s + late_s, total_s=times.total_s + late_s)
    return replace(done, answer=replace(answer, timings=times))


def taken(done: m.Done) -> list[tuple[str, int, bool, bool | None]]:
    """Every answer that a query's end knows of, the one given last: card, output tokens, whether it was cut off at its
    limit, and whether it could be read (None when nothing was expected of it)."""
    found: list[tuple[str, int, bool, bool | None]] = [
        (one.card, one.tokens_out, one.finish_reason == "length", one.readable) for one in done.unread
    ]
    if (answer := done.answer) is not None:
        readable = None if answer.reading is None else answer.reading.value is not None
        card = done.card or answer.model
        found.append((card, answer.usage.tokens_out, answer.finish_reason == "length", readable))
    return found


def _chance(step: m.CascadeStep, answer: m.Answer) -> float:
    if unreadable(answer):
        return 0.0
    return chance(step.level, step.slope, answer.confidence.mean_logprob)


def unreadable(answer: m.Answer) -> bool:
    """Whether something was expected of it that cannot be read."""
    return answer.reading is not None and answer.reading.value is None


def _better(before: m.Done, now: m.Done) -> bool:
    """Whether the answer at hand before an attempt is likelier to be right than that attempt's. Of two that cannot be
    told apart the later is taken; so is one that says what an earlier one said, whichever is at hand."""
    if before.answer is None or now.answer is None or unreadable(before.answer):
        return False
    if unreadable(now.answer):
        return True
    if now.answer.reading is not None and now.answer.reading.value in _values(before):
        return False
    return (before.answer.chance or 0.0) > (1.0 if now.answer.chance is None else now.answer.chance)


def _agreed(done: m.Done) -> bool:
    """Whether two attempts have been read alike."""
    answer = done.answer
    return answer is not None and answer.reading is not None and answer.reading.value in _values(done)


def _values(done: m.Done) -> set[str]:
    """What was read in attempts that were passed over."""
    return {one.value for one in done.unread if one.value is not None}


def _unread(done: m.Done, answer: m.Answer) -> m.Unread:
    times, cannot = done.stamps, unreadable(answer)
    return m.Unread(
        card=done.card,
        artifact=done.artifact,
        worker=done.worker,
        attempt=done.attempt,
        why=answer.reading.why if cannot and answer.reading is not None else UNSURE,
        tokens_in=answer.usage.tokens_in,
        tokens_out=answer.usage.tokens_out,
        finish_reason=answer.finish_reason,
        energy_j=answer.energy.joules - answer.energy.retried_j,
        seconds=times.get("generated", 0.0) - times.get("dispatched", 0.0),
        text=answer.text[-TAIL:],
        readable=None if answer.reading is None else not cannot,
        value=None if answer.reading is None else answer.reading.value,
        mean_logprob=answer.confidence.mean_logprob,
        chance=answer.chance,
    )
