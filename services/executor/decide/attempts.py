"""From a plan to an attempt, and from a failed attempt to the next. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shared import messages as m

NOT_WORTH_REPEATING = frozenset({"invalid_query", "prompt_too_large", "cancelled", "deadline_expired"})
"""Failures that another model would meet as well."""


def sampling(query: m.Query, card: m.Card) -> m.Sampling:
    """The query's settings where given, else the card's."""
    return m.Sampling(
        max_tokens=card.max_tokens if query.max_tokens is None else query.max_tokens,
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


def work(planned: m.Planned, cards: Mapping[str, m.Card], rank: int, attempt: int, now: float) -> m.Work:
    """The attempt with the card at `rank` of the route. Raises KeyError when that card has left the fleet."""
    card = cards[planned.route.order[rank]]
    accepted = planned.accepted
    return m.Work(
        query_id=accepted.query_id,
        attempt=attempt,
        rank=rank,
        card=card.name,
        artifact=card.artifact.name,
        adapter=card.adapter,
        prompt_lookup=card.prompt_lookup,
        messages=conversation(accepted.query, card),
        sampling=sampling(accepted.query, card),
        planned=planned,
        stamps=m.stamp(accepted.stamps, dispatched=now),
    )


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


def after_failure(failed: m.AttemptFailed, cards: Mapping[str, m.Card], usable: Callable[[str], bool]) -> int | None:
    """The rank to try after a failed attempt; None when the query has failed for good."""
    if failed.failure.code in NOT_WORTH_REPEATING:
        return None
    start = failed.work.rank + 1
    if failed.failure.code != "context_exceeded":
        return next_rank(failed.work.planned.route, cards, start, usable, failed.work.artifact)
    tried = cards.get(failed.work.card)
    limit = tried.artifact.context if tried else 0
    larger = {name: card for name, card in cards.items() if card.artifact.context > limit}
    return next_rank(failed.work.planned.route, larger, start, usable, failed.work.artifact)
