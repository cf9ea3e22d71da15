"""Weight-only block quantisation for MatMulNBits: blocks of 32 along the input dimension, float32 scales."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 32

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def int8(weights: Floats) -> tuple[Bytes, Floats]:
    """Symmetric 8 bits around 128. `weights` [n, k] to values [n, k/32, 32] and scales [n, k/32]."""
    rows, columns = weights.shape
    blocks = weights.reshape(rows, columns // BLOCK, BLOCK)
    scales = np.abs(blocks).max(-1) / 127.0
    scales[scales == 0] = 1e-8
    values = (np.rint(blocks / scales[..., None]) + 128).astype(np.uint8)
    return values, scales.astype(np.float32)


def int4(weights: Floats) -> tuple[Bytes, Floats, Bytes]:
    """Asymmetric 4 bits with whole zero points, both searched per block for the least squared error.

    `weights` [n, k] to values [n, k/32, 16] (two to a byte, low half first), scales [n, k/32] and zero points
    [n, ceil(k/32 / 2)]. Weight = scale x (value - zero point).
    """
    rows, columns = weights.shape
    blocks = weights.reshape(rows, columns // BLOCK, BLOCK)
    low, high = np.minimum(blocks.min(-1), 0.0), np.maximum(blocks.max(-1), 0.0)
    best: dict[str, NDArray[Any]] = {}
    least = np.full(low.shape, np.inf, dtype=np.float32)
    for shrink in (1.0, 0.9, 0.8):
        scale = ((high - low) * shrink / 15.0).astype(np.float32)
        scale[scale == 0] = 1e-8
        zero = np.clip(np.rint(-low * shrink / scale), 0, 15).astype(np.float32)
        for _ in range(2):  # refit the scale to the rounding it causes
            values = np.clip(np.rint(blocks / scale[..., None] + zero[..., None]), 0, 15)
            centred = values - zero[..., None]
            power = (centred * centred).sum(-1)
            fitted = np.where(power > 0, (blocks * centred).sum(-1) / np.maximum(power, 1e-12), scale)
            scale = np.where(fitted > 0, fitted, scale).astype(np.float32)
        error = ((blocks - scale[..., None] * centred) ** 2).sum(-1)
        if not best:
            best, least = {"values": values, "scale": scale, "zero": zero}, error
            continue
        better = error < least
        least = np.where(better, error, least)
        best["values"] = np.where(better[..., None], values, best["values"])
        best["scale"] = np.where(better, scale, best["scale"])
        best["zero"] = np.where(better, zero, best["zero"])
    return _pack(best["values"]), best["scale"].astype(np.float32), _pack(best["zero"])


def _pack(values: NDArray[Any]) -> Bytes:
    """Two 4-bit values to a byte along the last dimension, low half first."""
    nibbles = values.astype(np.uint8)
    if nibbles.shape[-1] % 2:
        nibbles = np.concatenate([nibbles, np.zeros((*nibbles.shape[:-1], 1), np.uint8)], axis=-1)
    return np.ascontiguousarray(nibbles[..., 0::2] | (nibbles[..., 1::2] << 4))
