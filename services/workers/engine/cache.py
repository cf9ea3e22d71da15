"""The memory of a KV cache: rows that a graph reads and writes in place, copied, exchanged and released."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from services.workers.engine.schedule import Copy, Move, Release, Swap
from services.workers.engine.session import open_session
from shared.messages import Device

Shape = tuple[int, int, int]
"""KV heads, context, head size: of one row."""


class Cache(Protocol):
    """One buffer [rows, *shape] for each name (a layer's keys, or its values)."""

    where: tuple[str, int]
    """Device name and index, as ONNX Runtime's bindings want them."""
    granule: int
    """Memory of a row is taken by so many tokens at once."""

    def shape(self, name: str) -> Shape: ...

    def pointer(self, name: str, row: int) -> int:
        """Address of a row."""

    def apply(self, move: Move) -> None: ...


class HostCache:
    """In host memory, which the kernel commits as it is written, and takes back page by page on release."""

    where = ("cpu", 0)

    def __init__(
        self, names: list[str], rows: int, shapes: list[Shape], dtype: type[np.generic], _device: Device
    ) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}
        self._maps: dict[str, mmap.mmap] = {}
        for name, shape in zip(names, shapes, strict=True):
            size = rows * int(np.prod(shape)) * np.dtype(dtype).itemsize
            self._maps[name] = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._arrays[name] = np.frombuffer(self._maps[name], dtype).reshape(rows, *shape)
        self.granule = max(-(-mmap.PAGESIZE // (shape[2] * np.dtype(dtype).itemsize)) for shape in shapes)

    def shape(self, name: str) -> Shape:
        heads, context, size = self._arrays[name].shape[1:]
        return heads, context, size

    def pointer(self, name: str, row: int) -> int:
        array = self._arrays[name]
        return int(array.ctypes.data) + row * array.strides[0]

    def apply(self, move: Move) -> None:
        match move:
            case Copy(source, target, length):
                if source != target:
                    for array in self._arrays.values():
                        array[target, :, :length] = array[source, :, :length]
            case Swap(source, target, length, back):
                for array in self._arrays.values():
                    kept = array[target, :, :back].copy()
                    array[target, :, :length] = array[source, :, :length]
                    array[source, :, :back] = kept
            case Release(row, keep):
                self._release(row, keep)

    def _release(self, row: int, keep: int) -> None:
        """Give whole pages behind the first `keep` tokens back; they read as zeros if they are ever read again."""
        for name, array in self._arrays.items():
            head = array.strides[1]
            for index in range(array.shape[1]):
                start = row * array.strides[0] + index * head + keep * array.strides[2]
                end = row * array.strides[0] + (index + 1) * head
                start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
                if end > start:
                    self._maps[name].madvise(mmap.MADV_DONTNEED, start, end - start)


class DeviceCache:
    """In memory that only the device touches: allocated once and copied by graphs of one operator."""

    def __init__(
        self, names: list[str], rows: int, shapes: list[Shape], dtype: type[np.generic], device: Device
    ) -> None:
        self.where = ("cuda", device.index) if device.kind == "cuda" else ("cpu", 0)
        self.granule = max(shape[1] for shape in shapes)
        self._dtype = dtype
        self._shapes = dict(zip(names, shapes, strict=True))
        self._maker, self._copier = _maker(dtype, device), _copier(dtype, device)
        self._buffers = {name: self._allocate((rows, *shape)) for name, shape in self._shapes.items()}

    def _allocate(self, shape: tuple[int, ...]) -> Any:
        """Zeros, in memory of a session that takes what it is asked for (`cuda_options`): an `OrtValue` that is made
        without one lies in an arena of its own, which grows by powers of two."""
        binding = self._maker.io_binding()
        binding.bind_cpu_input("shape", np.array(shape, np.int64))
        binding.bind_output("y", *self.where)
        self._maker.run_with_iobinding(binding)
        return binding.get_outputs()[0]

    def shape(self, name: str) -> Shape:
        return self._shapes[name]

    def pointer(self, name: str, row: int) -> int:
        return int(self._buffers[name].data_ptr()) + row * self._size(name)

    def _size(self, name: str) -> int:
        return int(np.prod(self._shapes[name])) * np.dtype(self._dtype).itemsize

    def apply(self, move: Move) -> None:
        match move:
            case Copy(source, target) if source != target:
                for name in self._buffers:  # whole rows: the tokens of a row are not contiguous over its heads
                    self._copy(name, self.pointer(name, source), self.pointer(name, target))
            case Swap():
                raise AssertionError("rows on a device need not be compact")

    def _copy(self, name: str, source: int, target: int) -> None:
        binding, count = self._copier.io_binding(), [int(np.prod(self._shapes[name]))]
        binding.bind_input("x", *self.where, self._dtype, count, source)
        binding.bind_output("y", *self.where, self._dtype, count, target)
        self._copier.run_with_iobinding(binding)


def _copier(dtype: type[np.generic], device: Device) -> ort.InferenceSession:
    return _session("Identity", "x", dtype, dtype, device)


def _maker(dtype: type[np.generic], device: Device) -> ort.InferenceSession:
    return _session("ConstantOfShape", "shape", np.int64, dtype, device, value=np.zeros(1, dtype))


def _session(
    op: str, name: str, takes: type[np.generic], gives: type[np.generic], device: Device, **attributes: NDArray[Any]
) -> ort.InferenceSession:
    """A graph of one operator, from the vector `name` to `y`. Raises what `open_session` does."""
    from onnx import helper, numpy_helper  # noqa: PLC0415 20 MB of memory, for devices alone

    kinds = [helper.np_dtype_to_tensor_dtype(np.dtype(kind)) for kind in (takes, gives)]
    x, y = helper.make_tensor_value_info(name, kinds[0], ["n"]), helper.make_tensor_value_info("y", kinds[1], None)
    tensors = {key: numpy_helper.from_array(value) for key, value in attributes.items()}
    graph = helper.make_graph([helper.make_node(op, [name], ["y"], **tensors)], op, [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return open_session(Path(op), device, 1, graph=model.SerializeToString())
