"""From a plan to an attempt, and from a failed attempt to the next. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shared import messages as m
from shared.unread import UNSURE

NOT_WORTH_REPEATING = frozenset({"invalid_query", "prompt_too_large", "cancelled", "deadline_expired"})
"""Failures that another model would meet as well."""


def sampling(query: m.Query, card: m.Card, limit: int | None = None) -> m.Sampling:
    """The query's settings where given, else the card's; no more than `limit` tokens where there is one."""
    most = card.max_tokens if query.max_tokens is None else query.max_tokens
    return m.Sampling(
        max_tokens=most if limit is None else min(most, limit),
        temperature=card.temperature if query.temperature is None else query.temperature,
        top_p=card.top_p if query.top_p is None else query.top_p,
        top_k=card.top_k if query.top_k is None else query.top_k,
        seed=query.seed,
        stop=query.stop,
    )


def conversation(query: m.Query, card: m.Card) -> list[m.ChatMessage]:
    """The turns the model reads: the card's system prompt first, unless the query brings its own."""
    turns = list(query.messages or [m.ChatMessage(role="user", content=query.prompt or "")])
    if card.system_prompt and not any(turn.role == "system" for turn in turns):
        return [m.ChatMessage(role="system", content=card.system_prompt), *turns]
    return turns


def work(
    planned: m.Planned,
    cards: Mapping[str, m.Card],
    rank: int,
    attempt: int,
    now: float,
    *,
    first_dispatched: float | None = None,
    unread: m.Done | None = None,
    retries: int = 0,
) -> m.Work:
    """The attempt with the card at `rank` of the route. Raises KeyError when that card has left the fleet.

    Args:
        planned: the query with its route.
        cards: the fleet's.
        rank: index into the route.
        attempt: its number, from 1.
        now: Unix seconds.
        first_dispatched: when the first attempt was dispatched; None for that one.
        unread: how the query ends with what earlier attempts gave, whose answers were handed on.
        retries: the fleet's number, for queries that do not say.
    """
    card = cards[planned.route.order[rank]]
    accepted = planned.accepted
    query = accepted.query
    before = {} if first_dispatched is None else {"first_dispatched": first_dispatched}
    allowed = retries if query.retries is None else query.retries
    left = allowed if unread is None else max(0, allowed - len(unread.unread) - 1)
    expect = query.expect if query.expect is not None else card.expect
    # What is cut off cannot be read, as a rule: so only where that is looked at, and another card can be asked.
    last = expect is None or not left or not any(name in cards for name in planned.route.order[rank + 1 :])
    limit = None if last else planned.route.patience.get(card.name)
    return m.Work(
        query_id=accepted.query_id,
        attempt=attempt,
        rank=rank,
        card=card.name,
        artifact=card.artifact.name,
        adapter=card.adapter,
        prompt_lookup=card.prompt_lookup,
        messages=conversation(accepted.query, card),
        sampling=sampling(query, card, limit),
        planned=planned,
        expect=expect,
        retries=left,
        cascade=planned.route.cascade[rank] if rank < len(planned.route.cascade) else None,
        unread=unread,
        stamps=m.stamp(accepted.stamps, dispatched=now, **before),
    )


def after(failed: m.AttemptFailed, cards: Mapping[str, m.Card], rank: int, now: float, retries: int = 0) -> m.Work:
    """The attempt at `rank` that follows a failed one, and carries on what was had before."""
    before = failed.work
    return work(
        before.planned, cards, rank, failed.attempt + 1, now,
        first_dispatched=before.stamps.get("first_dispatched", before.stamps.get("dispatched")),
        unread=failed.unread or before.unread, retries=retries,
    )  # fmt: skip


def next_rank(
    route: m.Route,
    cards: Mapping[str, m.Card],
    start: int,
    usable: Callable[[str], bool],
    avoid_artifact: str | None = None,
) -> int | None:
    """The first rank from `start` whose card is in the fleet and whose artifact may be used.

    When every remaining artifact rests, the first that exists is taken after all: a try beats a refusal.
    `avoid_artifact` is not taken in any case (it has just failed).
    """
    ranks = [
        rank
        for rank in range(start, len(route.order))
        if route.order[rank] in cards and cards[route.order[rank]].artifact.name != avoid_artifact
    ]
    for rank in ranks:
        if usable(cards[route.order[rank]].artifact.name):
            return rank
    return ranks[0] if ranks else None


def after_failure(
    failed: m.AttemptFailed, cards: Mapping[str, m.Card], usable: Callable[[str], bool], now: float
) -> int | None:
    """The rank to try after a failed attempt; None when the query has failed for good."""
    if failed.failure.code in NOT_WORTH_REPEATING:
        return None
    if failed.unread is not None:
        return after_handed_on(failed, cards, usable, now)
    start = failed.work.rank + 1
    if failed.failure.code != "context_exceeded":
        return next_rank(failed.work.planned.route, cards, start, usable, failed.work.artifact)
    tried = cards.get(failed.work.card)
    limit = tried.artifact.context if tried else 0
    larger = {name: card for name, card in cards.items() if card.artifact.context > limit}
    return next_rank(failed.work.planned.route, larger, start, usable, failed.work.artifact)


def after_handed_on(
    failed: m.AttemptFailed, cards: Mapping[str, m.Card], usable: Callable[[str], bool], now: float
) -> int | None:
    """The rank to ask after an answer that cannot be read or is likely wrong; None when the answer at hand is to be
    taken after all.

    Not a card that would say the same (same model, same words, same settings), nor one whose artifact rests, and none
    when less time is left than this attempt took or, after an answer that is likely wrong, than the route expects of
    the next; there none but those that the route has steps for.
    """
    tried, route = failed.work, failed.work.planned.route
    unsure = failed.failure.code == UNSURE
    took_s = failed.at - tried.stamps.get("dispatched", failed.at)
    accepted = tried.planned.accepted
    if not unsure and (tried.retries < 1 or now + took_s > accepted.deadline_at):
        return None
    query, own = accepted.query, cards.get(tried.card)
    settings = tried.sampling if own is None else sampling(query, own)  # without a limit on its patience
    others = {
        name: card
        for name, card in cards.items()
        if usable(card.artifact.name)
        and (card.artifact.name, card.adapter, conversation(query, card), sampling(query, card))
        != (tried.artifact, tried.adapter, tried.messages, settings)
    }
    rank = next_rank(route, others, tried.rank + 1, usable)
    if not unsure or rank is None:
        return rank
    in_time = rank < len(route.cascade) and now + route.cascade[rank].latency_s <= accepted.deadline_at
    return rank if in_time else None
