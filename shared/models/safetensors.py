"""Reads safetensors files with numpy alone: a JSON header, then raw little-endian tensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.errors import UnsupportedModel

_METADATA = "__metadata__"
_DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "I32": "<i4"}


def read(path: Path) -> dict[str, NDArray[np.float32]]:
    """Every floating-point tensor of the file as float32; BF16 is widened.

    Raises:
        UnsupportedModel: not a safetensors file, or of an unknown type.
    """
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != _METADATA]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UnsupportedModel(f"{path} is not a safetensors file.", "Is the download complete?") from None
    if 8 + size + max(ends, default=0) > len(data):
        raise UnsupportedModel(f"{path} is cut off.", "Is the download complete?")
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, entry in header.items():
        if name == _METADATA:
            continue
        begin, end = entry["data_offsets"]
        raw = data[8 + size + begin : 8 + size + end]
        kind = entry["dtype"]
        if kind == "BF16":
            values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif kind in _DTYPES:
            values = np.frombuffer(raw, _DTYPES[kind]).astype(np.float32)
        else:
            raise UnsupportedModel(f"Tensor {name} of {path.name} is of type {kind}.", "F32, F16 and BF16 are read.")
        tensors[name] = values.reshape(entry["shape"])
    return tensors
