"""What device this worker has: asked of ONNX Runtime and NVML, never assumed."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from pathlib import Path

import psutil

from shared.errors import DeviceUnavailable
from shared.messages import Device
from shared.settings import Settings

_CUDA = "CUDAExecutionProvider"


def probe(settings: Settings) -> Device:
    """The device that `settings.device` asks for; `auto` takes a GPU when there is one that can be used.

    Raises:
        DeviceUnavailable: CUDA was asked for, and ONNX Runtime or NVML does not offer it.
    """
    wanted = settings.device.lower()
    match = re.fullmatch(r"cuda(?::(\d+))?", wanted)
    if wanted not in ("auto", "cpu") and match is None:
        raise DeviceUnavailable(f"CALM_DEVICE={settings.device!r} is not a device.", "Use auto, cpu, cuda or cuda:N.")
    if wanted == "cpu":
        return _cpu(settings)
    index = int(match[1] or 0) if match else 0
    gpu = _gpu(index)
    if gpu is not None and _provided():
        name, memory = gpu
        return Device(kind="cuda", name=name, index=index, memory_bytes=memory, provider=_CUDA, threads=1)
    if match is not None:
        reason = "NVML finds no such GPU" if _provided() else "this ONNX Runtime has no CUDA provider"
        raise DeviceUnavailable(
            f"CUDA device {index} was asked for: {reason}.",
            "Install the [gpu] extra on a machine with an NVIDIA driver, or set CALM_DEVICE=cpu.",
        )
    return _cpu(settings)


def _cpu(settings: Settings) -> Device:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Device(
        kind="cpu",
        name=_cpu_name(),
        memory_bytes=psutil.virtual_memory().total,
        threads=settings.threads or cores,
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file() and (match := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        return match[1].strip()
    return platform.processor() or platform.machine()


def _provided() -> bool:
    import onnxruntime as ort  # noqa: PLC0415 14 MB of a supervisor, which on a CPU has no use for it

    return _CUDA in ort.get_available_providers()


def _driver() -> bool:
    """Whether there is an NVIDIA driver: elsewhere NVML's bindings need not be imported to find that there is none."""
    if sys.platform != "linux":
        return True
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def _gpu(index: int) -> tuple[str, int] | None:
    """Name and total memory of the GPU that ONNX Runtime will call `index`, or None.

    NVML counts all GPUs of the machine, CUDA those of CUDA_VISIBLE_DEVICES: the list is translated.
    """
    if not _driver():
        return None
    import pynvml  # noqa: PLC0415 only useful on machines with a GPU

    try:
        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = [v.strip() for v in visible.split(",") if v.strip()] if visible is not None else None
        if names is not None and index >= len(names):
            return None
        which = names[index] if names is not None else str(index)
        if which.isdigit():
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(which))
        else:
            handle = pynvml.nvmlDeviceGetHandleByUUID(which)
        name = pynvml.nvmlDeviceGetName(handle)
        memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except pynvml.NVMLError:
        return None
    return (name.decode() if isinstance(name, bytes) else str(name)), memory
