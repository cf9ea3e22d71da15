"""Runs a converted graph the way the engine does, with nothing around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from shared.models.manifest import Manifest

Floats = NDArray[np.float32]


class Decoder:
    """A converted graph over a KV cache bound in place, as the engine uses it."""

    def __init__(self, file: Path, manifest: Manifest, rows: int = 1, length: int = 64) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        a = manifest.architecture
        self._vocab = a.vocab
        past = next(i.type for i in self._session.get_inputs() if i.name.startswith("past"))
        dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[past]
        self._caches = {
            f"{layer}.{side}": np.zeros((rows, a.kv_heads, length, a.head_size), dtype)
            for layer in range(a.layers)
            for side in ("key", "value")
        }

    def step(self, ids: list[list[int]], before: list[int]) -> Floats:
        """Logits [batch, vocab] after `ids` [batch, seq] behind `before` [batch] tokens."""
        tokens, past = np.array(ids, np.int64), np.array(before, np.int32)
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": tokens,
            "seqlens_k": (past + tokens.shape[1] - 1).astype(np.int32),
            "total_sequence_length": np.array(past.max() + tokens.shape[1], np.int32),
        }
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, list(array.shape), array.ctypes.data)
        for side, cache in self._caches.items():
            where = ("cpu", 0, cache.dtype.type, list(cache.shape), cache.ctypes.data)
            binding.bind_input(f"past_key_values.{side}", *where)
            binding.bind_output(f"present.{side}", *where)
        logits = np.full((len(ids), 1, self._vocab), np.nan, np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, list(logits.shape), logits.ctypes.data)
        self._session.run_with_iobinding(binding)
        return logits[:, 0]
