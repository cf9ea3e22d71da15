"""Energy meters: a counter of joules that only grows, measured where the machine can, else modelled and said so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from services.workers import gpu
from services.workers.energy_split import Follower
from services.workers.engine.gate import Gate
from shared.messages import Device

Source = Literal["nvml", "rapl", "model"]


class Meter(Protocol):
    """`read_j` gives joules since some fixed moment; `source` says how they are known."""

    source: Source

    def read_j(self) -> float: ...


class NvmlMeter:
    """The GPU's own total energy counter (Volta and later); updated by the driver some ten times a second.

    It counts the whole device, whoever uses it: the worker's supervisor owns it, and divides it among its engines.
    """

    source: Source = "nvml"

    def __init__(self, index: int, nvml: Any = None, visible: str | None = None) -> None:
        """`index` as CUDA counts, of the devices in `visible` (the value of CUDA_VISIBLE_DEVICES). `nvml` stands in
        for the module pynvml.

        Raises whatever NVML does where there is no such device, or no counter (before Volta; a MIG slice).
        """
        if nvml is None:
            import pynvml  # noqa: PLC0415 only on machines with a GPU

            nvml = pynvml
        nvml.nvmlInit()
        self._read = nvml.nvmlDeviceGetTotalEnergyConsumption
        self._handle = gpu.handle_of(nvml, index, visible)
        self.read_j()

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
    """Stated powers in place of a counter: busy core seconds, and a share of an idle host.

    An estimate, marked as one wherever it appears.
    """

    source: Source = "model"

    def __init__(
        self,
        power_idle_w: float,
        power_core_w: float,
        idle_share: float = 1.0,
        core_s: Callable[[], float] = time.process_time,
    ) -> None:
        """`core_s`: busy core seconds so far, of all processes that are meant; this one's when not given."""
        self._idle_w = power_idle_w * idle_share
        self._core_w = power_core_w
        self._core_s = core_s
        self._start = time.monotonic()

    def read_j(self) -> float:
        return self._core_s() * self._core_w + (time.monotonic() - self._start) * self._idle_w


def choose_meter(
    device: Device,
    power_idle_w: float,
    power_core_w: float,
    idle_share: float = 1.0,
    *,
    core_s: Callable[[], float] = time.process_time,
    nvml: Any = None,
    visible: str | None = None,
) -> Meter:
    """The best meter that works here: NVML on a GPU, RAPL on a CPU where it may be read, else the model."""
    try:
        return NvmlMeter(device.index, nvml, visible) if device.kind == "cuda" else RaplMeter()
    except Exception:  # noqa: BLE001 pynvml raises its own kinds; whatever the cause, the model is left
        return ModelMeter(power_idle_w, power_core_w, idle_share, core_s)


class AttributedMeter:
    """An engine's part of its device's energy, as the supervisor attributes it; what the engine's queries share.

    It runs while the engine computes (`begin`, `end`; `gated` does it), which is when the engine thread calls `read_j`;
    settlements come from another thread. Between them it runs on by `Follower`.
    """

    def __init__(self, source: Source, power_w: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.source: Source = source
        self._follower = Follower(power_w)
        self._clock = clock
        self._since: float | None = None
        self._lock = threading.Lock()

    def gated(self, gate: Gate) -> Gate:
        """A gate that runs this meter while it is held: waiting for a turn at the device is not work."""
        return _Gated(gate, self)

    def begin(self) -> None:
        """A step begins: from now on time is busy."""
        with self._lock:
            self._since = self._clock()

    def end(self) -> None:
        """The step has ended."""
        with self._lock:
            self._run_on()
            self._since = None

    def read_j(self) -> float:
        with self._lock:
            return self._run_on()

    def settle(self, joules: float, busy_s: float) -> None:
        """Take the supervisor's figure: `joules` in all, up to the `busy_s`-th busy second."""
        with self._lock:
            self._run_on()
            self._follower.settle(joules, busy_s)

    @property
    def busy_s(self) -> float:
        """Busy seconds so far."""
        with self._lock:
            self._run_on()
            return self._follower.busy_s

    def _run_on(self) -> float:
        if self._since is None:
            return self._follower.shown_j
        now = self._clock()
        seconds, self._since = now - self._since, now
        return self._follower.advance(seconds)


class _Gated:
    def __init__(self, gate: Gate, meter: AttributedMeter) -> None:
        self._gate = gate
        self._meter = meter

    @property
    def contended(self) -> bool:
        return self._gate.contended

    def __enter__(self) -> Self:
        self._gate.__enter__()
        self._meter.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._meter.end()
        self._gate.__exit__(kind, error, trace)


def _readable(zone: Path) -> bool:
    try:
        _number(zone / "energy_uj")
    except (OSError, ValueError):
        return False
    return True


def _number(file: Path) -> float:
    return float(file.read_text())
