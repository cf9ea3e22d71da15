"""Weight-only block quantisation for MatMulNBits: blocks along the input dimension, float32 scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 32

_ON_GRID = 1e-10
"""Squared error, relative to the block, of rounding in float32."""
_NO_REST = 1e-3
"""Steps: an offset so near a whole zero point is one."""

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def int8_block(columns: int) -> int:
    """Block length of `int8`: 64 where that divides the columns, else 32.

    ONNX Runtime reads a float scale and a float sum for each block: 1.125 bytes a weight at 64 and 1.25 at 32.
    """
    return 64 if columns % 64 == 0 else BLOCK


def int8(weights: Floats) -> tuple[Bytes, Floats]:
    """Symmetric 8 bits around 128. `weights` [n, k] to values [n, k/b, b] and scales [n, k/b], b = `int8_block(k)`."""
    rows, columns = weights.shape
    block = int8_block(columns)
    blocks = weights.reshape(rows, columns // block, block)
    scales = np.abs(blocks).max(-1) / 127.0
    scales[scales == 0] = 1e-8
    values = (np.rint(blocks / scales[..., None]) + 128).astype(np.uint8)
    return values, scales.astype(np.float32)


@dataclass(frozen=True)
class Int4:
    """A matrix in 4 bits, as MatMulNBits takes it."""

    values: Bytes
    """[n, k'/32, 16]: two to a byte, low half first."""
    scales: Floats
    """[n, k'/32]"""
    zeros: Bytes | None
    """[n, ceil(k'/32 / 2)]; None when every zero point is 8, which MatMulNBits assumes then."""
    widened: bool
    """k' = k + mean_columns(k), and the last columns meet the means of the input's blocks; otherwise k' = k."""


def int4(weights: Floats, *, means: bool = True) -> Int4:
    """4 bits with a fractional offset per block, in a form that whole zero points can carry.

    MatMulNBits is quick with whole zero points only. A block is fitted as scale x value + offset, the offset's whole
    steps go into the zero point, and the rest of it multiplies the mean of the block's inputs (and their number): as
    weights of further columns, which meet these means. Blocks that lie on such a grid already (Q4_0, Q4_1) keep it.
    Where no block has a rest, as with Q4_0, there are no further columns; without `means` there are none either, and
    the rests are dropped. `weights` [n, k].

    Measured in docs/decisions/0013-int4.md and 0018-int4-faster.md.
    """
    rows, columns = weights.shape
    values, scales, offsets = (
        part.reshape(rows, columns // BLOCK, *part.shape[1:]) for part in _fit(weights.reshape(-1, BLOCK))
    )
    zeros = np.clip(np.rint(-offsets / scales), 0, 15)
    left = offsets + scales * zeros
    widened = means and bool((np.abs(left) > _NO_REST * np.abs(scales)).any())
    if widened:
        rest = np.zeros((rows, mean_columns(columns)), np.float32)
        rest[:, : columns // BLOCK] = left * BLOCK
        more = rest.reshape(rows, -1, BLOCK)
        low, high = np.minimum(more.min(-1), 0.0), np.maximum(more.max(-1), 0.0)
        step = _positive((high - low) / 15.0)
        middle = np.rint(-low / step)
        further = np.clip(np.rint(more / step[..., None] + middle[..., None]), 0, 15)
        values = np.concatenate([values, further], axis=1)
        scales, zeros = np.concatenate([scales, step], axis=1), np.concatenate([zeros, middle], axis=1)
    return Int4(
        values=_pack(values),
        scales=scales.astype(np.float32),
        zeros=None if (zeros == 8).all() else _pack(zeros),
        widened=widened,
    )


def int4_symmetric(weights: Floats) -> Int4:
    """4 bits around 8 in blocks of 64 (of 32 where they do not fit): the quickest that MatMulNBits has, without zero
    points and further columns, and no block keeps its grid. `weights` [n, k]."""
    rows, columns = weights.shape
    size = int8_block(columns)
    blocks = weights.reshape(-1, size)
    low, high = blocks.min(-1), blocks.max(-1)
    extreme = np.where(-low > high, low, high)
    best, least = np.full(low.shape, 1e-8, np.float32), np.full(low.shape, np.inf, np.float32)
    for shrink in (1.0, 0.95, 0.9, 0.85, 0.8):
        scale = np.where(extreme != 0, extreme * (shrink / -8.0), 1e-8).astype(np.float32)
        _, error = _rounded(blocks, scale, -8.0 * scale)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    best = best.astype(np.float32)
    values, _ = _rounded(blocks, best, np.float32(-8.0) * best)
    shape = (rows, columns // size)
    return Int4(_pack(values.reshape(*shape, size)), best.reshape(shape), zeros=None, widened=False)


def mean_columns(columns: int) -> int:
    """Columns that `int4` adds to `columns`: one for each block, rounded up to whole blocks (the rest is zero)."""
    return -(-columns // BLOCK // BLOCK) * BLOCK


def block_means(columns: int) -> Floats:
    """[columns, mean_columns]: what an input is multiplied with to give the means that `int4`'s last columns take."""
    means = np.zeros((columns, mean_columns(columns)), np.float32)
    means[np.arange(columns), np.arange(columns) // BLOCK] = 1.0 / BLOCK
    return means


def _fit(blocks: Floats) -> tuple[Floats, Floats, Floats]:
    """Values 0 to 15, scales and offsets of `blocks` [m, 32] with block = scale x value + offset: the grid that a
    block lies on (the offset being -8 steps, or its minimum), or else the one with the least squared error."""
    low, high = blocks.min(-1), blocks.max(-1)
    extreme = np.where(-low > high, low, high)
    values, scales, offsets = np.zeros_like(blocks), np.ones_like(low), np.zeros_like(low)
    left = np.arange(len(blocks))
    power = (blocks * blocks).sum(-1)
    whole = np.where(extreme != 0, extreme / -8.0, 1e-8).astype(np.float32)
    for scale, offset in ((whole, -8.0 * whole), (_positive((high - low) / 15.0), low)):
        some = blocks[left]
        tried, error = _rounded(some, scale[left], offset[left])
        exact = error <= _ON_GRID * power[left]
        at = left[exact]
        values[at], scales[at], offsets[at] = tried[exact], scale[at], offset[at]
        left = left[~exact]
    if len(left):
        values[left], scales[left], offsets[left] = _search(blocks[left])
    return values, scales, offsets


def _rounded(blocks: Floats, scale: Floats, offset: Floats) -> tuple[Floats, Floats]:
    """The nearest values on a grid, and the squared error [m]."""
    values = np.clip(np.rint((blocks - offset[:, None]) / scale[:, None]), 0, 15)
    return values, ((blocks - scale[:, None] * values - offset[:, None]) ** 2).sum(-1)


def _search(blocks: Floats) -> tuple[Floats, Floats, Floats]:
    """The least squared error among grids over the block's range and slightly less."""
    low, high = blocks.min(-1), blocks.max(-1)
    mean = blocks.mean(-1)
    values, scales, offsets = np.zeros_like(blocks), np.ones_like(low), np.zeros_like(low)
    least = np.full(low.shape, np.inf, dtype=np.float32)
    for shrink in (1.0, 0.95, 0.9, 0.85):
        scale = _positive((high - low) * (shrink / 15.0))
        offset = (low + high) / 2 - 7.5 * scale
        for _ in range(2):  # refit the line to the rounding it causes
            tried, _error = _rounded(blocks, scale, offset)
            centred = tried - tried.mean(-1, keepdims=True)
            power = (centred * centred).sum(-1)
            fitted = (centred * blocks).sum(-1) / np.maximum(power, 1e-12)
            scale = np.where((power > 0) & (fitted > 0), fitted, scale)
            offset = mean - scale * tried.mean(-1)
        error = ((blocks - scale[:, None] * tried - offset[:, None]) ** 2).sum(-1)
        better = error < least
        least = np.where(better, error, least)
        values = np.where(better[:, None], tried, values)
        scales = np.where(better, scale, scales)
        offsets = np.where(better, offset, offsets)
    return values, scales, offsets


def _positive(scales: NDArray[Any]) -> Floats:
    return np.where(scales > 0, scales, 1e-8).astype(np.float32)


def _pack(values: NDArray[Any]) -> Bytes:
    """Two 4-bit values to a byte along the last dimension, low half first."""
    nibbles = values.astype(np.uint8)
    if nibbles.shape[-1] % 2:
        nibbles = np.concatenate([nibbles, np.zeros((*nibbles.shape[:-1], 1), np.uint8)], axis=-1)
    return np.ascontiguousarray(nibbles[..., 0::2] | (nibbles[..., 1::2] << 4))
