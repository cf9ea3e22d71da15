"""Where each matrix of a decoder lies in its file, and in which order of rows: as the graph wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.models.families.spec import DecoderSpec
from shared.models.gguf_file import Floats, GgufFile


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor, in an order. Whole rows only, so that it applies to quantised blocks as well."""

    tensor: str
    order: NDArray[np.intp] | None = None
    """None for all, as they lie."""


class Weights:
    """The weights of a decoder as float32, under the names of what they do."""

    def __init__(self, file: GgufFile, spec: DecoderSpec) -> None:
        self.file = file
        self._spec = spec

    def qkv(self, layer: int) -> list[Rows]:
        """q, k and v on top of each other: [heads + 2 x KV heads, head size] rows, to be rotated by halves."""
        prefix, a = f"blk.{layer}.attn_", self._spec.architecture
        if self.file.has(f"{prefix}qkv.weight"):
            return [Rows(f"{prefix}qkv", self._halves(a.heads + a.kv_heads, a.kv_heads))]
        q, k = (self._halves(heads) for heads in (a.heads, a.kv_heads))
        return [Rows(f"{prefix}q", q), Rows(f"{prefix}k", k), Rows(f"{prefix}v")]

    def gate(self, layer: int) -> list[Rows]:
        if self._spec.family.fused_gate_up:
            return [Rows(f"blk.{layer}.ffn_up", np.arange(self._inner(layer)))]
        return [Rows(f"blk.{layer}.ffn_gate")]

    def up(self, layer: int) -> list[Rows]:
        if self._spec.family.fused_gate_up:
            inner = self._inner(layer)
            return [Rows(f"blk.{layer}.ffn_up", np.arange(inner, 2 * inner))]
        return [Rows(f"blk.{layer}.ffn_up")]

    def matrix(self, parts: Sequence[Rows]) -> Floats:
        """[out, in]."""
        return self._joined(parts, "weight")

    def bias(self, parts: Sequence[Rows]) -> Floats | None:
        """[out], or None when the file has none. A part without a bias beside one with it counts as zeros."""
        if not any(self.file.has(f"{part.tensor}.bias") for part in parts):
            return None
        return self._joined(parts, "bias")

    def need(self, name: str) -> Floats:
        value = self.file.weight(name)
        assert value is not None, name
        return value

    def _joined(self, parts: Sequence[Rows], kind: str) -> Floats:
        pieces = []
        for part in parts:
            value = self.file.weight(f"{part.tensor}.{kind}")
            if value is None:
                value = np.zeros(self.file.rows(f"{part.tensor}.weight"), np.float32)
            pieces.append(value if part.order is None else value[part.order])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _inner(self, layer: int) -> int:
        return self.file.rows(f"blk.{layer}.ffn_up.weight") // 2

    def _halves(self, heads: int, behind: int = 0) -> NDArray[np.intp] | None:
        """Order that takes rows stored for rotating neighbours to rows for rotating halves; `behind` more heads
        stay as they are."""
        if not self._spec.family.paired_rotation:
            return None
        size = self._spec.architecture.head_size
        rotated = np.arange(heads * size).reshape(heads, size // 2, 2).swapaxes(1, 2).ravel()
        return np.concatenate([rotated, np.arange(heads * size, (heads + behind) * size)])
