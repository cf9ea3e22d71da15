"""From our answer to OpenAI's: whole completions and the chunks of a stream. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from services.gateway.decide.request import ROUTED, Asked
from shared import messages as m

DONE = b"data: [DONE]\n\n"
WAITING = b": waiting\n\n"
"""A comment, so that nobody on the way takes a long wait for a dead connection."""

Kind = Literal["chat", "text"]

_TOLD_OTHERWISE = ("type", "text", "usage", "finish_reason")
_encode = msgspec.json.Encoder().encode


def content(answer: m.Answer, asked: Asked) -> str:
    """The text of an answer; of one that is to be JSON, the JSON that was read in it, if any was."""
    if asked.json_object and answer.reading is not None and answer.reading.value is not None:
        return answer.reading.value
    return answer.text


def usage(answer: m.Answer) -> dict[str, Any]:
    used = answer.usage
    return {
        "prompt_tokens": used.tokens_in,
        "completion_tokens": used.tokens_out,
        "total_tokens": used.tokens_in + used.tokens_out,
        "prompt_tokens_details": {"cached_tokens": used.tokens_cached},
    }


def extension(answer: m.Answer, told: str) -> dict[str, Any]:
    """The object `calm` of an answer: all of it that OpenAI's JSON has no place for; its text, where `told` is not
    that."""
    fields: dict[str, Any] = msgspec.to_builtins(answer)
    return {
        **{name: value for name, value in fields.items() if name not in _TOLD_OTHERWISE},
        **({} if told == answer.text else {"text": answer.text}),
    }


def whole(kind: Kind, answer: m.Answer, asked: Asked, created: int) -> bytes:
    """A completion that is not streamed; `created` is in Unix seconds."""
    told = content(answer, asked)
    choice: dict[str, Any] = {"index": 0, "finish_reason": answer.finish_reason, "logprobs": None}
    if kind == "chat":
        choice["message"] = {"role": "assistant", "content": told, "refusal": None}
    else:
        choice["text"] = told
    return _encode({
        "id": answer.id,
        "object": "chat.completion" if kind == "chat" else "text_completion",
        "created": created,
        "model": answer.model,
        "system_fingerprint": answer.artifact,
        "choices": [choice],
        "usage": usage(answer),
        "calm": extension(answer, told),
    })  # fmt: skip


@dataclass(frozen=True)
class Events:
    """The events of one stream."""

    kind: Kind
    id: str
    created: int
    """Unix seconds."""
    include_usage: bool

    def text(self, text: str, model: str, *, first: bool) -> bytes:
        """A piece of the answer's text."""
        if self.kind == "text":
            return self._event(model, {"index": 0, "text": text, "finish_reason": None, "logprobs": None})
        delta = {"role": "assistant", "content": text} if first else {"content": text}
        return self._event(model, {"index": 0, "delta": delta, "finish_reason": None, "logprobs": None})

    def end(self, answer: m.Answer, told: str) -> bytes:
        """How it ended, what OpenAI's clients ask for with it, and the end of the stream."""
        last: dict[str, Any] = {"index": 0, "finish_reason": answer.finish_reason, "logprobs": None}
        if self.kind == "chat":
            last["delta"] = {}
        else:
            last["text"] = ""
        events = self._event(
            answer.model, last, system_fingerprint=answer.artifact, calm=extension(answer, told)
        )  # fmt: skip
        if self.include_usage:
            events += self._event(answer.model, None, usage=usage(answer))
        return events + DONE

    def _event(self, model: str, choice: dict[str, Any] | None, **more: Any) -> bytes:
        asked_for = {"usage": None} if self.include_usage else {}
        return event({
            "id": self.id,
            "object": "chat.completion.chunk" if self.kind == "chat" else "text_completion",
            "created": self.created,
            "model": model,
            "choices": [] if choice is None else [choice],
            **asked_for,
            **more,
        })  # fmt: skip


def event(body: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(body) + b"\n\n"


def models(cards: Iterable[m.Card]) -> list[dict[str, Any]]:
    """The entries of `/v1/models`: routing first, then the cards by name."""
    cards = sorted(cards, key=lambda card: card.name)
    names = {card.name for card in cards}
    routed = ROUTED[0]
    routing = [] if routed in names else [_entry(routed, {"description": "The fleet: routing chooses the model."})]
    return [*routing, *(_entry(card.name, _facts(card)) for card in cards)]


def _entry(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "calm", "calm": facts}


def _facts(card: m.Card) -> dict[str, Any]:
    return {
        "description": card.description,
        "artifact": card.artifact.name,
        "context": card.artifact.context,
        "max_tokens": card.max_tokens,
        "parameters_b": card.parameters_b,
        "quality": card.quality,
        "domains": card.domains,
        "tags": card.tags,
    }
