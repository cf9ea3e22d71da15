"""From OpenAI's request to our query. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from services.gateway.decide import parameters
from shared import messages as m
from shared import reading
from shared.errors import InvalidQuery, NotReady, UnknownModel, Unsupported

ROUTED = ("calm", "auto")
"""Model names that leave the choice to routing."""

_COMMON = (
    "model", "max_tokens", "max_completion_tokens", "stop", "stream", "stream_options", "response_format", "calm",
)  # fmt: skip
_CHAT = (*_COMMON, "messages")
_TEXT = (*_COMMON, "prompt")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_FIELDS = "See docs/http.md for the parameters and their types."


@dataclass(frozen=True)
class Asked:
    """A request as we understand it."""

    query: m.Query
    """Always with an id."""
    stream: bool = False
    """What the client wants; the query streams only where its text can be passed on as it comes."""
    include_usage: bool = False
    json_object: bool = False
    """The content of the answer is to be the JSON alone."""
    own_id: bool = False
    """The client chose the id, so that it can come back for the answer."""


def chat(body: bytes, *, cards: Mapping[str, m.Card], policy: m.Policy | None, new_id: str) -> Asked:
    """A request of `POST /v1/chat/completions`.

    Args:
        body: JSON as received.
        cards: the fleet's, by name; empty while they are not known.
        policy: the fleet's.
        new_id: names the query unless the client does.

    Raises:
        CalmError: InvalidQuery, Unsupported, UnknownModel or NotReady, with the parameter's name in `field`.
    """
    return _asked(_object(body), _CHAT, _chat_input, cards, policy, new_id)


def text(body: bytes, *, cards: Mapping[str, m.Card], policy: m.Policy | None, new_id: str) -> Asked:
    """A request of `POST /v1/completions`; otherwise like `chat`. Its prompt is what the user says."""
    return _asked(_object(body), _TEXT, _text_input, cards, policy, new_id)


def _asked(
    body: dict[str, Any],
    handled: tuple[str, ...],
    read_input: Callable[[dict[str, Any]], dict[str, Any]],
    cards: Mapping[str, m.Card],
    policy: m.Policy | None,
    new_id: str,
) -> Asked:
    parameters.check(body, handled)
    own = parameters.extensions(body)
    fields = {name: body[name] for name in parameters.PASSED_ON if body.get(name) is not None}
    fields |= {"id": new_id, **own, **read_input(body), "stop": _stop(body), "model": model(body.get("model"), cards)}
    if (limit := _limit(body)) is not None:
        fields["max_tokens"] = limit
    stream = _flag(body, "stream")
    json_object = _json_object(body)
    if json_object and "expect" not in own:
        fields["expect"] = {"kind": "json"}
    query = _query(fields, own)
    if json_object and not isinstance(query.expect, m.ExpectJson):
        raise InvalidQuery(
            "`response_format` asks for JSON, and `calm.expect` for something else.", "Leave one of them out.",
            field="response_format",
        )  # fmt: skip
    passed_on = stream and not json_object and not may_be_replaced(query, cards.values(), policy)
    return Asked(
        query=msgspec.structs.replace(query, stream=passed_on),
        stream=stream,
        include_usage=_include_usage(body, stream),
        json_object=json_object,
        own_id="id" in own,
    )


def may_be_replaced(query: m.Query, cards: Collection[m.Card], policy: m.Policy | None) -> bool:
    """Whether another model may be asked after an answer is written, so that no word of it is certain to stay."""
    if query.model is not None:
        return False
    fleet = policy or m.Policy(fleet="")
    if fleet.cascade if query.cascade is None else query.cascade:
        return True
    retries = fleet.retries if query.retries is None else query.retries
    return retries > 0 and (query.expect is not None or any(card.expect is not None for card in cards))


def model(name: Any, cards: Mapping[str, m.Card]) -> str | None:
    """The card that a request names; None where routing chooses.

    Raises:
        CalmError: UnknownModel with what there is, NotReady while that is not known, InvalidQuery for no name at all.
    """
    if name is None or (name in ROUTED and name not in cards):
        return None
    if not isinstance(name, str):
        raise InvalidQuery("`model` is not a string.", "Send `calm`, or the name of a model.", field="model")
    if name in cards:
        return name
    if not cards:
        raise NotReady("The fleet is not ready: its models are not known yet.", "Send the request again in a moment.")
    raise unknown_model(name, cards)


def unknown_model(name: str, cards: Collection[str]) -> UnknownModel:
    """The error for a name that the fleet does not have."""
    near = difflib.get_close_matches(name, cards, 1, 0.5)
    hint = f"Did you mean `{near[0]}`? " if near else ""
    return UnknownModel(
        f"`model` names `{name}`, which this fleet does not have.",
        f"{hint}Send `calm` to let routing choose, or one of {', '.join(sorted(cards))}.",
        field="model",
    )


# --- the parts of a request ---


def _object(body: bytes) -> dict[str, Any]:
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidQuery(f"The body is not valid JSON: {error}.", "Send a JSON object.") from None
    if not isinstance(decoded, dict):
        raise InvalidQuery("The body is not a JSON object.", 'Send {"model": "calm", "messages": [...]}.')
    return decoded


def _query(fields: dict[str, Any], own: Mapping[str, Any]) -> m.Query:
    """Our query, checked by its own types."""
    try:
        return msgspec.convert(fields, m.Query)
    except msgspec.ValidationError as error:
        path = re.search(r"`\$\.([^`]+)`$", str(error))
        field = path[1] if path else ""
        if re.split(r"[.\[]", field)[0] in own:
            field = f"calm.{field}"
        what = str(error).partition(" - at `$")[0]
        remedy = reading.REMEDY if field.startswith("calm.expect") else _FIELDS
        raise InvalidQuery(f"`{field}` cannot be used: {what}.", remedy, field=field) from None


class _Part(msgspec.Struct):
    type: str
    text: str | None = None


class _Message(msgspec.Struct):
    """What is looked at in a message; further fields change nothing (`name`, and what earlier answers brought)."""

    role: str
    content: str | list[_Part] | None = None
    tool_calls: Any = None
    function_call: Any = None


def _chat_input(body: dict[str, Any]) -> dict[str, Any]:
    try:
        turns = msgspec.convert(body.get("messages"), list[_Message])
    except msgspec.ValidationError as error:
        where = re.search(r"`\$(\[[^`]*)`$", str(error))
        field = f"messages{where[1] if where else ''}"
        what = str(error).partition(" - at `$")[0]
        raise InvalidQuery(
            f"`{field}` cannot be used: {what}.", 'Send a list such as [{"role": "user", "content": "Hello"}].',
            field=field,
        ) from None  # fmt: skip
    return {"messages": [_turn(turn, f"messages[{n}]") for n, turn in enumerate(turns)]}


def _turn(turn: _Message, where: str) -> dict[str, str]:
    if turn.role not in _ROLES:
        roles = ", ".join(_ROLES)
        raise Unsupported(f"`{where}.role` is `{turn.role}`.", f"These are understood: {roles}.", field=f"{where}.role")
    for name in ("tool_calls", "function_call"):
        if getattr(turn, name):
            raise Unsupported(f"`{where}.{name}` is not supported.", "Put it into `content`.", field=f"{where}.{name}")
    content = turn.content
    if isinstance(content, list):
        for n, part in enumerate(content):
            if part.type not in ("text", "input_text") or part.text is None:
                raise Unsupported(
                    f"`{where}.content[{n}]` is of type `{part.type}`; these models read text alone.",
                    'Send strings, or parts such as {"type": "text", "text": "..."}.',
                    field=f"{where}.content[{n}]",
                )
        content = "\n".join(part.text or "" for part in content)
    if content is None:
        raise InvalidQuery(f"`{where}.content` is missing.", "Put the text into it.", field=f"{where}.content")
    return {"role": _ROLES[turn.role], "content": content}


def _text_input(body: dict[str, Any]) -> dict[str, Any]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, list) and prompt:
        raise Unsupported("`prompt` is a list of several prompts, or of tokens.", "Send one string.", field="prompt")
    raise InvalidQuery("`prompt` is not a string.", "Put the question into it.", field="prompt")


def _stop(body: dict[str, Any]) -> Any:
    stop = body.get("stop")
    return [] if stop is None else [stop] if isinstance(stop, str) else stop


def _limit(body: dict[str, Any]) -> Any:
    """The newer of its two names counts; both may be given when they agree."""
    new, old = body.get("max_completion_tokens"), body.get("max_tokens")
    if new is not None and old is not None and new != old:
        raise InvalidQuery(
            "`max_tokens` and `max_completion_tokens` differ.", "Leave `max_tokens` out.", field="max_tokens"
        )
    return old if new is None else new


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidQuery(f"`{name}` is neither true nor false.", "Send true or false.", field=name)
    return bool(value)


def _include_usage(body: Mapping[str, Any], stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not stream or not isinstance(options, dict):
        raise InvalidQuery(
            "`stream_options` is for streams, and an object.", 'Send it with "stream": true.', field="stream_options"
        )
    for name in options:
        if name not in ("include_usage", "include_obfuscation"):
            raise Unsupported(
                f"`stream_options.{name}` is not known.", "There is `include_usage`.", field=f"stream_options.{name}"
            )
    return _flag(options, "include_usage")


def _json_object(body: Mapping[str, Any]) -> bool:
    wanted = body.get("response_format")
    if wanted is None:
        return False
    kind = wanted.get("type") if isinstance(wanted, dict) else wanted
    if kind not in ("text", "json_object"):
        raise Unsupported(
            f"`response_format` asks for {kind!r}; there are `text` and `json_object`.",
            'Send {"type": "json_object"} and describe the JSON in the messages; `calm.expect` with {"kind": "json", '
            '"keys": [...]} also says which keys it must have.',
            field="response_format",
        )
    return bool(kind == "json_object")
