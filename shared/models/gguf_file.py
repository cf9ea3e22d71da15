"""A GGUF file opened for reading: its metadata and its tensors, also when it lies in several parts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import UnsupportedModel

Floats = NDArray[np.float32]

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""How `llama-gguf-split` names the parts of a model."""


class GgufFile:
    """Metadata fields and tensors of a GGUF file; the other parts of a split one are found beside it.

    Raises:
        UnsupportedModel: not a GGUF file, broken off, or parts of it are missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, Any] = {}
        """By name; `shape` is in GGUF's order, the contiguous dimension first."""
        for part in _parts(path):
            fields, tensors = _read(part)
            self.fields = {**fields, **self.fields}
            self.tensors |= tensors
        expected = int(self.fields.get("split.tensors.count", len(self.tensors)))
        if expected != len(self.tensors):
            raise UnsupportedModel(
                f"{path.name} and its parts hold {len(self.tensors)} tensors of {expected}.",
                "Fetch all parts of the model again, or merge them with `llama-gguf-split --merge`.",
            )

    @property
    def architecture(self) -> str:
        """What the file says it is: `llama`, `qwen2` and so on; empty when it says nothing."""
        return str(self.fields.get("general.architecture", ""))

    def value(self, key: str, default: Any = None) -> Any:
        """The field `key` of the file's architecture.

        Raises:
            UnsupportedModel: the file lacks it and there is no default.
        """
        name = f"{self.architecture}.{key}"
        value = self.fields.get(name, default)
        if value is None:
            raise UnsupportedModel(f"{self.path.name} lacks `{name}`.", "Re-convert it with a newer converter.")
        return value

    def has(self, name: str) -> bool:
        return name in self.tensors

    def rows(self, name: str) -> int:
        """How many outputs the matrix `name` has."""
        return int(self.tensors[name].shape[1])

    def weight(self, name: str) -> Floats | None:
        """A tensor as float32 in row-major [out, in], or None when the file has none of that name.

        Raises:
            UnsupportedModel: stored in a format that cannot be read.
        """
        from gguf.quants import dequantize  # noqa: PLC0415 heavy, and only importing needs it

        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise UnsupportedModel(
                f"Tensor {name} is stored as {tensor.tensor_type.name}, which cannot be read.",
                "Use a GGUF in F16, BF16, Q8_0, Q4_0, Q4_1 or a K-quant.",
            ) from None
        return np.asarray(values, dtype=np.float32)


def _parts(path: Path) -> list[Path]:
    """`path`, or all parts of the split model that it belongs to, the first one first."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    parts = [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise UnsupportedModel(
            f"{path.name} is one part of {count}; {missing[0]} is not beside it ({len(missing)} missing).",
            "Put all parts into one folder, or merge them with `llama-gguf-split --merge`.",
        )
    return parts


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from gguf import GGUFReader  # noqa: PLC0415

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, OverflowError, OSError) as error:
        raise UnsupportedModel(f"{path} cannot be read as GGUF ({error}).", "Is the download complete?") from None
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if int(fields.get("split.count", 0)) > 1 and _PART.fullmatch(path.name) is None:
        raise UnsupportedModel(
            f"{path.name} is one part of {fields['split.count']}, and its name does not say which.",
            "Name the parts NAME-00001-of-0000N.gguf again, or merge them with `llama-gguf-split --merge`.",
        )
    return fields, {tensor.name: tensor for tensor in reader.tensors}
