"""Rotation frequencies of a decoder, from its file's metadata and factor tensors."""

from __future__ import annotations

import math

import numpy as np

from shared.errors import UnsupportedModel
from shared.models.families.spec import Angles, Family, Rope
from shared.models.gguf_file import GgufFile


def ropes(file: GgufFile, family: Family, rotated: int, *, windows: bool) -> dict[str, Rope]:
    """The rotations that layers name: `global`, and `window` for layers with a window when theirs is another.

    Raises:
        UnsupportedModel: scaled in a way that is not known, by its name.
    """
    base = float(file.value("rope.freq_base", 10000.0))
    made = {"global": _scaled(file, family, _inverse(base, rotated))}
    if windows and family.window_rope_base is not None:
        own = float(file.value("rope.freq_base_swa", family.window_rope_base))
        made["window"] = Rope(_inverse(own, rotated))
    return made


def _inverse(base: float, rotated: int) -> Angles:
    return np.asarray(1.0 / (base ** (np.arange(0, rotated, 2, dtype=np.float64) / rotated)))


def _scaled(file: GgufFile, family: Family, inverse: Angles) -> Rope:
    kind = str(file.value("rope.scaling.type", "none"))
    long, short = (file.weight(f"rope_factors_{length}.weight") for length in ("long", "short"))
    if kind not in ("none", "linear", "longrope") or (kind == "longrope" and long is None):
        raise UnsupportedModel(
            f"Rope scaling {kind!r} is not supported.",
            "Use a conversion of the model without it: it is only needed for very long contexts.",
        )
    if kind == "linear":
        inverse = inverse / float(file.value("rope.scaling.factor", 1.0))
    factors = file.weight("rope_freqs.weight")
    if factors is not None:
        inverse = inverse / factors.ravel().astype(np.float64)
    if long is None or short is None or not family.long_rope:
        return Rope(inverse)
    original, context = int(file.value("rope.scaling.original_context_length")), int(file.value("context_length"))
    stretch = max(context / original, 1.0)
    magnitude = file.value("rope.scaling.attn_factor", math.sqrt(1 + math.log(stretch) / math.log(original)))
    return Rope(
        inverse / short.ravel().astype(np.float64),
        magnitude=float(magnitude),
        beyond=inverse / long.ravel().astype(np.float64),
        original=original,
    )
