"""Builds a model's decoder graph out of fused ONNX Runtime operators, without torch.

The graph's contract (layout `calm`), which the engine relies on:

- inputs `input_ids` int64 [batch, seq]; `seqlens_k` int32 [batch]: valid tokens after this step, minus 1;
  `total_sequence_length` int32 []: the largest of these, plus 1; `past_key_values.L.key` and `.value`
  float32 (float16 in precisions with fp16) [batch, kv_heads, max_length, head_size];
- optional input `logits_from` int64 [1], by default -1: the first position to give logits of, counted from the end;
- outputs `present.L.key` and `.value`, of the same shape, meant to be bound to the memory of the inputs;
  `logits` float32 [batch, positions, vocab]: by default of the last position, so that prefill does not pay for all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from shared.models import quantize
from shared.models.families.spec import DecoderSpec
from shared.models.families.weights import Rows, Weights
from shared.models.onnx_attention import Attention

Floats = NDArray[np.float32]
Precision = Literal["fp32", "fp16", "int8", "int4", "int8-fp16", "int4-fp16"]
"""Of the weights, and after the dash of everything between them when that is not float32. GroupQueryAttention runs on
CUDA with half precision alone (onnxruntime's docs/OperatorKernels.md), so those with fp16 are the ones for GPUs."""

CONVERTER = 4
"""Goes up whenever the same file is to give another graph or other weights, so that stored variants are made anew."""

QUERY_SCALE = "query_scale"
"""Key of the graph's metadata: what the weights that give q have been multiplied with."""

LOGITS_FROM = "logits_from"
"""The optional input; a constant where nothing is fed."""

_MS = "com.microsoft"
_DATA = "model.onnx.data"
_SMALL = 2**20
"""Weights of a matrix below which its nodes cost more time than its bytes: int4 spends bytes to save nodes there
(docs/decisions/0018-int4-faster.md)."""
_IN_FOUR_BITS = 8
"""Where q, k, v are small, each so manieth layer has them in 4 bits all the same: the whole then stays below three
quarters of int8's bytes."""
_OUTSIDE_BYTES = 1024
"""Constants of so many bytes and more lie in the data file."""


class DecoderBuilder:
    """The graph of one decoder in one precision."""

    def __init__(self, spec: DecoderSpec, weights: Weights, precision: Precision) -> None:
        self._spec = spec
        self._a = spec.architecture
        self._weights = weights
        self._weights_as, _, between = precision.partition("-")
        self._half = "fp16" in (self._weights_as, between)
        self._nodes: list[onnx.NodeProto] = []
        self._inits: list[onnx.TensorProto] = []
        self._widened: set[str] = set()
        self._layer_number = 0
        self._attention = Attention(spec, weights, self._node, self._init, half=self._half)

    def save(self, folder: Path) -> None:
        """Build the graph and write `model.onnx` and `model.onnx.data` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("model.onnx", _DATA):  # never over a file that an engine may have mapped
            (folder / name).unlink(missing_ok=True)
        with (folder / _DATA).open("wb") as self._data:
            model = self._model()
        onnx.save(model, str(folder / "model.onnx"))

    # --- pieces ---

    def _init(self, name: str, value: NDArray[Any], *, exact: bool = False) -> str:
        """A constant; float32 becomes this graph's float type unless it is to stay `exact`."""
        if self._half and value.dtype == np.float32 and not exact:
            value = value.astype(np.float16)
        value = np.ascontiguousarray(value)
        if value.nbytes < _OUTSIDE_BYTES:
            self._inits.append(numpy_helper.from_array(value, name))
            return name
        # Written as it is made, so that a model need not fit into memory several times over.
        tensor = TensorProto(
            name=name, dims=value.shape, data_type=helper.np_dtype_to_tensor_dtype(value.dtype),
            data_location=TensorProto.EXTERNAL,
        )  # fmt: skip
        for key, text in (("location", _DATA), ("offset", self._data.tell()), ("length", value.nbytes)):
            tensor.external_data.add(key=key, value=str(text))
        self._data.write(value.data)
        self._inits.append(tensor)
        return name

    def _node(self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> str:
        name = next(o for o in outputs if o)
        self._nodes.append(helper.make_node(op, inputs, outputs, name=f"{name}.node", domain=domain, **attributes))
        return name

    def _linear_of(self, x: str, parts: list[Rows], name: str, by: Floats | None = None) -> str:
        """A linear layer out of the file, with its bias when it has one; its outputs are multiplied `by` [n]."""
        out = self._linear(x, self._weights.matrix(parts), name, by)
        bias = self._weights.bias(parts)
        if bias is None:
            return out
        return self._node("Add", [out, self._init(f"{name}.b", bias if by is None else bias * by)], [f"{name}.biased"])

    def _linear(self, x: str, weights: Floats, name: str, by: Floats | None) -> str:
        """x [.., k] times weights [n, k] transposed, in this graph's precision. Factors go into the scales of what is
        quantised, which therefore rounds as it does without them."""
        rows, columns = weights.shape
        out = f"{name}.out"
        factors = np.ones((1, 1), np.float32) if by is None else by[:, None]
        if self._weights_as.startswith("fp"):
            return self._node("MatMul", [x, self._init(f"{name}.w", (weights * factors).T)], [out])
        if self._weights_as == "int8":
            values, scales = quantize.int8(weights)
            inputs = [x, self._init(f"{name}.q", values), self._init(f"{name}.s", scales * factors)]
            return self._matmul8(inputs, out, rows, columns)
        kind, small = name.rpartition(".")[2], rows * columns < _SMALL
        if kind == "attn_output" and small:
            four = quantize.int4_symmetric(weights)
        elif kind == "qkv" and small and self._layer_number % _IN_FOUR_BITS != _IN_FOUR_BITS - 1:
            values, scales = quantize.int8(weights)
            return self._matmul8(
                [x, self._init(f"{name}.q", values), self._init(f"{name}.s", scales * factors)], out, rows, columns
            )
        else:
            four = quantize.int4(weights, means=kind != "attn_output")
        inputs = [
            self._with_means(x, columns) if four.widened else x,
            self._init(f"{name}.q", four.values),
            self._init(f"{name}.s", four.scales * factors),
        ]
        if four.zeros is not None:
            inputs.append(self._init(f"{name}.z", four.zeros))
        wide = columns
        if four.widened:
            wide += quantize.mean_columns(columns) if self._half else columns // quantize.BLOCK
        block = 2 * four.values.shape[-1]
        return self._node("MatMulNBits", inputs, [out], _MS, bits=4, K=wide, N=rows, block_size=block, accuracy_level=4)

    def _matmul8(self, inputs: list[str], out: str, rows: int, columns: int) -> str:
        block = quantize.int8_block(columns)
        return self._node(
            "MatMulNBits", inputs, [out], _MS, bits=8, K=columns, N=rows, block_size=block, accuracy_level=4
        )

    def _with_means(self, x: str, columns: int) -> str:
        """x with the means of its blocks behind it, as `quantize.int4` needs it; made once for each x."""
        wide = f"{x}.wide"
        if wide in self._widened:
            return wide
        self._widened.add(wide)
        if not self._half:  # a pool runs in the calling thread; a MatMul is handed out to all (4 % of decoding)
            size = [quantize.BLOCK]
            means = self._node("AveragePool", [x], [f"{x}.means"], kernel_shape=size, strides=size)
        else:  # whole blocks, which kernels for CUDA want
            averaging = f"averaging.{columns}"
            if averaging not in self._widened:
                self._widened.add(self._init(averaging, quantize.block_means(columns)))
            means = self._node("MatMul", [x, averaging], [f"{x}.means"])
        return self._node("Concat", [x, means], [wide], axis=-1)

    def _embedding(self) -> str:
        table = self._weights.need("token_embd.weight")
        if self._weights_as.startswith("fp"):
            return self._node("Gather", [self._init("embedding", table), "input_ids"], ["embedded"])
        values, scales = quantize.int8(table)
        self._init("embedding.q", values)
        self._init("embedding.s", scales)
        flat = self._node(
            "Reshape",
            ["embedding.q", self._init("embedding.shape", np.array(table.shape, np.int64))],
            ["embedding.flat"],
        )
        return self._node(
            "GatherBlockQuantized", [flat, "input_ids", "embedding.s"], ["embedded"], _MS,
            gather_axis=0, quantize_axis=1, block_size=quantize.int8_block(self._a.hidden), bits=8,
        )  # fmt: skip

    def _head(self, x: str) -> None:
        """Logits of the last position, in float32."""
        cap = self._spec.logit_softcap
        scores = self._scores(x, "scores.half" if self._half else "uncapped" if cap else "logits")
        if self._half:
            scores = self._node("Cast", [scores], ["uncapped" if cap else "logits"], to=TensorProto.FLOAT)
        if cap:
            limit = self._init("logits.cap", np.array(cap, np.float32), exact=True)
            bent = self._node("Tanh", [self._node("Div", [scores, limit], ["logits.scaled"])], ["logits.bent"])
            self._node("Mul", [bent, limit], ["logits"])

    def _scores(self, x: str, out: str) -> str:
        last = self._node(
            "Slice",
            [x, self._init(LOGITS_FROM, np.array([-1], np.int64)), self._init("end", np.array([2**62], np.int64)),
             self._init("one", np.array([1], np.int64))],
            ["last_hidden"],
        )  # fmt: skip
        own = self._weights.file.weight("output.weight")
        a = self._a
        if self._weights_as.startswith("fp"):
            # Gemm with transB reads the (tied) table as it lies: no transposed copy on disk.
            table = "embedding" if own is None else self._init("head", own)
            flat = self._node("Reshape", [last, self._init("rows", np.array([-1, a.hidden], np.int64))], ["last_flat"])
            scores = self._node("Gemm", [flat, table], ["scores"], transB=1)
            places = self._node("Shape", [last], ["scores.places"], start=0, end=2)
            vocab = self._init("scores.vocab", np.array([a.vocab], np.int64))
            shape = self._node("Concat", [places, vocab], ["scores.shape"], axis=0)
            return self._node("Reshape", [scores, shape], [out])
        inputs = [last, "embedding.q", "embedding.s"]
        if own is not None:
            values, scales = quantize.int8(own)
            inputs = [last, self._init("head.q", values), self._init("head.s", scales)]
        return self._matmul8(inputs, out, a.vocab, a.hidden)

    def _layer(self, index: int, x: str, residual: str) -> tuple[str, str]:
        """One block: `x` is the normalised input, `residual` the running sum; returns the next pair."""
        p, blk, weights = f"layer{index}", f"blk.{index}", self._weights
        self._layer_number = index
        qkv = self._linear_of(x, weights.qkv(index), f"{p}.qkv", self._attention.qkv_factors)
        attended = self._attention.layer(index, qkv)
        out = self._linear_of(attended, [Rows(f"{blk}.attn_output")], f"{p}.attn_output")
        if self._spec.family.post_norms:
            out = self._norm(out, f"{blk}.post_attention_norm", f"{p}.attn_post")
        y, summed = self._skip_norm(residual, out, weights.need(f"{blk}.ffn_norm.weight").ravel(), f"{p}.ffn")
        # One matrix for both: a split costs less than a second hand-out to the threads (3 to 8 % of decoding).
        both = self._linear_of(y, [*weights.gate(index), *weights.up(index)], f"{p}.ffn_gate_up")
        gate, up = f"{p}.ffn_gate.out", f"{p}.ffn_up.out"
        self._node("Split", [both], [gate, up], axis=-1, num_outputs=2)
        product = self._node("Mul", [self._activated(gate, p), up], [f"{p}.product"])
        down = self._linear_of(product, [Rows(f"{blk}.ffn_down")], f"{p}.ffn_down")
        if self._spec.family.post_norms:
            down = self._norm(down, f"{blk}.post_ffw_norm", f"{p}.ffn_post")
        last = index == self._a.layers - 1
        following = "output_norm.weight" if last else f"blk.{index + 1}.attn_norm.weight"
        return self._skip_norm(summed, down, weights.need(following).ravel(), f"{p}.next", with_sum=not last)

    def _activated(self, gate: str, p: str) -> str:
        if self._spec.family.activation == "gelu_tanh":
            return self._node("FastGelu", [gate], [f"{p}.gelu"], _MS)
        sigmoid = self._node("Sigmoid", [gate], [f"{p}.sigmoid"])
        return self._node("Mul", [gate, sigmoid], [f"{p}.silu"])

    def _norm(self, x: str, tensor: str, name: str) -> str:
        gain = self._init(f"{name}.gain", self._weights.need(f"{tensor}.weight").ravel())
        return self._node(
            "SimplifiedLayerNormalization", [x, gain], [f"{name}.norm"],
            epsilon=self._spec.epsilon, axis=-1, stash_type=1,
        )  # fmt: skip

    def _skip_norm(self, residual: str, x: str, gain: Floats, name: str, *, with_sum: bool = True) -> tuple[str, str]:
        outputs = [f"{name}.norm", "", "", f"{name}.sum"] if with_sum else [f"{name}.norm"]
        self._node(
            "SkipSimplifiedLayerNormalization", [residual, x, self._init(f"{name}.gain", gain)], outputs, _MS,
            epsilon=self._spec.epsilon,
        )  # fmt: skip
        return f"{name}.norm", f"{name}.sum"

    def _model(self) -> onnx.ModelProto:
        a = self._a
        self._attention.prepare()
        residual = self._embedding()
        if self._spec.family.scaled_embedding:
            root = self._init("embedding.scale", np.array(a.hidden**0.5, np.float32))
            residual = self._node("Mul", [residual, root], ["embedding.scaled"])
        x = self._norm(residual, "blk.0.attn_norm", "first")
        for index in range(a.layers):
            x, residual = self._layer(index, x, residual)
        self._head(x)
        cache = ["batch", a.kv_heads, "max_length", a.head_size]
        sides = [f"{layer}.{side}" for layer in range(a.layers) for side in ("key", "value")]
        value_info = helper.make_tensor_value_info
        kind = TensorProto.FLOAT16 if self._half else TensorProto.FLOAT
        inputs = [
            value_info("input_ids", TensorProto.INT64, ["batch", "seq"]),
            value_info("seqlens_k", TensorProto.INT32, ["batch"]),
            value_info("total_sequence_length", TensorProto.INT32, []),
            *(value_info(f"past_key_values.{side}", kind, cache) for side in sides),
            value_info(LOGITS_FROM, TensorProto.INT64, [1]),
        ]
        outputs = [
            value_info("logits", TensorProto.FLOAT, ["batch", "positions", a.vocab]),
            *(value_info(f"present.{side}", kind, cache) for side in sides),
        ]
        graph = helper.make_graph(self._nodes, "decoder", inputs, outputs, self._inits)
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid(_MS, 1)]
        model = helper.make_model(graph, opset_imports=opsets)
        model.ir_version = 9
        if self._attention.qkv_factors is not None:  # what an adapter adds to q is to be scaled as well
            model.metadata_props.add(key=QUERY_SCALE, value=repr(self._spec.attention_scale))
        return model
