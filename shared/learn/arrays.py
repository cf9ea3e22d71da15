"""Arrays as plain data, for storing what has been learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray


class Stored(Protocol):
    """A message that says which version of its writer made it."""

    @property
    def version(self) -> str: ...


S = TypeVar("S", bound=Stored)


class Packed(msgspec.Struct, frozen=True):
    """A float64 array: its shape and its bytes, little-endian."""

    shape: tuple[int, ...]
    data: bytes


def pack(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Packed]:
    return {name: Packed(array.shape, np.ascontiguousarray(array, "<f8").tobytes()) for name, array in arrays.items()}


def unpack(packed: Mapping[str, Packed]) -> dict[str, NDArray[np.float64]]:
    """Raises ValueError when an array's bytes do not fit its shape."""
    return {name: np.frombuffer(p.data, "<f8").reshape(p.shape).astype(np.float64) for name, p in packed.items()}


def stored(data: bytes, kind: type[S], version: str, what: str) -> S:
    """What was stored as MessagePack. Raises ValueError, with `what` it should be, for anything else, and for another
    version."""
    try:
        found = msgspec.msgpack.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise ValueError(f"no {what.removeprefix('a ')}: {error}") from None
    if found.version != version:
        raise ValueError(f"{what} of version {found.version!r}, where {version!r} was expected")
    return found
