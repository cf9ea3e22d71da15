"""What device this worker has: asked of ONNX Runtime and NVML, never assumed."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import psutil

from services.workers import gpu
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
    visible = settings.cuda_visible_devices
    found = _gpu(index, visible)
    if found is not None and _provided():
        return found
    if match is not None:
        within = "" if visible is None else f" within CUDA_VISIBLE_DEVICES={visible!r}"
        reason = f"NVML finds no such GPU{within}" if _provided() else "this ONNX Runtime has no CUDA provider"
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


def _gpu(index: int, visible: str | None) -> Device | None:
    """The GPU that ONNX Runtime will call `index`, or None."""
    if not _driver():
        return None
    import pynvml  # noqa: PLC0415 only useful on machines with a GPU

    return described(pynvml, index, visible)


def described(nvml: Any, index: int, visible: str | None) -> Device | None:
    """The GPU that CUDA calls `index` where CUDA_VISIBLE_DEVICES is `visible`, as NVML knows it; None without one."""
    try:
        nvml.nvmlInit()
        handle = gpu.handle_of(nvml, index, visible)
        return Device(
            kind="cuda", name=gpu.name_of(nvml, handle), index=index, uuid=gpu.uuid_of(nvml, handle),
            memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total), provider=_CUDA, threads=1,
        )  # fmt: skip
    except (nvml.NVMLError, LookupError):
        return None
