"""Which GPU is meant, in NVML's terms: numbered as CUDA does, within CUDA_VISIBLE_DEVICES, slices of a GPU included.

CUDA numbers the devices of that list, NVML all of the machine, in the order of the bus; `shared` has CUDA do so too
(CUDA_DEVICE_ORDER), for its own order is by speed. `nvml` is the module pynvml, or what stands in for it in tests.
"""

from __future__ import annotations

from typing import Any

MIG_ENABLED = 1


def handle_of(nvml: Any, index: int, visible: str | None) -> Any:
    """NVML's handle of the device that CUDA calls `index`, where CUDA_VISIBLE_DEVICES is `visible` (None: not set).

    An entry is a number, the beginning of a UUID (`GPU-8932f937`), or a slice (`MIG-...`); the first that means nothing
    ends the list. Of a GPU in slices CUDA uses the first slice when none is named.

    Raises:
        LookupError: CUDA has no such device.
        Whatever NVML raises where the driver does not answer.
    """
    if visible is None:
        return _first_slice(nvml, nvml.nvmlDeviceGetHandleByIndex(index))
    entries = [entry.strip() for entry in visible.split(",") if entry.strip()]
    for place, entry in enumerate(entries[: index + 1]):
        handle = _entry(nvml, entry)
        if handle is None:
            raise LookupError(f"{entry!r} in CUDA_VISIBLE_DEVICES is no device, and ends the list")
        if place == index:
            return handle if entry.startswith("MIG-") else _first_slice(nvml, handle)
    raise LookupError(f"CUDA_VISIBLE_DEVICES={visible!r} lists no device {index}")


def uuid_of(nvml: Any, handle: Any) -> str:
    """The device's own name for itself, on whatever host; that of a slice is its own."""
    return _text(nvml.nvmlDeviceGetUUID(handle))


def name_of(nvml: Any, handle: Any) -> str:
    return _text(nvml.nvmlDeviceGetName(handle))


def _entry(nvml: Any, entry: str) -> Any | None:
    if entry.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(entry)) if int(entry) < nvml.nvmlDeviceGetCount() else None
    if entry.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(entry)
    if not entry.startswith("GPU-"):
        return None  # -1, for instance
    handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    meant = [handle for handle in handles if uuid_of(nvml, handle).startswith(entry)]
    return meant[0] if len(meant) == 1 else None


def _first_slice(nvml: Any, handle: Any) -> Any:
    """The device itself, or the slice of it that CUDA takes when it is divided (MIG)."""
    try:
        divided = nvml.nvmlDeviceGetMigMode(handle)[0] == MIG_ENABLED
    except nvml.NVMLError:  # it cannot be divided
        return handle
    if not divided:
        return handle
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            return nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except nvml.NVMLError:  # no slice of that number
            continue
    raise LookupError("the GPU is in MIG mode and has no slices, so that CUDA has no device")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
