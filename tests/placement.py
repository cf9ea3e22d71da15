"""Where ONNX Runtime puts the nodes of a graph when a session asks for CUDA, and what it must then copy: its own rules,
as its source has them (core/framework/fallback_cpu_capability.cc), applied to a graph without a GPU.

Every operator of our graphs is taken to have a kernel for CUDA. Then a node runs on the host if something that it reads
is there (a shape), and everything else that it reads is there too or is a constant of few numbers or an input of the
graph; but not if its CUDA kernel wants that on the host anyway. What a node on the device reads from the host, or one
on the host from the device, has to be copied; with one copy ONNX Runtime captures no graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import onnx
from onnx import TensorProto

SMALL = 100
GIVES_ON_HOST = ("Shape", "Size")
READS_ON_HOST = {
    "Reshape": (1,), "Range": (0, 1, 2), "Slice": (1, 2, 3, 4), "Split": (1,), "Unsqueeze": (1,), "Squeeze": (1,),
    "ReduceSum": (1,), "ReduceProd": (1,), "Expand": (1,), "GroupQueryAttention": (6,),
}  # fmt: skip
"""Inputs that an operator's CUDA kernel reads in host memory."""


def copies(model: bytes, on_host: tuple[str, ...]) -> Iterator[str]:
    """`node <- value` for each value that would be copied between host and device within the graph; the graph's inputs
    lie on the device, but for those in `on_host`."""
    graph = onnx.load_from_string(model).graph
    constants = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    half = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT16}
    given = {i.name for i in graph.input if i.name not in constants}
    host: set[str] = set()
    placed: dict[str, bool] = {}
    for node in graph.node:
        placed[node.output[0]] = _on_host(node, host, constants, half, given)
        if placed[node.output[0]] or node.op_type in GIVES_ON_HOST:
            host.update(node.output)
    for node in graph.node:
        wanted = READS_ON_HOST.get(node.op_type, ())
        for place, name in enumerate(node.input):
            if not name or name in constants:  # a constant lies where it is read
                continue
            there = name in host or name in on_host
            if node.op_type in GIVES_ON_HOST and not placed[node.output[0]]:
                continue  # a shape is read without what it is the shape of
            if there != (placed[node.output[0]] or place in wanted):
                yield f"{node.output[0]} <- {name}"


def _on_host(node: Any, host: set[str], constants: dict[str, int], half: set[str], given: set[str]) -> bool:
    if not any(name in host for name in node.input):
        return False
    for place, name in enumerate(node.input):
        if name in half:
            return False
        if constants.get(name, SMALL + 1) <= SMALL or name in given:
            continue
        if name not in host or place in READS_ON_HOST.get(node.op_type, ()):
            return False
    return True
