"""The attention nodes of a decoder graph: rotation, norms of q and k, windows and soft caps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto

from shared.models.families.spec import DecoderSpec, Rope
from shared.models.families.weights import Weights

_MS = "com.microsoft"
_TABLES_BYTES = 16 * 2**20
"""Above this, sines and cosines are computed for the positions of a step instead of being kept for all positions:
they would take 67 MB for 131,072 positions of a head of 128, 134 MB for those of a Gemma 3."""

Node = Callable[..., str]
Init = Callable[..., str]


class Attention:
    """Emits a decoder's attention, layer by layer, through the graph's `node` and `init`.

    Queries come scaled, out of weights that are (`qkv_factors`) or out of their norm: scores that need no factor let
    ONNX Runtime multiply a single query with the keys as a vector, where it otherwise packs them for each head anew
    (docs/decisions/0025). In half precision, which small weights might leave, the operator scales.

    q and k are rotated inside GroupQueryAttention, from tables, where that suffices. They are rotated by nodes of
    their own when they are normalised before it (on the CPU the operator refuses its inputs for that), when the
    tables would be large, or when the factors depend on the context. Nodes of their own cost 2 % of the decode rate
    (SmolLM2-135M int8, 2 threads, batch 1: 115.0 against 117.7 tokens/s).
    """

    def __init__(self, spec: DecoderSpec, weights: Weights, node: Node, init: Init, *, half: bool) -> None:
        self._spec = spec
        self._weights = weights
        self._node = node
        self._init = init
        self._half = half
        a = spec.architecture
        fits = all(rope.beyond is None and rope.inverse.size % 8 == 0 for rope in spec.ropes.values())
        widths = np.array([a.heads, 2 * a.kv_heads]) * a.head_size
        scaled = np.repeat(np.array([spec.attention_scale, 1.0], np.float32), widths)
        self.qkv_factors = None if half or spec.family.qk_norm else scaled
        """What the outputs of a layer's projection to q, k and v are to be multiplied by; None for ones."""
        self._inside = not spec.family.qk_norm and fits and a.head_size % 16 == 0 and spec.tables_bytes <= _TABLES_BYTES

    def prepare(self) -> None:
        """What all layers share; to be called before the first of them."""
        if not self._inside:
            self._positions()
        for name, rope in self._spec.ropes.items():
            cos, sin = _names(name)
            if self._inside:
                angles = np.outer(np.arange(self._spec.architecture.context), rope.inverse).astype(np.float32)
                self._init(cos, (np.cos(angles) * rope.magnitude).astype(np.float32))
                self._init(sin, (np.sin(angles) * rope.magnitude).astype(np.float32))
            else:
                self._sines(name, rope)

    def layer(self, index: int, qkv: str) -> str:
        """Attention of layer `index` over `qkv` [batch, seq, (heads + 2 x KV heads) x head size]."""
        spec, a, p = self._spec, self._spec.architecture, f"layer{index}"
        layer = spec.layers[index]
        past = [f"past_key_values.{index}.{side}" for side in ("key", "value")]
        present = [f"present.{index}.{side}" for side in ("key", "value")]
        extra: dict[str, Any] = {"rotary_interleaved": 0} if self._inside else {}
        if layer.window:
            extra["local_window_size"] = layer.window
        if spec.attention_softcap:
            extra["softcap"] = spec.attention_softcap
        cos_sin = list(_names(layer.rope))
        inputs = [qkv, "", ""] if self._inside else self._rotated(index, qkv, cos_sin)
        return self._node(
            "GroupQueryAttention",
            [*inputs, *past, "seqlens_k", "total_sequence_length", *(cos_sin if self._inside else [])],
            [f"{p}.attended", *present], _MS,
            num_heads=a.heads, kv_num_heads=a.kv_heads, do_rotary=int(self._inside),
            scale=spec.attention_scale if self._half else 1.0, **extra,
        )  # fmt: skip

    def _rotated(self, index: int, qkv: str, cos_sin: list[str]) -> list[str]:
        """q, k and v of a layer, q and k normalised where the family does so, and rotated."""
        spec, a, p = self._spec, self._spec.architecture, f"layer{index}"
        widths = np.array([a.heads, a.kv_heads, a.kv_heads], np.int64) * a.head_size
        self._node("Split", [qkv, self._init(f"{p}.widths", widths)], [f"{p}.{side}" for side in "qkv"], axis=-1)
        rotated = []
        for side, heads in (("q", a.heads), ("k", a.kv_heads)):
            x = f"{p}.{side}"
            if self._spec.family.qk_norm:
                scale = spec.attention_scale if side == "q" and not self._half else 1.0
                x = self._normed(x, f"blk.{index}.attn_{side}_norm.weight", heads, scale)
            part = 2 * next(iter(self._spec.ropes.values())).inverse.size
            partial = {"rotary_embedding_dim": part} if part != a.head_size else {}
            turned = self._node(
                "RotaryEmbedding", [x, "rotation.ids", *cos_sin], [f"{p}.{side}.rotated"], _MS,
                num_heads=heads, **partial,
            )  # fmt: skip
            rotated.append(turned)
        return [*rotated, f"{p}.v"]

    def _normed(self, x: str, gain: str, heads: int, scale: float) -> str:
        """x with each head normalised, times `scale`."""
        a = self._spec.architecture
        apart = self._node(
            "Reshape", [x, self._init(f"{x}.apart", np.array([0, 0, heads, a.head_size], np.int64))], [f"{x}.heads"]
        )
        gains = self._init(f"{x}.gain", self._weights.need(gain).ravel() * np.float32(scale))
        normed = self._node(
            "SimplifiedLayerNormalization", [apart, gains], [f"{x}.norm"],
            epsilon=self._spec.epsilon, axis=-1, stash_type=1,
        )  # fmt: skip
        flat = np.array([0, 0, heads * a.head_size], np.int64)
        return self._node("Reshape", [normed, self._init(f"{x}.together", flat)], [f"{x}.normed"])

    def _positions(self) -> None:
        """`rotation.at` float32 [batch, seq, 1]: place of each token in its sequence; `rotation.ids` int64
        [batch, seq]: its row in this step's sines and cosines."""
        node, init = self._node, self._init
        one, zero = (init(f"rotation.{name}", np.array(n, np.int64)) for name, n in (("one", 1), ("zero", 0)))
        first, last = (init(f"rotation.{name}", np.array([n], np.int64)) for name, n in (("first", 1), ("last", -1)))
        shape = node("Shape", ["input_ids"], ["rotation.shape"])
        length = node("Gather", [shape, one], ["rotation.length"], axis=0)
        end = node("Cast", ["seqlens_k"], ["rotation.end"], to=TensorProto.INT64)
        before = node("Sub", [node("Add", [end, one], ["rotation.total"]), length], ["rotation.before"])
        steps = node("Range", [zero, length, one], ["rotation.steps"])
        places = node("Add", [node("Unsqueeze", [before, first], ["rotation.column"]), steps], ["rotation.places"])
        at = node("Cast", [places], ["rotation.float"], to=TensorProto.FLOAT)
        node("Unsqueeze", [at, last], ["rotation.at"])
        count = node("ReduceProd", [shape], ["rotation.count"], keepdims=0)
        ids = node("Range", [zero, count, one], ["rotation.all"])
        node("Reshape", [ids, shape], ["rotation.ids"])

    def _sines(self, name: str, rope: Rope) -> None:
        """Cosines and sines [batch x seq, rotated / 2] of this step's positions."""
        inverse = self._init(f"rotation.{name}.inverse", rope.inverse.astype(np.float32), exact=True)
        if rope.beyond is not None:
            inverse = self._by_capacity(name, rope, inverse)
        angles = self._node("Mul", ["rotation.at", inverse], [f"rotation.{name}.angles"])
        flat = self._init(f"rotation.{name}.flat", np.array([-1, rope.inverse.size], np.int64))
        angles = self._node("Reshape", [angles, flat], [f"rotation.{name}.rows"])
        for operator, made in zip(("Cos", "Sin"), _names(name), strict=True):
            steps: list[tuple[str, list[str], dict[str, Any]]] = [(operator, [], {})]
            if rope.magnitude != 1.0:
                by = self._init(f"{made}.magnitude", np.array(rope.magnitude, np.float32), exact=True)
                steps.append(("Mul", [by], {}))
            if self._half:  # angles reach the length of the context: only what comes of them fits into half precision
                steps.append(("Cast", [], {"to": TensorProto.FLOAT16}))
            x = angles
            for step, (name_of, more, attributes) in enumerate(steps, 1):
                x = self._node(name_of, [x, *more], [made if step == len(steps) else f"{made}.{step}"], **attributes)

    def _by_capacity(self, name: str, rope: Rope, short: str) -> str:
        """The frequencies for the cache's size. Chosen by what a slot can hold and not by what it holds, so that a
        sequence keeps one rotation for life: its cached keys have been rotated already."""
        assert rope.beyond is not None
        node, p = self._node, f"rotation.{name}"
        shape = node("Shape", ["past_key_values.0.key"], [f"{p}.cache"])
        capacity = node("Gather", [shape, self._init(f"{p}.axis", np.array(2, np.int64))], [f"{p}.capacity"], axis=0)
        original = self._init(f"{p}.original", np.array(rope.original, np.int64))
        longer = node("Greater", [capacity, original], [f"{p}.longer"])
        long = self._init(f"{p}.beyond", rope.beyond.astype(np.float32), exact=True)
        return node("Where", [longer, long, short], [f"{p}.chosen"])


def _names(rope: str) -> tuple[str, str]:
    return ("cos", "sin") if rope == "global" else (f"cos.{rope}", f"sin.{rope}")
