"""Encoding of messages: JSON for people, MessagePack between services."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, TypeVar, cast

import msgspec

from shared import messages as m
from shared import reading
from shared.errors import CalmError, InvalidQuery, by_code

T = TypeVar("T")

CONTENT_TYPE = "Content-Type"
JSON = "application/json"
MSGPACK = "application/msgpack"
RECORD = "Calm-Record"
"""Header of a query's end: what the client's final message does not say of it."""

_pack = msgspec.msgpack.Encoder().encode
_json = msgspec.json.Encoder().encode


@cache
def _unpacker(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind)


@cache
def _json_decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def pack(message: msgspec.Struct) -> bytes:
    """Encode for another service (MessagePack)."""
    return _pack(message)


def unpack(data: bytes, kind: type[T]) -> T:
    """Decode what a service sent. Raises msgspec.ValidationError or msgspec.DecodeError."""
    result: T = _unpacker(cast("Any", kind)).decode(data)
    return result


def to_json(message: Any) -> bytes:
    return _json(message)


def from_json(data: bytes, kind: type[T]) -> T:
    """Decode JSON. Raises msgspec.ValidationError or msgspec.DecodeError."""
    result: T = _json_decoder(cast("Any", kind)).decode(data)
    return result


def pack_done(done: m.Done) -> tuple[bytes, dict[str, str]]:
    """How a query ended: its client's final message, and headers with all the rest, for ourselves."""
    final = done.answer or done.failure
    record = _json(msgspec.structs.replace(done, answer=None, failure=None))
    text = record.decode() if record.isascii() else json.dumps(json.loads(record))
    return encode_public(final, done.encoding) if final is not None else b"", {RECORD: text}


def unpack_done(data: bytes, headers: dict[str, str] | None) -> m.Done:
    """What `pack_done` made. Raises msgspec.ValidationError or msgspec.DecodeError."""
    record = (headers or {}).get(RECORD)
    if record is None:  # of an earlier version
        return unpack(data, m.Done)
    done = from_json(record.encode(), m.Done)
    if not data:
        return done
    decode = unpack if done.encoding == "msgpack" else from_json
    final = decode(data, cast("type[m.Answer | m.Failure]", m.Answer | m.Failure))
    if isinstance(final, m.Failure):
        return msgspec.structs.replace(done, failure=final)
    return msgspec.structs.replace(done, answer=final)


def encode_public(message: msgspec.Struct, encoding: str) -> bytes:
    """Encode for a client, in the encoding it used itself."""
    return _pack(message) if encoding == "msgpack" else _json(message)


def encoding_of(headers: dict[str, str] | None) -> str:
    """`json` or `msgpack`, by the Content-Type header; JSON when there is none.

    Raises:
        InvalidQuery: for another content type.
    """
    value = (headers or {}).get(CONTENT_TYPE, JSON).split(";")[0].strip().lower()
    if value in (JSON, "text/json", "text/plain", ""):
        return "json"
    if value in (MSGPACK, "application/x-msgpack", "application/vnd.msgpack"):
        return "msgpack"
    raise InvalidQuery(f"The {CONTENT_TYPE} header says {value!r}.", f"Send {JSON} (the default) or {MSGPACK}.")


def decode_public(data: bytes, kind: type[T], encoding: str) -> T:
    """Decode a client's message.

    Raises:
        InvalidQuery: undecodable or of the wrong shape; says where and what was expected.
    """
    try:
        return unpack(data, kind) if encoding == "msgpack" else from_json(data, kind)
    except msgspec.ValidationError as error:
        raise InvalidQuery(
            f"The message does not have the right shape: {error}.",
            reading.REMEDY if "`$.expect" in str(error) else "See docs/subjects.md for the fields and their types.",
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidQuery(
            f"The message is not valid {encoding}: {error}.",
            'Send a JSON object, for example {"prompt": "Hello"}.',
        ) from None


def error_of(failure: m.Failure) -> CalmError:
    """The typed error that a Failure stands for."""
    error = by_code(failure.code)(failure.message, failure.remedy)
    error.code = failure.code
    error.retryable = failure.retryable
    return error


def failure_of(error: CalmError, query_id: str = "") -> m.Failure:
    """An error as data for the wire."""
    return m.Failure(
        code=error.code,
        message=error.message,
        remedy=error.remedy,
        retryable=error.retryable,
        id=query_id,
    )
