"""What device this worker has: asked of ONNX Runtime and NVML, never assumed."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import onnxruntime as ort
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
    provided = _CUDA in ort.get_available_providers()
    gpu = _gpu(index) if provided else None
    if gpu is not None:
        name, memory = gpu
        return Device(kind="cuda", name=name, index=index, memory_bytes=memory, provider=_CUDA, threads=1)
    if match is not None:
        reason = "NVML finds no such GPU" if provided else "this ONNX Runtime has no CUDA provider"
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


def _gpu(index: int) -> tuple[str, int] | None:
    """Name and total memory of the GPU that ONNX Runtime will call `index`, or None.

    NVML counts all GPUs of the machine, CUDA those of CUDA_VISIBLE_DEVICES: the list is translated.
    """
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
