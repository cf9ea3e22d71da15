"""Energy meters: a counter of joules that only grows, measured where the machine can, else modelled and said so."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal, Protocol

from shared.messages import Device

Source = Literal["nvml", "rapl", "model"]


class Meter(Protocol):
    """`read_j` gives joules since some fixed moment; `source` says how they are known."""

    source: Source

    def read_j(self) -> float: ...


class NvmlMeter:
    """The GPU's own total energy counter (Volta and later); updated by the driver some ten times a second.

    It counts the whole device: engines that share a device each see the other's work too.
    """

    source: Source = "nvml"

    def __init__(self, index: int) -> None:
        import pynvml  # noqa: PLC0415 only on machines with a GPU

        pynvml.nvmlInit()
        self._read = pynvml.nvmlDeviceGetTotalEnergyConsumption
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        self.read_j()  # raises where the counter is not supported

    def read_j(self) -> float:
        return float(self._read(self._handle)) / 1000.0


class RaplMeter:
    """Intel and AMD package energy counters of Linux, summed over packages; they wrap around."""

    source: Source = "rapl"

    def __init__(self, root: Path = Path("/sys/class/powercap")) -> None:
        self._zones = [
            zone for zone in sorted(root.glob("intel-rapl:*")) if zone.name.count(":") == 1 and _readable(zone)
        ]
        if not self._zones:
            raise OSError("no readable RAPL package counter")
        self._limits = [_number(zone / "max_energy_range_uj") for zone in self._zones]
        self._last = [_number(zone / "energy_uj") for zone in self._zones]
        self._total_uj = 0.0

    def read_j(self) -> float:
        for index, zone in enumerate(self._zones):
            now = _number(zone / "energy_uj")
            step = now - self._last[index]
            self._total_uj += step if step >= 0 else step + self._limits[index]
            self._last[index] = now
        return self._total_uj / 1e6


class ModelMeter:
    """Stated powers in place of a counter: busy core seconds of this process, and its share of an idle host.

    An estimate, marked as one wherever it appears.
    """

    source: Source = "model"

    def __init__(self, power_idle_w: float, power_core_w: float, idle_share: float) -> None:
        self._idle_w = power_idle_w * idle_share
        self._core_w = power_core_w
        self._start = time.monotonic()

    def read_j(self) -> float:
        return time.process_time() * self._core_w + (time.monotonic() - self._start) * self._idle_w


def choose_meter(device: Device, power_idle_w: float, power_core_w: float, idle_share: float = 1.0) -> Meter:
    """The best meter that works here: NVML on a GPU, RAPL on a CPU where it may be read, else the model."""
    try:
        return NvmlMeter(device.index) if device.kind == "cuda" else RaplMeter()
    except Exception:  # noqa: BLE001 pynvml raises its own kinds; whatever the cause, the model is left
        return ModelMeter(power_idle_w, power_core_w, idle_share)


def _readable(zone: Path) -> bool:
    try:
        _number(zone / "energy_uj")
    except (OSError, ValueError):
        return False
    return True


def _number(file: Path) -> float:
    return float(file.read_text())
