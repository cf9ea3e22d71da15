"""Runs decoder graphs: those whose KV cache is one fixed buffer, bound in place, and plain exports."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from services.workers.engine.cache import Cache, DeviceCache, HostCache
from services.workers.engine.joint import PARTS, READING
from services.workers.engine.schedule import Copy, Move, Release, Swap
from shared.errors import UnsupportedModel
from shared.messages import Device

Logits = NDArray[np.float32]

_LOGITS_FROM = "logits_from"
"""Optional input of graphs of layout `calm`: the first position that they give logits of, counted from the end."""
_DTYPES: dict[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Runner(Protocol):
    """Computes logits for sequences that live in rows of a KV cache."""

    vocab: int
    compact: bool
    """Active rows must be 0..n-1; the batcher moves sequences to keep it so."""
    granule: int
    """Memory of a row is taken by so many tokens at once."""
    verifies: bool
    """It can give the logits behind each of several tokens at once."""
    joins: bool
    """It can read a piece of a prompt in one pass with a decode step."""

    def prefill(self, row: int, tokens: list[int], start: int) -> Logits:
        """Read `tokens` into `row` behind its first `start`; logits [vocab] after the last of them."""

    def decode(self, tokens: list[int], lengths: list[int]) -> Logits:
        """One token for each of the first n rows, which hold `lengths` tokens; logits [n, vocab], good until the
        next call."""

    def verify(self, row: int, tokens: list[int], start: int) -> Logits:
        """Read `tokens` into `row` behind its first `start`; logits [n, vocab] after each of them, good until the next
        call."""

    def join(
        self, row: int, piece: list[int], start: int, tokens: list[int], lengths: list[int], *, ends: bool
    ) -> Logits:
        """Read `piece` into `row` behind its first `start` and decode as `decode` does, of rows other than `row`;
        logits [n, vocab] of `decode`, before them those after the piece when it `ends` a prompt [1 + n, vocab]."""

    def apply(self, move: Move) -> None:
        """Copy, exchange or release what lies in rows of the cache."""


class SharedKvRunner:
    """GroupQueryAttention graphs (layouts `calm` and `gqa`) over a KV buffer of [rows, kv_heads, context, head_size]
    per layer and side.

    A decode step binds the first n rows, a prefill step one row, both by pointer into the same buffers, so that
    nothing is copied. On the CPU the buffers are committed by the kernel as they are touched.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        rows: int,
        context: int,
        device: Device,
        *,
        on_device: bool | None = None,
        joint: ort.InferenceSession | None = None,
    ) -> None:
        """`on_device`: drive the cache as memory that this process cannot touch, as on a GPU (the default there).
        `joint`: over the joint graph (`engine.joint`) of the session's."""
        self._session = session
        self._joint = joint
        on_device = device.kind == "cuda" if on_device is None else on_device
        self.compact = not on_device
        self.joins = joint is not None and self.compact  # else free rows lie between, of which one reads
        inputs = {i.name: i for i in session.get_inputs()}
        outputs = [o.name for o in session.get_outputs()]
        past = [name for name in inputs if name.startswith("past")]
        if not past:
            raise UnsupportedModel("The graph has no KV cache inputs (past_key_values.*).", "Export it with past.")
        self._dtype = _DTYPES[inputs[past[0]].type]
        self._pairs = [(name, _present(name, outputs)) for name in past]
        self._masked = "attention_mask" in inputs
        self._positions = "position_ids" in inputs
        shapes = [(int(inputs[name].shape[1]), context, int(inputs[name].shape[3])) for name in past]
        self.cache: Cache = (DeviceCache if on_device else HostCache)(past, rows, shapes, self._dtype, device)
        self.granule = self.cache.granule
        logits = next(o for o in session.get_outputs() if o.name == "logits")
        self.vocab = int(logits.shape[-1])
        self._logits_dtype = _DTYPES[logits.type]
        self.verifies = any(i.name == _LOGITS_FROM for i in session.get_overridable_initializers())
        self._last_only = self.verifies or logits.shape[1] == 1
        self._fixed = not (self._masked or on_device)
        """A mask changes its shape each step, and a CUDA binding copies its inputs when they are bound; all else is
        bound once and filled in place."""
        self._decoding: dict[int, tuple[Any, dict[str, NDArray[Any]], Logits]] = {}
        self._verified: dict[int, Logits] = {}
        self._joined: dict[tuple[int, int], tuple[Any, Logits]] = {}

    def _bind_cache(self, binding: Any, row: int, rows: int, prefix: str = "") -> None:
        cache = self.cache
        for past, present in self._pairs:
            shape, pointer = [rows, *cache.shape(past)], cache.pointer(past, row)
            binding.bind_input(prefix + past, *cache.where, self._dtype, shape, pointer)
            binding.bind_output(prefix + present, *cache.where, self._dtype, shape, pointer)

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

    def _run(self, binding: Any) -> None:
        self._session.run_with_iobinding(binding)

    def prefill(self, row: int, tokens: list[int], start: int) -> Logits:
        ids = np.array([tokens], np.int64)
        arrays = self._inputs(ids, np.array([start], np.int64))
        binding = self._session.io_binding()
        self._bind_cache(binding, row, 1)
        self._bind_step(binding, arrays)
        logits = self._bind_logits(binding, 1, len(tokens))
        self._run(binding)
        return np.asarray(logits[0, -1], dtype=np.float32)

    def verify(self, row: int, tokens: list[int], start: int) -> Logits:
        arrays = self._inputs(np.array([tokens], np.int64), np.array([start], np.int64))
        arrays[_LOGITS_FROM] = np.array([-len(tokens)], np.int64)
        binding = self._session.io_binding()
        self._bind_cache(binding, row, 1)
        self._bind_step(binding, arrays)
        if len(tokens) not in self._verified:
            self._verified[len(tokens)] = np.empty((1, len(tokens), self.vocab), self._logits_dtype)
        logits = self._verified[len(tokens)]
        binding.bind_output("logits", "cpu", 0, self._logits_dtype, list(logits.shape), logits.ctypes.data)
        self._run(binding)
        return np.asarray(logits[0], dtype=np.float32)

    def decode(self, tokens: list[int], lengths: list[int]) -> Logits:
        rows = len(tokens)
        if rows not in self._decoding:
            binding = self._session.io_binding()
            self._bind_cache(binding, 0, rows)
            arrays = self._inputs(np.zeros((rows, 1), np.int64), np.zeros(rows, np.int64))
            self._decoding[rows] = (binding, arrays, self._bind_logits(binding, rows, 1))
            if self._fixed:
                self._bind_step(binding, arrays)
        binding, arrays, logits = self._decoding[rows]
        if self._fixed:
            arrays["input_ids"][:, 0] = tokens
            arrays["seqlens_k"][:] = lengths
            arrays["total_sequence_length"][...] = max(lengths) + 1
            if self._positions:
                arrays["position_ids"][:, 0] = lengths
        else:
            ids = np.array(tokens, np.int64)[:, None]
            arrays = self._inputs(ids, np.array(lengths, np.int64))  # bound by address: they must outlive the run
            self._bind_step(binding, arrays)
        self._run(binding)
        return np.asarray(logits[:, -1], dtype=np.float32)

    def join(
        self, row: int, piece: list[int], start: int, tokens: list[int], lengths: list[int], *, ends: bool
    ) -> Logits:
        assert self._joint is not None
        rows = len(tokens)
        if (row, rows) not in self._joined:  # the row changes with the prompt, and the number when a stream ends
            self._joined.clear()
            binding = self._joint.io_binding()
            self._bind_cache(binding, 0, rows)
            self._bind_cache(binding, row, 1, READING)
            self._joined[row, rows] = (binding, np.empty((1 + rows, self.vocab), self._logits_dtype))
        binding, logits = self._joined[row, rows]
        logits = logits[0 if ends else 1 :]
        binding.bind_output("logits", "cpu", 0, self._logits_dtype, [1, *logits.shape], logits.ctypes.data)
        arrays: dict[str, NDArray[Any]] = {
            "input_ids": np.array([[*piece, *tokens]], np.int64),
            _LOGITS_FROM: np.array([-len(logits)], np.int64),
            PARTS: np.array([len(piece), rows], np.int64),
            "seqlens_k": np.array(lengths, np.int32),
            "total_sequence_length": np.array(max(lengths) + 1, np.int32),
            f"{READING}seqlens_k": np.array([start + len(piece) - 1], np.int32),
            f"{READING}total_sequence_length": np.array(start + len(piece), np.int32),
        }
        self._bind_step(binding, arrays)
        self._joint.run_with_iobinding(binding)
        return np.asarray(logits, dtype=np.float32)

    def apply(self, move: Move) -> None:
        self.cache.apply(move)


class ConcatRunner:
    """Plain exports, whose present is past and new concatenated: each sequence runs alone on arrays of its own."""

    compact = True
    granule = 1
    verifies = joins = False

    def __init__(self, session: ort.InferenceSession, rows: int) -> None:
        self._session = session
        self._inputs = {i.name: i for i in session.get_inputs()}
        self._outputs = [o.name for o in session.get_outputs()]
        self._past = [name for name in self._inputs if name.startswith("past")]
        logits = next(o for o in session.get_outputs() if o.name == "logits")
        self.vocab = int(logits.shape[-1])
        self._rows: list[dict[str, NDArray[Any]]] = [{} for _ in range(rows)]

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

    def verify(self, row: int, tokens: list[int], start: int) -> Logits:
        raise NotImplementedError("plain exports give the logits of the last token")

    def join(
        self, row: int, piece: list[int], start: int, tokens: list[int], lengths: list[int], *, ends: bool
    ) -> Logits:
        raise NotImplementedError("plain exports run each sequence alone")

    def decode(self, tokens: list[int], lengths: list[int]) -> Logits:
        return np.stack([self._run(row, [t], n) for row, (t, n) in enumerate(zip(tokens, lengths, strict=True))])

    def apply(self, move: Move) -> None:
        rows = self._rows
        match move:
            case Copy(source, target, length):
                rows[target] = {name: array[:, :, :length] for name, array in rows[source].items()}
            case Swap(source, target):
                rows[source], rows[target] = rows[target], rows[source]
            case Release(row, keep):
                rows[row] = {name: array[:, :, :keep].copy() for name, array in rows[row].items()} if keep else {}


def _present(past: str, outputs: list[str]) -> str:
    """The output that continues a past input: `past_key_values.0.key` goes on as `present.0.key`."""
    for prefix in ("past_key_values", "past_key", "past_value", "past"):
        if past.startswith(prefix):
            rest = past.removeprefix(prefix)
            for name in (f"present{rest}", f"present_key_values{rest}", past.replace("past", "present", 1)):
                if name in outputs:
                    return name
    raise UnsupportedModel(f"The graph has no output that continues {past}.", "Export it with past.")
