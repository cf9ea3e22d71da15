"""Admission: whether a query can be taken on, and what is accepted. Pure: no clock, no input or output."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Literal

from shared import messages as m
from shared import reading
from shared.errors import CalmError, InvalidQuery, NotReady, PromptTooLarge, UnknownModel
from shared.settings import format_bytes

_RESERVED = ("calm.", "$")


def check_size(size_bytes: int, limit_bytes: int) -> None:
    """Refuse a message of more than `limit_bytes`.

    Raises:
        PromptTooLarge: names size and limit.
    """
    if size_bytes > limit_bytes:
        raise PromptTooLarge(
            f"The message has {size_bytes} bytes ({format_bytes(size_bytes)}); the limit is {limit_bytes}"
            f" ({format_bytes(limit_bytes)}).",
            "Shorten it, or raise CALM_MAX_PROMPT_BYTES at the monitor.",
        )


def reserved(reply: str) -> bool:
    """Whether a reply subject belongs to the system itself, so that nothing may be sent there for a client."""
    return reply.startswith(_RESERVED)


def check_reply(reply: str) -> None:
    """Refuse a reply subject that belongs to the system itself.

    Raises:
        InvalidQuery: answers sent there would be taken for messages between services.
    """
    if reserved(reply):
        raise InvalidQuery(
            f"The reply subject {reply!r} is reserved.", "Use an inbox, as a NATS client's request does."
        )


def admit(
    query: m.Query,
    *,
    cards: Mapping[str, m.Card] | None,
    new_id: str,
    reply: str,
    encoding: Literal["json", "msgpack"],
    received_at: float,
    accepted_at: float,
) -> m.Accepted:
    """Check a well-formed query against the fleet and make it an accepted one.

    `cards` are the fleet's by name, None while they are not known yet; `new_id` names the query when the
    client did not. Times are Unix seconds.

    Raises:
        CalmError: InvalidQuery, UnknownModel or NotReady, each with a remedy.
    """
    _check_text(query)
    if cards is None:
        raise not_ready()
    _check_models(query, cards)
    _check_tags(query, cards)
    if query.cascade and query.model is not None:
        raise _alone("cascade", query.model)
    if query.expect is not None or query.retries:
        _check_expected(query, cards)
    return m.Accepted(
        query=query,
        query_id=query.id or new_id,
        reply=reply,
        encoding=encoding,
        deadline_at=received_at + query.deadline_s,
        stamps={"received": received_at, "accepted": accepted_at},
    )


def not_ready() -> CalmError:
    """The fleet's cards are not known yet."""
    return NotReady(
        "The fleet is not ready: its models are not in the model store yet.",
        "Wait until `calm models pull` has finished, then send the query again.",
    )


def _check_text(query: m.Query) -> None:
    if (query.prompt is None) == (query.messages is None):
        both = "both `prompt` and `messages`" if query.prompt is not None else "neither `prompt` nor `messages`"
        raise InvalidQuery(f"The query has {both}.", "Give exactly one of them.")
    if query.prompt is not None:
        if not query.prompt.strip():
            raise InvalidQuery("The prompt is empty.", "Put the question into `prompt`.")
    elif not query.messages:
        raise InvalidQuery("`messages` is empty.", "Give at least one message with the role `user`.")
    elif query.messages[-1].role != "user":
        raise InvalidQuery(
            f"The last message has the role `{query.messages[-1].role}`.",
            "End `messages` with what the user asks: role `user`.",
        )
    elif not query.messages[-1].content.strip():
        raise InvalidQuery("The last message is empty.", "Put the question into its `content`.")
    if "" in query.stop:
        raise InvalidQuery("A stop string is empty.", "Leave empty strings out of `stop`.")


def _check_models(query: m.Query, cards: Collection[str]) -> None:
    named = [("model", query.model)] if query.model is not None else []
    named += [("constraints.models", name) for name in query.constraints.models or []]
    named += [("constraints.exclude", name) for name in query.constraints.exclude]
    for field, name in named:
        if name not in cards:
            near = difflib.get_close_matches(name or "", cards, 1, 0.5)
            hint = f"Did you mean `{near[0]}`? " if near else ""
            raise UnknownModel(
                f"`{field}` names `{name}`, which this fleet does not have.",
                f"{hint}It has: {', '.join(sorted(cards))}.",
            )
    if query.constraints.models is not None and not query.constraints.models:
        raise InvalidQuery(
            "`constraints.models` is an empty list, which allows no model.", "Leave it out to allow every model."
        )


def _check_tags(query: m.Query, cards: Mapping[str, m.Card]) -> None:
    known = sorted({tag for card in cards.values() for tag in card.tags})
    for tag in query.constraints.tags:
        if tag not in known:
            raise InvalidQuery(
                f"`constraints.tags` asks for `{tag}`, which no model of this fleet carries.",
                f"The fleet has these tags: {', '.join(known)}." if known else "This fleet uses no tags; leave it out.",
            )


def _check_expected(query: m.Query, cards: Mapping[str, m.Card]) -> None:
    wrong = reading.problem(query.expect) if query.expect is not None else None
    if wrong is not None:
        raise InvalidQuery(*wrong)
    if query.retries and query.expect is None and not any(card.expect for card in cards.values()):
        raise InvalidQuery(
            "`retries` asks for another model when an answer cannot be read; nothing says what is to be read in it.",
            reading.REMEDY,
        )
    if query.retries and query.model is not None:
        raise _alone("retries", query.model)


def _alone(field: str, model: str) -> CalmError:
    return InvalidQuery(
        f"`{field}` asks for another model, and `model` allows `{model}` alone.",
        "Leave `model` out; `constraints.models` names several.",
    )
