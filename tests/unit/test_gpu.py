"""Which GPU a worker has: CUDA's numbers in NVML's terms. NVML is a stand-in; no GPU has been asked."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import pytest

import shared
from services.workers import gpu
from services.workers.device import described
from services.workers.engine.session import cuda_options
from shared.settings import Settings


class NVMLError(Exception):
    """As pynvml's."""


@dataclass
class FakeNvml:
    """Three GPUs, of which those in `slices` are divided; the calls of pynvml that are used."""

    NVMLError = NVMLError
    slices: dict[int, list[str | None]] = field(default_factory=dict)
    uuids: tuple[str, ...] = ("GPU-aa11", "GPU-aa22", "GPU-bb33")

    def nvmlInit(self) -> None:  # noqa: N802 NVML's names
        return None

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.uuids)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        if index >= len(self.uuids):
            raise NVMLError("Invalid Argument")
        return self.uuids[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid not in [s for slices in self.slices.values() for s in slices]:
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetUUID(self, handle: str) -> bytes:  # noqa: N802
        return handle.encode()

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802
        return f"name of {handle}"

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:  # noqa: N802
        if self.uuids.index(handle) not in self.slices:
            raise NVMLError("Not Supported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:  # noqa: N802
        return len(self.slices[self.uuids.index(handle)])

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, number: int) -> str:  # noqa: N802
        found = self.slices[self.uuids.index(handle)][number]
        if found is None:
            raise NVMLError("Not Found")
        return found

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> object:  # noqa: N802
        return type("Memory", (), {"total": 10 if handle.startswith("MIG-") else 80})


@pytest.mark.parametrize(
    ("visible", "index", "meant"),
    [
        (None, 0, "GPU-aa11"),
        (None, 2, "GPU-bb33"),
        (None, 3, None),
        ("", 0, None),
        ("2,0", 0, "GPU-bb33"),
        ("2,0", 1, "GPU-aa11"),
        ("2, 0", 2, None),
        ("GPU-bb33", 0, "GPU-bb33"),
        ("GPU-bb", 0, "GPU-bb33"),
        ("GPU-aa", 0, None),  # the beginning of two
        ("1,-1,0", 0, "GPU-aa22"),
        ("1,-1,0", 2, None),
        ("7,0", 1, None),
    ],
)
def test_cuda_s_number_is_translated(visible: str | None, index: int, meant: str | None) -> None:
    """By number and by UUID or its beginning; the first entry that means nothing ends the list; empty hides all."""
    found = described(FakeNvml(), index, visible)
    assert (found.uuid if found else None) == meant


def test_a_slice_is_a_device_of_its_own() -> None:
    """Named, or the first of a GPU in slices: with its own memory, which is what may be promised."""
    nvml = FakeNvml(slices={0: [None, "MIG-1", "MIG-2"]})
    for visible, meant in ((None, "MIG-1"), ("0", "MIG-1"), ("MIG-2", "MIG-2")):
        found = described(nvml, 0, visible)
        assert found is not None
        assert (found.uuid, found.memory_bytes, found.name) == (meant, 10, f"name of {meant}")
    assert described(FakeNvml(slices={0: [None]}), 0, None) is None
    assert described(nvml, 0, "MIG-9") is None
    assert described(nvml, 1, None) is not None


def test_a_device_that_is_not_there_is_a_lookup_error() -> None:
    """What was asked for stands in it."""
    with pytest.raises(LookupError, match="lists no device 1"):
        gpu.handle_of(FakeNvml(), 1, "0")


@pytest.mark.parametrize(("environ", "seen"), [({}, None), ({"CUDA_VISIBLE_DEVICES": ""}, ""), (
    {"CUDA_VISIBLE_DEVICES": "1", "CALM_CUDA_VISIBLE_DEVICES": "2"}, "1")])  # fmt: skip
def test_what_cuda_will_see_is_a_setting(environ: dict[str, str], seen: str | None) -> None:
    """Read once with all others; set and empty is not the same as not set; there is no other variable for it."""
    assert Settings.from_env(environ).cuda_visible_devices == seen


def test_cuda_counts_as_nvml_does() -> None:
    """Its own order is by speed."""
    assert shared.__file__
    assert os.environ["CUDA_DEVICE_ORDER"]


def test_cuda_s_arena_takes_what_is_needed() -> None:
    """The options that sessions on a GPU are made with."""
    found = described(FakeNvml(), 2, None)
    assert found is not None
    assert cuda_options(found) == {"device_id": "2", "arena_extend_strategy": "kSameAsRequested"}
