"""Quantisation: what lies on a 4-bit grid is kept, everything else errs less than its bound, and kernels agree."""

from __future__ import annotations

import gguf
import numpy as np
import onnxruntime as ort
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from shared.models import quantize

Floats = NDArray[np.float32]

seeds = st.integers(0, 2**32 - 1)


def unpack(nibbles: NDArray[np.uint8], count: int) -> Floats:
    """Two values to a byte, low half first, along the last dimension."""
    both = np.stack([nibbles & 15, nibbles >> 4], -1)
    return both.reshape(*nibbles.shape[:-1], -1)[..., :count].astype(np.float32)


def restored(weights: Floats) -> Floats:
    """What `weights` are after `quantize.int4`, its further columns spread over the blocks they belong to."""
    rows, columns = weights.shape
    four = quantize.int4(weights)
    wide = columns + (quantize.mean_columns(columns) if four.widened else 0)
    blocks = wide // quantize.BLOCK
    assert (four.values.shape, four.scales.shape) == ((rows, blocks, 16), (rows, blocks))
    zeros = np.full((rows, blocks), 8, np.float32)
    if four.zeros is not None:
        assert four.zeros.shape == (rows, -(-blocks // 2))
        zeros = unpack(four.zeros, blocks)
    values = (unpack(four.values, 32) - zeros[..., None]) * four.scales[..., None]
    flat = values.reshape(rows, wide)
    if not four.widened:
        return np.asarray(flat)
    return np.asarray(flat[:, :columns] + flat[:, columns:] @ quantize.block_means(columns).T)


def steps(weights: Floats) -> Floats:
    """A 15th of each block's range, spread over its elements."""
    blocks = weights.reshape(len(weights), -1, 32)
    step = (blocks.max(-1, keepdims=True) - blocks.min(-1, keepdims=True)) / 15
    return np.broadcast_to(step, blocks.shape).reshape(weights.shape)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_q4_0_weights_are_kept_exactly(seed: int) -> None:
    """Weights out of a Q4_0 file come back to float32's last digits, with no zero points and no further columns."""
    random = np.random.default_rng(seed)
    source = random.standard_normal((4, 96)).astype(np.float32) * random.uniform(1e-3, 10)
    weights = gguf.quants.dequantize(gguf.quants.quantize(source, Kind.Q4_0), Kind.Q4_0)
    four = quantize.int4(weights)
    assert four.zeros is None
    assert not four.widened
    np.testing.assert_allclose(restored(weights), weights, rtol=1e-5, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_q4_1_weights_keep_their_grid(seed: int) -> None:
    """Weights out of a Q4_1 file come back but for the rounding of their offsets' fractions: a 25th of a step."""
    random = np.random.default_rng(seed)
    source = random.standard_normal((4, 96)).astype(np.float32) + random.uniform(-1, 1)
    weights = gguf.quants.dequantize(gguf.quants.quantize(source, Kind.Q4_1), Kind.Q4_1)
    assert (np.abs(restored(weights) - weights) <= steps(weights).max() / 25).all()


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from([0.01, 1.0, 30.0]))
def test_int4_errs_by_little_more_than_half_a_step(seed: int, spread: float) -> None:
    """Any weights, heavy tails and whole blocks of one value included, come back within 0.6 of a block's step; what
    the search for less squared error gives up at the ends of the range stays below two steps."""
    random = np.random.default_rng(seed)
    weights = (random.standard_t(3, (8, 64)) * spread).astype(np.float32)
    weights[0] = 0
    weights[1] = spread
    error = np.abs(restored(weights) - weights)
    step = steps(weights)
    slack = step.max() / 25 + 1e-6 * np.abs(weights)
    assert (error <= 2 * step + slack).all()
    assert np.quantile(error - slack, 0.95) <= np.quantile(0.6 * step, 0.95)


def test_int4_keeps_what_lies_on_its_grid() -> None:
    """Blocks of 16 evenly spaced values come back as they were, whatever fraction of a step they are shifted by,
    and blocks of zeros too."""
    random = np.random.default_rng(1)
    values = random.integers(0, 16, (6, 3, 32))
    values[..., 0], values[..., 1] = 0, 15
    scales = random.uniform(0.01, 0.1, (6, 3, 1))
    shifts = random.uniform(0, 15, (6, 3, 1))
    weights = ((values - shifts) * scales).astype(np.float32).reshape(6, 96)
    weights[5] = 0
    np.testing.assert_allclose(restored(weights), weights, atol=0.1 / 25)  # a 25th of the widest step
    whole = ((values - np.rint(shifts)) * scales).astype(np.float32).reshape(6, 96)
    np.testing.assert_allclose(restored(whole), whole, atol=1e-5)


def test_int4_errs_less_than_its_range_allows() -> None:
    """On weights spread like a model's, the error is below that of rounding to a grid over the range."""
    weights = np.random.default_rng(2).standard_normal((64, 256)).astype(np.float32)
    blocks = weights.reshape(64, 8, 32)
    low = blocks.min(-1, keepdims=True)
    step = (blocks.max(-1, keepdims=True) - low) / 15
    plain = (np.rint((blocks - low) / step) * step + low).reshape(64, 256)
    assert ((restored(weights) - weights) ** 2).mean() < 0.95 * ((plain - weights) ** 2).mean()


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from([32, 64, 96, 128]))
def test_int8_errs_by_half_a_step(seed: int, columns: int) -> None:
    """No weight moves by more than half of a 127th of its block's largest; blocks are of 64 where they fit."""
    weights = np.random.default_rng(seed).standard_t(3, (4, columns)).astype(np.float32)
    values, scales = quantize.int8(weights)
    assert values.shape[2] == quantize.int8_block(columns) == (64 if columns % 64 == 0 else 32)
    back = ((values.astype(np.float32) - 128) * scales[..., None]).reshape(weights.shape)
    bound = np.repeat(scales, values.shape[2], axis=1) * 0.501
    assert (np.abs(back - weights) <= bound).all()


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1])
def test_the_kernel_multiplies_with_the_weights_of_the_file(kind: Kind) -> None:
    """ONNX Runtime's result, inputs rounded to 8 bits as it does, is that of the file's weights; and a row's result
    is the same alone and in a batch."""
    random = np.random.default_rng(3)
    rows, columns = 48, 96
    source = random.standard_normal((rows, columns)).astype(np.float32)
    weights = gguf.quants.dequantize(gguf.quants.quantize(source, kind), kind)
    four = quantize.int4(weights)
    x = random.standard_normal((8, columns)).astype(np.float32)
    fed = np.concatenate([x, x @ quantize.block_means(columns)], axis=1) if four.widened else x
    tensors = {"q": four.values, "s": four.scales} | ({} if four.zeros is None else {"z": four.zeros})
    node = helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft",
        bits=4, K=fed.shape[1], N=rows, block_size=32, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "one", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", fed.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", rows])],
        [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()],
    )  # fmt: skip
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    )
    model.ir_version = 9
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    together = session.run(None, {"x": fed})[0]
    alone = np.concatenate([session.run(None, {"x": fed[row : row + 1]})[0] for row in range(len(fed))])
    expected = x @ weights.T
    assert np.linalg.norm(together - expected) < 0.02 * np.linalg.norm(expected)
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([32, 64, 96, 128]))
def test_symmetric_int4_errs_by_little_more_than_half_a_step(seed: int, columns: int) -> None:
    """No zero points, no further columns, blocks of 64 where they fit; what shrinking the range gives up at its end
    stays below two of the widest steps, and most weights are within 0.6."""
    weights = np.random.default_rng(seed).standard_t(3, (8, columns)).astype(np.float32)
    weights[0] = 0
    four = quantize.int4_symmetric(weights)
    assert four.zeros is None
    assert not four.widened
    assert 2 * four.values.shape[2] == quantize.int8_block(columns)
    pairs = np.stack([four.values & 15, four.values >> 4], axis=-1).reshape(*four.values.shape[:2], -1)
    back = ((pairs.astype(np.float32) - 8) * four.scales[..., None]).reshape(weights.shape)
    step = np.repeat(np.abs(weights.reshape(8, -1, pairs.shape[-1])).max(-1) / 8, pairs.shape[-1], axis=1)
    error = np.abs(back - weights)
    assert (error <= 2 * step + 1e-6).all()
    assert np.quantile(error - 0.6 * step, 0.9) <= 1e-6
