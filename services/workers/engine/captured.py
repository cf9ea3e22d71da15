"""Decoding by CUDA graphs: a step is captured once for each number of rows, and then launched as a whole.

What a graph reads and writes lies where it lay when it was captured. So each number of rows has buffers on the device
of its own, which are written before a run and read after it:

- Ids, lengths and positions are one buffer, so that a step copies once. `OrtValue.update_inplace` returns when the copy
  has ended, and a run when its stream has: neither needs a synchronisation of ours.
- `total_sequence_length`, which GroupQueryAttention reads on the host, is the whole context. A graph keeps what it was
  captured with, and the operator takes it for the most that any row may hold: how many each holds, it reads on the
  device (`seqlens_k`). As onnxruntime-genai does, whose mask is as long as the context then.
- Rows are rounded up, so that few graphs are kept. Rows that nobody asked for read a token behind what they hold.

ONNX Runtime keeps graphs by thread: the engine thread captures, with the first step of so many rows. Everything else
runs with the graph id -1, which neither captures nor replays. The first failure ends capturing, and decoding goes on as
`SharedKvRunner` does it. docs/decisions/0034-cuda-graphs.md says what is known of it all.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import structlog
from numpy.typing import NDArray

from services.workers.engine.runner import Logits, SharedKvRunner
from services.workers.engine.schedule import Copy, Move, Release
from services.workers.engine.session import open_session
from shared.errors import UnsupportedModel
from shared.messages import Device

GRAPH_ID = "gpu_graph_id"
"""Run option: the number of the graph to capture or replay. 0 is ONNX Runtime's own."""
NO_GRAPH = -1
_numbers = itertools.count(1)
"""Never twice in a process: a session would replay another runner's graph over addresses that are gone."""
_ALIGNED = 256
"""Bytes that each part of a buffer begins at a multiple of, as CUDA's own allocations do."""
_COARSE = 8


def width(rows: int, most: int) -> int:
    """Rows of the graph that runs `rows` of them: 1, 2, 4, 8, 16, 24, ... and never more than there are (`most`)."""
    wide = 1 << (rows - 1).bit_length() if rows <= _COARSE else -(-rows // _COARSE) * _COARSE
    return min(wide, most)


def open_capturing(model: Path, context: int, device: Device, log: Any = None) -> ort.InferenceSession | None:
    """A session whose runs over rows of `context` tokens can be captured; None, and a line in the log, when ONNX
    Runtime refuses to."""
    try:
        return open_session(model, device, device.threads, graph=without_copies(model, context), cuda_graphs=True)
    except UnsupportedModel as error:
        _say_off(log, error)
        return None


def without_copies(model: Path, context: int) -> bytes | None:
    """The graph of `model` for rows of `context` tokens with nothing copied between host and device within it, or None
    where nothing is: with one copy ONNX Runtime captures no graph.

    Graphs that rotate by nodes of their own read shapes on the device, and shapes are the host's: the length of a step,
    which is counted on the device instead; and that of a row, to choose between two rotations, of which one is left.
    """
    import onnx  # noqa: PLC0415 20 MB of memory, for this alone

    proto = onnx.load(str(model), load_external_data=False)
    changed = _count_on_device(proto.graph)
    for node in list(proto.graph.node):
        if node.op_type == "Where" and node.output[0].endswith(".chosen"):
            _choose(proto.graph, node, context)
            changed = True
    return bytes(proto.SerializeToString()) if changed else None


def _count_on_device(graph: Any) -> bool:
    """Have the length of a step counted out of `input_ids`, where it is subtracted from what lies on the device."""
    from onnx import TensorProto, helper  # noqa: PLC0415

    nodes = list(graph.node)
    place = next((i for i, node in enumerate(nodes) if "rotation.before" in node.output), None)
    if place is None:
        return False
    same, ones, axis, length = (f"rotation.counted.{part}" for part in ("same", "ones", "axis", "length"))
    counted = [
        helper.make_node("Equal", ["input_ids", "input_ids"], [same]),
        helper.make_node("Cast", [same], [ones], to=TensorProto.INT64),
        helper.make_node("ReduceSum", [ones, axis], [length], keepdims=0),
    ]
    graph.initializer.append(helper.make_tensor(axis, TensorProto.INT64, [1], [1]))
    nodes[place].input[1] = length
    del graph.node[:]
    graph.node.extend([*nodes[:place], *counted, *nodes[place:]])
    return True


def _choose(graph: Any, choice: Any, context: int) -> None:
    """Put the rotation of rows of `context` tokens in the place of the choice, and leave out what chose."""
    from onnx import numpy_helper  # noqa: PLC0415

    _, beyond, within = choice.input
    name = choice.output[0]
    parts = {f"{name.removesuffix('.chosen')}.{part}" for part in ("cache", "capacity", "longer", "chosen")}
    original = next(tensor for tensor in graph.initializer if tensor.name == name.replace(".chosen", ".original"))
    chosen = beyond if context > int(numpy_helper.to_array(original).item()) else within
    kept = [node for node in graph.node if node.output[0] not in parts]
    for node in kept:
        for place, read in enumerate(node.input):
            if read == name:
                node.input[place] = chosen
    del graph.node[:]
    graph.node.extend(kept)


@dataclass
class _Step:
    """A graph of so many rows, and what it reads and writes."""

    binding: Any
    options: ort.RunOptions
    staged: NDArray[np.uint8]
    """What goes to the device next; `parts` are views of it."""
    parts: dict[str, NDArray[Any]]
    there: ort.OrtValue
    logits: ort.OrtValue
    captured: bool = False


class CapturedRunner(SharedKvRunner):
    """Drives a session of `open_capturing`, over rows that stay where they are. For graphs that are told lengths, not
    masks. On a CPU all is done but the capturing, of which its sessions know nothing."""

    def __init__(
        self, session: ort.InferenceSession, rows: int, context: int, device: Device, *, log: Any = None
    ) -> None:
        super().__init__(session, rows, context, device, on_device=True)
        self.capturing = not self._masked
        """Nothing has failed yet."""
        self._rows = rows
        self._log = log
        self._total = np.array(context, np.int32)
        self._held = np.zeros(rows, np.int32)
        """Tokens up to which a row may hold what is still wanted."""
        self._apart = _options(NO_GRAPH)
        self._steps: dict[int, _Step] = {}
        self._scores: ort.OrtValue | None = None

    def decode(self, tokens: list[int], lengths: list[int]) -> Logits:
        logits = self._launch(tokens, lengths) if self.capturing else None
        if logits is None:
            logits = super().decode(tokens, lengths)
        self._held[: len(tokens)] = np.add(lengths, 1)
        return logits

    def prefill(self, row: int, tokens: list[int], start: int) -> Logits:
        self._held[row] = start + len(tokens)
        return super().prefill(row, tokens, start)

    def verify(self, row: int, tokens: list[int], start: int) -> Logits:
        self._held[row] = start + len(tokens)
        return super().verify(row, tokens, start)

    def apply(self, move: Move) -> None:
        super().apply(move)
        match move:
            case Copy(_, target, length):
                self._held[target] = length
            case Release(row, keep):
                self._held[row] = min(self._held[row], keep)

    def _run(self, binding: Any) -> None:
        self._session.run_with_iobinding(binding, self._apart)

    def _launch(self, tokens: list[int], lengths: list[int]) -> Logits | None:
        """A decode step by its graph, which the first one captures; None when that failed."""
        rows, wide = len(tokens), width(len(tokens), self._rows)
        try:
            if wide not in self._steps:
                self._steps[wide] = self._step(wide)
            step = self._steps[wide]
            self._fill(step.parts, tokens, lengths)
            step.there.update_inplace(step.staged)
            self._session.run_with_iobinding(step.binding, step.options)
        except Exception as error:
            if wide in self._steps and self._steps[wide].captured:
                raise
            self.capturing = False
            self._steps.clear()
            self._scores = None
            _say_off(self._log, error)
            return None
        step.captured = True
        return np.asarray(step.logits.numpy()[:rows, -1], dtype=np.float32)

    def _fill(self, parts: dict[str, NDArray[Any]], tokens: list[int], lengths: list[int]) -> None:
        rows, places = len(tokens), parts["seqlens_k"]
        parts["input_ids"][:rows, 0] = tokens
        parts["input_ids"][rows:, 0] = 0
        places[:rows] = lengths
        # A full row loses its last token's keys, which nobody reads: an answer ends with a token that is not read.
        places[rows:] = np.minimum(self._held[rows : len(places)], self._total - 1)
        if "position_ids" in parts:
            parts["position_ids"][:, 0] = places

    def _step(self, rows: int) -> _Step:
        binding, where = self._session.io_binding(), self.cache.where
        if self._scores is None:  # all graphs write their logits to the same place
            shape = [self._rows, 1, self.vocab]
            self._scores = ort.OrtValue.ortvalue_from_shape_and_type(shape, self._logits_dtype, *where)
        shape = [rows, 1, self.vocab]
        binding.bind_output("logits", *where, self._logits_dtype, shape, self._scores.data_ptr())
        (logits,) = binding.get_outputs()  # before there are others: of just this shape, so that no more is copied
        self._bind_cache(binding, 0, rows)
        sizes = {"input_ids": (np.int64, (rows, 1)), "seqlens_k": (np.int32, (rows,))}
        if self._positions:
            sizes["position_ids"] = (np.int64, (rows, 1))
        starts, end = {}, 0
        for name, (dtype, _) in sizes.items():
            starts[name], end = end, end + -(-rows * np.dtype(dtype).itemsize // _ALIGNED) * _ALIGNED
        staged = np.zeros(end, np.uint8)
        there = ort.OrtValue.ortvalue_from_shape_and_type([end], np.uint8, *where)
        parts: dict[str, NDArray[Any]] = {}
        for name, (dtype, dims) in sizes.items():
            parts[name] = np.ndarray(dims, dtype, staged, starts[name])
            binding.bind_input(name, *where, dtype, list(dims), there.data_ptr() + starts[name])
        self._bind_step(binding, {"total_sequence_length": self._total})
        return _Step(binding, _options(next(_numbers)), staged, parts, there, logits)


def _options(graph: int) -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry(GRAPH_ID, str(graph))
    return options


def _say_off(log: Any, error: Exception) -> None:
    (log or structlog.get_logger()).warning("cuda_graphs_off", reason=str(error))
