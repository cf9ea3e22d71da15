"""Reads safetensors files with numpy alone: a JSON header, then raw little-endian tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import UnsupportedModel

_METADATA = "__metadata__"
_DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "I32": "<i4", "BF16": "<u2"}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file that is mapped into memory: read when `float32` is called, and not kept."""

    name: str
    kind: str
    shape: tuple[int, ...]
    raw: NDArray[np.uint8]

    def float32(self) -> NDArray[np.float32]:
        """The values; BF16 is widened."""
        values: NDArray[Any] = self.raw.view(_DTYPES[self.kind]) if self.raw.size else np.empty(0, np.float32)
        if self.kind == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32).reshape(self.shape)


def mapped(path: Path) -> dict[str, Stored]:
    """Every tensor of the file, by name.

    Raises:
        UnsupportedModel: not a safetensors file, cut off, or a tensor of an unknown type.
    """
    if path.stat().st_size < 8:
        raise UnsupportedModel(f"{path} is not a safetensors file.", "Is the download complete?")
    data: NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    tensors: dict[str, Stored] = {}
    try:
        header = json.loads(data[8:start].tobytes())
        for name, entry in header.items():
            if name == _METADATA:
                continue
            begin, end = entry["data_offsets"]
            if start + end > data.size:
                raise UnsupportedModel(f"{path} is cut off.", "Is the download complete?")
            if entry["dtype"] not in _DTYPES:
                raise UnsupportedModel(
                    f"Tensor {name} of {path.name} is of type {entry['dtype']}.", "F32, F16 and BF16 are read."
                )
            raw = data[start + begin : start + end]
            tensors[name] = Stored(name, entry["dtype"], tuple(int(n) for n in entry["shape"]), raw)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UnsupportedModel(f"{path} is not a safetensors file.", "Is the download complete?") from None
    return tensors


def read(path: Path) -> dict[str, NDArray[np.float32]]:
    """Every tensor of the file as float32.

    Raises:
        UnsupportedModel: see `mapped`.
    """
    return {name: stored.float32() for name, stored in mapped(path).items()}
