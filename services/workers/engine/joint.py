"""A graph that reads a piece of one prompt and gives others their next token in the same pass over the weights.

Made of an ordinary graph of layout `calm`: the piece and, behind it, one token of each decoding row are one sequence
for everything but attention, which is split in two, each part over its own rows of the cache (chunked prefill of
Agrawal et al., Sarathi, 2023). The weights stay in the file that the ordinary graph has them in.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx import ModelProto

FILE = "joint.onnx"
READING = "reading."
"""Before the names of the inputs and outputs that belong to the prompt; those of the decoding rows keep theirs."""
PARTS = "parts"
"""Input: how many tokens are the prompt's, and how many rows decode."""
_LENGTHS = ("seqlens_k", "total_sequence_length")
_CACHED = 7
"""Inputs of GroupQueryAttention up to its lengths: query, key, value, past key and value, the two lengths."""
_TABLES = 9
"""Inputs up to its rotary tables; what follows would have to be split as well."""


def write(folder: Path, graph: str = "model.onnx") -> Path | None:
    """Make the joint graph of the one in `folder`, beside it; None where that cannot be joined."""
    import onnx  # noqa: PLC0415 20 MB of memory, for whoever packs weights alone

    model = joined(onnx.load(str(folder / graph), load_external_data=False))
    if model is None:
        return None
    (folder / FILE).write_bytes(model.SerializeToString())
    return folder / FILE


def joined(model: ModelProto) -> ModelProto | None:
    """The same model with attention in two parts; None where anything else depends on whose token it is."""
    from onnx import TensorProto, helper  # noqa: PLC0415

    result = type(model)()
    result.CopyFrom(model)
    graph = result.graph
    inputs = {i.name: i for i in graph.input}
    outputs = {o.name: o for o in graph.output}
    nodes: list[Any] = []
    cached: set[str] = set()
    if not {"input_ids", "logits_from", *_LENGTHS} <= set(inputs):
        return None
    for node in graph.node:
        if node.op_type != "GroupQueryAttention":
            if not set(node.input).isdisjoint({n for n in inputs if n.startswith("past")} | set(_LENGTHS)):
                return None
            nodes.append(node)
            continue
        if any(node.input[_TABLES:]):
            return None
        parts, attention = _split(node, helper.make_node)
        nodes += [*parts, *attention]
        cached |= {*node.input[3:_CACHED], *node.output[1:3]}
    del graph.node[:]
    graph.node.extend(nodes)
    for kind, described in ((graph.input, inputs), (graph.output, outputs)):
        for name in [name for name in described if name in cached]:
            other = kind.add()
            other.CopyFrom(described[name])
            other.name = READING + name
            _rename_batch(other)
    _rename_batch(inputs["input_ids"])
    _rename_batch(outputs["logits"])
    graph.input.append(helper.make_tensor_value_info(PARTS, TensorProto.INT64, [2]))
    return result


def _split(node: Any, make_node: Any) -> tuple[list[Any], list[Any]]:
    """Nodes that take the prompt's part and the decoding rows' apart, and attention over each, put together again."""
    before: list[Any] = []
    sides: tuple[list[str], list[str]] = ([], [])
    for name in node.input[:3]:
        names = [f"{name}.{part}" if name else "" for part in ("prompt", "row", "rows")]
        if name:
            before.append(make_node("Split", [name, PARTS], names[:2], axis=1))
            before.append(make_node("Transpose", [names[1]], [names[2]], perm=[1, 0, 2]))  # [1, n, ...] to [n, 1, ...]
        sides[0].append(names[0])
        sides[1].append(names[2])
    rest, presents, output = list(node.input[3:]), list(node.output[1:3]), node.output[0]
    cut = _CACHED - 3
    reading, decoding = type(node)(), type(node)()
    for part, name in ((reading, "prompt"), (decoding, "rows")):
        part.CopyFrom(node)
        part.name = f"{node.name or output}.{name}"
        del part.input[:], part.output[:]
    reading.input.extend([*sides[0], *(READING + name for name in rest[:cut]), *rest[cut:]])
    decoding.input.extend([*sides[1], *rest])
    reading.output.extend([f"{output}.prompt", *(READING + name for name in presents)])
    decoding.output.extend([f"{output}.rows", *presents])
    return before, [
        reading,
        decoding,
        make_node("Transpose", [f"{output}.rows"], [f"{output}.row"], perm=[1, 0, 2]),
        make_node("Concat", [f"{output}.prompt", f"{output}.row"], [output], axis=1),
    ]


def _rename_batch(value: Any) -> None:
    """What the prompt and the decoding rows share is one sequence: its first dimension is not their number."""
    shape = value.type.tensor_type.shape
    if shape.dim and shape.dim[0].dim_param:
        shape.dim[0].dim_param = "one"
