"""Runs decoder graphs whose KV cache is one fixed buffer, bound in place; and what other runners must offer."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from shared.errors import UnsupportedModel
from shared.messages import Device

Logits = NDArray[np.float32]

_DTYPES: dict[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Runner(Protocol):
    """Computes logits for sequences that live in rows of a KV cache."""

    vocab: int
    compact: bool
    """Active rows must be 0..n-1; the batcher moves sequences to keep it so."""

    def prefill(self, row: int, tokens: list[int], start: int) -> Logits:
        """Read `tokens` into `row` behind its first `start`; logits [vocab] after the last of them."""

    def decode(self, tokens: list[int], lengths: list[int]) -> Logits:
        """One token for each of the first n rows, which hold `lengths` tokens; logits [n, vocab]."""

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row over another row."""

    def free(self, row: int) -> None:
        """The row's content is no longer needed."""


class SharedKvRunner:
    """GroupQueryAttention graphs (layouts `calm` and `gqa`) over a KV buffer of [slots, kv_heads, context, head_size]
    per layer and side.

    A decode step binds the first n rows, a prefill step one row, both by pointer into the same buffers, so that
    nothing is copied. On the CPU the buffers are committed by the kernel as they are touched.
    """

    def __init__(self, session: ort.InferenceSession, slots: int, context: int, device: Device) -> None:
        self._session = session
        self._slots = slots
        self._context = context
        self._cuda = device.kind == "cuda"
        self._where = ("cuda", device.index) if self._cuda else ("cpu", 0)
        self.compact = not self._cuda
        inputs = {i.name: i for i in session.get_inputs()}
        outputs = [o.name for o in session.get_outputs()]
        past = [name for name in inputs if name.startswith("past")]
        if not past:
            raise UnsupportedModel("The graph has no KV cache inputs (past_key_values.*).", "Export it with past.")
        self._dtype = _DTYPES[inputs[past[0]].type]
        self._pairs = [(name, _present(name, outputs)) for name in past]
        self._masked = "attention_mask" in inputs
        self._positions = "position_ids" in inputs
        _, heads, _, head_size = inputs[past[0]].shape
        self._shape = (int(heads), context, int(head_size))
        logits = next(o for o in session.get_outputs() if o.name == "logits")
        self.vocab = int(logits.shape[-1])
        self._logits_dtype = _DTYPES[logits.type]
        self._last_only = logits.shape[1] == 1
        self._stride = int(np.prod(self._shape)) * np.dtype(self._dtype).itemsize
        self._buffers = {name: self._allocate() for name in past}
        self._decoding: dict[int, tuple[Any, dict[str, NDArray[Any]], Logits]] = {}

    def _allocate(self) -> Any:
        shape = (self._slots, *self._shape)
        if self._cuda:
            return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), self._dtype, *self._where)
        return np.zeros(shape, dtype=self._dtype)  # zero pages: no memory until written

    def _pointer(self, name: str, row: int) -> int:
        buffer = self._buffers[name]
        base = buffer.data_ptr() if self._cuda else buffer.ctypes.data
        return int(base) + row * self._stride

    def _bind_cache(self, binding: Any, row: int, rows: int) -> None:
        shape = [rows, *self._shape]
        for past, present in self._pairs:
            pointer = self._pointer(past, row)
            binding.bind_input(past, *self._where, self._dtype, shape, pointer)
            binding.bind_output(present, *self._where, self._dtype, shape, pointer)

    def _bind_step(self, binding: Any, arrays: dict[str, NDArray[Any]]) -> None:
        for name, array in arrays.items():
            binding.bind_input(name, "cpu", 0, array.dtype, list(array.shape), array.ctypes.data)

    def _bind_logits(self, binding: Any, rows: int, length: int) -> Logits:
        logits = np.empty((rows, 1 if self._last_only else length, self.vocab), self._logits_dtype)
        binding.bind_output("logits", "cpu", 0, self._logits_dtype, list(logits.shape), logits.ctypes.data)
        return logits

    def _inputs(self, ids: NDArray[np.int64], before: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Step inputs for `ids` [rows, seq] behind `before` [rows] tokens."""
        length = ids.shape[1]
        total = int(before.max()) + length
        arrays: dict[str, NDArray[Any]] = {"input_ids": ids}
        if self._masked:
            valid = (before + length)[:, None]
            arrays["attention_mask"] = (np.arange(total)[None, :] < valid).astype(np.int64)
        else:
            arrays["seqlens_k"] = (before + length - 1).astype(np.int32)
            arrays["total_sequence_length"] = np.array(total, np.int32)
        if self._positions:
            arrays["position_ids"] = before[:, None] + np.arange(length, dtype=np.int64)[None, :]
        return arrays

    def prefill(self, row: int, tokens: list[int], start: int) -> Logits:
        ids = np.array([tokens], np.int64)
        arrays = self._inputs(ids, np.array([start], np.int64))
        binding = self._session.io_binding()
        self._bind_cache(binding, row, 1)
        self._bind_step(binding, arrays)
        logits = self._bind_logits(binding, 1, len(tokens))
        self._session.run_with_iobinding(binding)
        return np.asarray(logits[0, -1], dtype=np.float32)

    def decode(self, tokens: list[int], lengths: list[int]) -> Logits:
        rows = len(tokens)
        ids, before = np.array(tokens, np.int64)[:, None], np.array(lengths, np.int64)
        if rows not in self._decoding:
            binding = self._session.io_binding()
            self._bind_cache(binding, 0, rows)
            self._decoding[rows] = (binding, self._inputs(ids, before), self._bind_logits(binding, rows, 1))
            if not self._masked and not self._cuda:
                self._bind_step(binding, self._decoding[rows][1])
        binding, arrays, logits = self._decoding[rows]
        if self._masked or self._cuda:
            # A mask changes its shape each step; a CUDA binding copies its inputs when they are bound.
            arrays = self._inputs(ids, before)
            self._bind_step(binding, arrays)
        else:
            for name, array in self._inputs(ids, before).items():
                arrays[name][...] = array
        self._session.run_with_iobinding(binding)
        return np.asarray(logits[:, -1], dtype=np.float32)

    def move(self, source: int, target: int, length: int) -> None:
        for buffer in self._buffers.values():
            buffer[target, :, :length] = buffer[source, :, :length]

    def free(self, row: int) -> None:
        pass


class ConcatRunner:
    """Plain exports, whose present is past and new concatenated: each sequence runs alone on arrays of its own."""

    compact = True

    def __init__(self, session: ort.InferenceSession, slots: int) -> None:
        self._session = session
        self._inputs = {i.name: i for i in session.get_inputs()}
        self._outputs = [o.name for o in session.get_outputs()]
        self._past = [name for name in self._inputs if name.startswith("past")]
        logits = next(o for o in session.get_outputs() if o.name == "logits")
        self.vocab = int(logits.shape[-1])
        self._rows: list[dict[str, NDArray[Any]]] = [{} for _ in range(slots)]

    def _empty(self, name: str) -> NDArray[Any]:
        description = self._inputs[name]
        return np.zeros((1, int(description.shape[1]), 0, int(description.shape[3])), _DTYPES[description.type])

    def _run(self, row: int, tokens: list[int], start: int) -> Logits:
        past = self._rows[row] if start else {name: self._empty(name) for name in self._past}
        feeds: dict[str, NDArray[Any]] = {"input_ids": np.array([tokens], np.int64), **past}
        if "attention_mask" in self._inputs:
            feeds["attention_mask"] = np.ones((1, start + len(tokens)), np.int64)
        if "position_ids" in self._inputs:
            feeds["position_ids"] = np.arange(start, start + len(tokens), dtype=np.int64)[None]
        if "use_cache_branch" in self._inputs:
            feeds["use_cache_branch"] = np.array([start > 0])
        results = dict(zip(self._outputs, self._session.run(None, feeds), strict=True))
        self._rows[row] = {name: results[_present(name, self._outputs)] for name in self._past}
        return np.asarray(results["logits"][0, -1], dtype=np.float32)

    def prefill(self, row: int, tokens: list[int], start: int) -> Logits:
        return self._run(row, tokens, start)

    def decode(self, tokens: list[int], lengths: list[int]) -> Logits:
        return np.stack([self._run(row, [t], n) for row, (t, n) in enumerate(zip(tokens, lengths, strict=True))])

    def move(self, source: int, target: int, length: int) -> None:
        self._rows[target] = self._rows[source]

    def free(self, row: int) -> None:
        self._rows[row] = {}


def _present(past: str, outputs: list[str]) -> str:
    """The output that continues a past input: `past_key_values.0.key` goes on as `present.0.key`."""
    for prefix in ("past_key_values", "past_key", "past_value", "past"):
        if past.startswith(prefix):
            rest = past.removeprefix(prefix)
            for name in (f"present{rest}", f"present_key_values{rest}", past.replace("past", "present", 1)):
                if name in outputs:
                    return name
    raise UnsupportedModel(f"The graph has no output that continues {past}.", "Export it with past.")
