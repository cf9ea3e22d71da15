"""Several LoRA adapters over one base in one batch: their tensors are inputs of the graph, chosen by row.

All adapters' A stand side by side [in, R], all B below each other [R, out], R being the sum of their ranks; a mask
[rows, 1, R] leaves each row the ranks of its own adapter, or none. So a step reads each tensor once, however many rows
use it, and rows of different adapters and ranks run together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from services.workers.engine.runner import SharedKvRunner
from shared.errors import ModelMissing, UnsupportedModel
from shared.messages import Device
from shared.models.lora import SITES, Adapter

Floats = NDArray[Any]
"""float32, or float16 in a graph that computes in it."""

APART = 1 << 32
"""Between the keys of one token under two adapters: their keys and values differ, so that no prefix may be shared."""
_SITE = re.compile(rf"(layer\d+\.({'|'.join(SITES)}))\.out")


class Choice(Protocol):
    """Which adapter each row of the next call uses."""

    def number(self, adapter: str) -> int:
        """The number of an adapter; 0 for none. Raises ModelMissing when the engine does not hold it."""

    def select(self, numbers: Sequence[int]) -> None:
        """One number for each row."""


class Stack:
    """The adapters of an engine, stacked; and the masks of the next call. Nothing is stacked without any."""

    def __init__(self, adapters: Mapping[str, Adapter] | None = None) -> None:
        adapters = adapters or {}
        self._numbers = {name: index + 1 for index, name in enumerate(adapters)}
        self.sites: dict[str, tuple[Floats, Floats]] = {}
        """A [in, R] and B [R, out] by site."""
        self._owners: dict[str, NDArray[np.int64]] = {}
        for site in dict.fromkeys(s for adapter in adapters.values() for s in adapter):
            held = [(self._numbers[name], a[site]) for name, a in adapters.items() if site in a]
            self.sites[site] = (
                np.ascontiguousarray(np.concatenate([pair.a for _, pair in held], axis=1)),
                np.ascontiguousarray(np.concatenate([pair.b for _, pair in held], axis=0)),
            )
            self._owners[site] = np.repeat([n for n, _ in held], [pair.a.shape[1] for _, pair in held])
        self._layouts = {owners.tobytes(): owners for owners in self._owners.values()}
        self._mask_of = {site: f"lora.mask{list(self._layouts).index(o.tobytes())}" for site, o in self._owners.items()}
        self._masks: dict[int, dict[str, Floats]] = {}
        self._dtype: type[np.generic] = np.float32
        self._query_scale = 1.0

    def cast(self, dtype: type[np.generic]) -> None:
        """Keep tensors and masks in the type that the graph computes in."""
        self._dtype = dtype
        self.sites = {site: (a.astype(dtype), b.astype(dtype)) for site, (a, b) in self.sites.items()}
        self._masks.clear()

    def scale_queries(self, width: int, scale: float) -> None:
        """Multiply what is added to queries, the first `width` of what `qkv` gives, as the base's weights have been;
        the same again changes nothing."""
        for site, (_, b) in self.sites.items():
            if site.endswith(".qkv"):
                b[:, :width] *= scale / self._query_scale
        self._query_scale = scale

    @property
    def weights_bytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self.sites.values())

    def mask_of(self, site: str) -> str:
        """The input that masks a site; sites whose ranks belong to the same adapters share one."""
        return self._mask_of[site]

    def masks(self, rows: int) -> dict[str, Floats]:
        """The masks [rows, 1, R] of calls with so many rows; always the same arrays."""
        if rows not in self._masks:
            self._masks[rows] = {
                f"lora.mask{index}": np.zeros((rows, 1, owners.size), self._dtype)
                for index, owners in enumerate(self._layouts.values())
            }
        return self._masks[rows]

    def number(self, adapter: str) -> int:
        if not adapter:
            return 0
        if adapter not in self._numbers:
            raise ModelMissing(
                f"The engine does not hold the adapter {adapter!r}.", "Its card is newer than the engine: try again."
            )
        return self._numbers[adapter]

    def select(self, numbers: Sequence[int]) -> None:
        if not self.sites:
            return
        for mask, owners in zip(self.masks(len(numbers)).values(), self._layouts.values(), strict=True):
            np.equal(owners[None, None, :], np.asarray(numbers)[:, None, None], out=mask, casting="unsafe")


class AdaptedRunner(SharedKvRunner):
    """A runner of a graph made by `adapted`, which feeds it the stack's tensors and masks."""

    def __init__(
        self, session: ort.InferenceSession, rows: int, context: int, device: Device, stack: Stack, **more: Any
    ) -> None:
        self._stack = stack
        super().__init__(session, rows, context, device, **more)
        where = self.cache.where
        self._tensors = {
            f"{site}.lora_{side}": ort.OrtValue.ortvalue_from_numpy(array, *where)
            for site, sides in stack.sites.items()
            for side, array in zip("ab", sides, strict=True)
        }

    def _bind_cache(self, binding: Any, row: int, rows: int, prefix: str = "") -> None:
        super()._bind_cache(binding, row, rows, prefix)
        for name, value in self._tensors.items():
            binding.bind_ortvalue_input(name, value)

    def _bind_step(self, binding: Any, arrays: dict[str, NDArray[Any]]) -> None:
        super()._bind_step(binding, {**arrays, **self._stack.masks(arrays["input_ids"].shape[0])})


def adapted(model: Path, stack: Stack) -> bytes:
    """The graph of `model` with inputs for the stack's tensors; its weights stay in the file beside it.

    Raises:
        UnsupportedModel: the graph is not one of ours, or has no such layers.
    """
    import onnx  # noqa: PLC0415 20 MB of memory, for engines with adapters alone
    from onnx import TensorProto, helper  # noqa: PLC0415

    from shared.models.onnx_graph import QUERY_SCALE  # noqa: PLC0415 it imports onnx

    proto = onnx.load(str(model), load_external_data=False)
    cached = next((i for i in proto.graph.input if i.name.startswith("past")), None)
    half = cached is not None and cached.type.tensor_type.elem_type == TensorProto.FLOAT16
    scale = next((float(p.value) for p in proto.metadata_props if p.key == QUERY_SCALE), 1.0)
    attending = next((n for n in proto.graph.node if n.op_type == "GroupQueryAttention"), None)
    if cached is not None and attending is not None:
        heads = next(a.i for a in attending.attribute if a.name == "num_heads")
        stack.scale_queries(heads * cached.type.tensor_type.shape.dim[3].dim_value, scale)
    stack.cast(np.float16 if half else np.float32)
    nodes: list[Any] = []
    left = set(stack.sites)
    read: dict[str, str] = {}
    """By output, what was multiplied to give it; gate and up come out of one matrix, which is then split."""
    for node in proto.graph.node:
        nodes.append(node)
        if node.op_type in ("MatMul", "MatMulNBits"):
            read[node.output[0]] = node.input[0].removesuffix(".wide")
        elif node.op_type in ("Split", "Add") and node.input[0] in read:  # an Add adds the bias
            read.update(dict.fromkeys(node.output, read[node.input[0]]))
        for place, output in enumerate(node.output):
            match = _SITE.fullmatch(output) if output in read else None
            if match is None or match[1] not in left:
                continue
            site = match[1]
            left.discard(site)
            base = node.output[place] = f"{site}.base"
            names = [f"{site}.lora_{part}" for part in ("down", "masked", "up")]
            nodes += [
                helper.make_node("MatMul", [read[output], f"{site}.lora_a"], [names[0]]),
                helper.make_node("Mul", [names[0], stack.mask_of(site)], [names[1]]),
                helper.make_node("MatMul", [names[1], f"{site}.lora_b"], [names[2]]),
                helper.make_node("Add", [base, names[2]], [output]),
            ]
    if left:
        raise UnsupportedModel(
            f"The graph has no {min(left)} that could be adapted.",
            "Adapters need a model that CALM imported itself (GGUF or safetensors): add it again.",
        )
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    described = {
        **{f"{site}.lora_{side}": v.shape for site, s in stack.sites.items() for side, v in zip("ab", s, strict=True)},
        **{name: ["batch", 1, mask.shape[2]] for name, mask in stack.masks(1).items()},
    }
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    proto.graph.input.extend(helper.make_tensor_value_info(n, kind, s) for n, s in described.items())
    return bytes(proto.SerializeToString())
