"""What the graph builder needs to know: a family's traits as data, and a decoder with every number filled in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shared.models.manifest import Architecture

Angles = NDArray[np.float64]
Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class Family:
    """How the models of one architecture differ from a plain llama, as its GGUF files store them."""

    name: str
    """`general.architecture` of its files."""
    models: str
    """Well-known models of the family, for messages and documents."""
    paired_rotation: bool = False
    """Rows of q and k are stored for rotating neighbours; otherwise for rotating halves."""
    fused_gate_up: bool = False
    """`ffn_up` holds gate, then up."""
    biases: Literal["none", "qkv", "optional"] = "none"
    """Linear layers with a bias: none, q, k and v, or whichever the file has one for."""
    qk_norm: bool = False
    """Each head of q and k is normalised before it is rotated."""
    post_norms: bool = False
    """What attention and feed-forward give is normalised before it is added to the residual."""
    activation: Activation = "silu"
    scaled_embedding: bool = False
    """Embeddings are multiplied with the root of the hidden size."""
    separate_head: bool = True
    """The file may hold an output head of its own."""
    sliding_window: Literal["none", "all", "alternating"] = "none"
    """Layers that see a window only: none (then a file that asks for one is refused), all, or some of them."""
    window_period: int = 1
    """With `alternating`: every so many layers, the last of them sees everything."""
    window_default: int = 0
    """Window of a file that does not say, in tokens; 0 for none."""
    window_rope_base: float | None = None
    """Rotation base of the layers with a window, when it differs from that of the others."""
    long_rope: bool = False
    """May have two sets of rotation factors, for short and long contexts."""
    overflows_half: bool = False
    """Sums of its residual pass what float16 can hold: published as bfloat16, not to be run in half precision."""
    wide_scale_layers: int | None = None
    """A model of so many layers scales attention by hidden / heads instead of the head size."""


@dataclass(frozen=True)
class Rope:
    """Rotation of positions: angle = position x inverse frequency."""

    inverse: Angles
    """[rotated / 2]."""
    magnitude: float = 1.0
    """Sines and cosines are multiplied with this."""
    beyond: Angles | None = None
    """Inverse frequencies for a cache of more than `original` tokens, when they are others."""
    original: int = 0
    """Tokens of context that the model was first made for."""


@dataclass(frozen=True)
class Layer:
    window: int
    """Tokens that a token sees, itself among them; 0 for all."""
    rope: str
    """Which of the decoder's `ropes` it rotates by."""


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder, fully described apart from its weights."""

    architecture: Architecture
    family: Family
    epsilon: float
    attention_scale: float
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    layers: tuple[Layer, ...]
    ropes: dict[str, Rope] = field(default_factory=dict)
    """By the names that layers use."""

    @property
    def tables_bytes(self) -> int:
        """Size of tables of all sines and cosines, one pair for each rotation."""
        rows = self.architecture.context
        return sum(2 * 4 * rows * rope.inverse.size for rope in self.ropes.values())
