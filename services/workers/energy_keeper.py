"""The supervisor's part of the energy ledger: owns the device's meter, divides it, charges engines, publishes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

import nats.errors
import psutil

from services.workers.energy_split import EnergyLedger, Interval, Shares, learn_idle, split
from services.workers.engine.energy import Meter, Source, choose_meter
from services.workers.protocol import Activity, Charge, Command
from shared import codec, subjects, tasks
from shared import messages as m
from shared.bus import Bus
from shared.settings import Settings

TICK_S = 0.5
"""NVML's counter is updated some ten times a second: shorter intervals would mostly see steps of it."""
PUBLISH_S = 5.0
POWER_WEIGHT = 0.2
QUIET = 0.1
"""Core seconds of others per second under which a host still counts as idle."""


class Engine(Protocol):
    """What is needed of an engine process (`Child`)."""

    activity: Activity

    @property
    def pid(self) -> int: ...

    async def tell(self, command: Command) -> None: ...


@dataclass(frozen=True)
class Running:
    """An engine process on the device, and whether it still loads its model."""

    artifact: str
    engine: Engine
    loading: bool


@dataclass
class _Seen:
    """What has been counted of one engine process."""

    activity: Activity = field(default_factory=Activity)
    core_s: float = 0.0
    joules: float = 0.0
    told_j: float = 0.0
    loading: bool = False


class EnergyKeeper:
    """One meter per worker, however many engines share the device: nothing is counted once per engine.

    The joules of each interval go to engines by the seconds in which they ran steps (on a CPU: their core seconds),
    to loads, to other processes (where RAPL counts a whole host), and to idling; see `energy_split`.
    """

    def __init__(
        self,
        bus: Bus | None,
        settings: Settings,
        worker: str,
        device: m.Device,
        running: Callable[[], Iterable[Running]],
        *,
        meter: Meter | None = None,
        clock: Callable[[], float] = time.time,
        ticker: Callable[[], float] = time.monotonic,
        core_s: Callable[[int], float | None] | None = None,
        host_core_s: Callable[[], float] | None = None,
    ) -> None:
        """`core_s` and `host_core_s`: busy core seconds so far, of a process and of the whole host."""
        self._bus = bus
        self._worker = worker
        self._device = device
        self._running = running
        self._clock = clock
        self._ticker = ticker
        self._core_s = core_s or _core_s
        self._host_core_s = host_core_s or _host_core_s
        self._cores = 0.0
        self._meter = meter or choose_meter(
            device, settings.power_idle_w, settings.power_core_w, core_s=lambda: self._cores,
            visible=settings.cuda_visible_devices,
        )  # fmt: skip
        estimated = self._meter.source == "model"
        self._idle_w: float | None = settings.power_idle_w if estimated else None
        stated_w = settings.power_idle_w + settings.power_core_w * device.threads
        self._power_w = stated_w if device.kind == "cpu" or estimated else 0.0
        self._seen: dict[Engine, _Seen] = {}
        self._own_s = time.process_time()
        self._host_s = self._host_core_s()
        self._read_j = self._meter.read_j()
        self._at = ticker()
        self._started_at = self._settled_at = clock()
        self._task: asyncio.Task[None] | None = None
        self.ledger = EnergyLedger()

    @property
    def source(self) -> Source:
        """How joules are known here: `nvml`, `rapl` or `model` (estimated)."""
        return self._meter.source

    @property
    def power_w(self) -> float:
        """Joules per busy second of an engine here, as seen lately; what a new engine begins to reckon with."""
        return self._power_w

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Close the last interval and publish the ledger."""
        if self._task is not None:
            await tasks.end([self._task])
        self.tick()
        self._settled_at = self._clock()  # the engines have ended, and said all that they did
        await self._publish()

    async def _run(self) -> None:
        published = self._ticker()
        while True:
            await asyncio.sleep(TICK_S)
            self.tick()
            await self._charge()
            if self._ticker() - published >= PUBLISH_S:
                published = self._ticker()
                await self._publish()

    # --- one interval ---

    def tick(self) -> Shares:
        """Close the interval since the last reading, and enter it in the ledger."""
        now = self._ticker()
        elapsed_s, self._at = now - self._at, now
        # Engines tell what they did every `ACTIVITY_S`: a whole interval ago it has certainly been told.
        self._settled_at = max(self._settled_at, self._clock() - TICK_S)
        cpu = self._device.kind == "cpu"
        work: dict[str, float] = {}
        loads: dict[str, float] = {}
        busy_s, ours_s = 0.0, self._own_cores()
        running = list(self._running())
        for one in running:
            seen = self._seen.get(one.engine)
            if seen is None:
                seen = self._seen[one.engine] = _Seen()
                self.ledger.of(one.artifact).loads += 1
            elif one.loading and not seen.loading:  # a process that had been parked
                self.ledger.of(one.artifact).loads += 1
            seen.loading = one.loading
            steps_s, cores_s = self._advance(one, seen)
            ours_s += cores_s
            if one.loading:
                weight = cores_s if cpu else elapsed_s
                if weight > 0:
                    loads[one.artifact] = loads.get(one.artifact, 0.0) + weight
                    busy_s += elapsed_s
            elif steps_s > 0:
                work[one.artifact] = work.get(one.artifact, 0.0) + (cores_s if cpu and cores_s > 0 else steps_s)
                busy_s += steps_s
        self._cores += ours_s
        read_j = self._meter.read_j()
        total_j, self._read_j = max(read_j - self._read_j, 0.0), read_j  # a driver that is reloaded begins anew
        host_s = self._host_core_s()
        others_s, self._host_s = max(host_s - self._host_s - ours_s, 0.0), host_s
        if self._meter.source != "rapl":
            others_s = 0.0
        interval = Interval(
            elapsed_s=elapsed_s, total_j=total_j, work=work, loads=loads, other=others_s,
            busy_s=min(busy_s + others_s, elapsed_s),
        )  # fmt: skip
        if self._meter.source != "model" and others_s < QUIET * elapsed_s:
            self._idle_w = learn_idle(self._idle_w, replace(interval, other=0.0))
        shares = split(interval, self._idle_w or 0.0)
        self.ledger.add(interval, shares)
        self._learn_power(shares, busy_s)
        for one in running:
            if one.artifact in shares.active and not one.loading:
                self._seen[one.engine].joules += shares.active[one.artifact]
        for engine in self._seen.keys() - {one.engine for one in running}:
            del self._seen[engine]
        return shares

    def _own_cores(self) -> float:
        now = time.process_time()
        since, self._own_s = now - self._own_s, now
        return since

    def _advance(self, one: Running, seen: _Seen) -> tuple[float, float]:
        """Seconds of steps and core seconds of an engine since the last interval; its tokens go to the ledger."""
        activity, before = one.engine.activity, seen.activity
        if activity.busy_s < before.busy_s:  # its meter has begun anew
            before, seen.joules, seen.told_j = Activity(), 0.0, 0.0
        account = self.ledger.of(one.artifact)
        steps_s = max(activity.busy_s - before.busy_s, 0.0)
        account.busy_s += steps_s
        account.tokens_in += max(activity.tokens_in - before.tokens_in, 0)
        account.tokens_out += max(activity.tokens_out - before.tokens_out, 0)
        seen.activity = activity
        core_s = self._core_s(one.engine.pid)
        cores_s = max(core_s - seen.core_s, 0.0) if core_s is not None else 0.0
        seen.core_s += cores_s
        return steps_s, cores_s

    def _learn_power(self, shares: Shares, busy_s: float) -> None:
        if shares.active and busy_s > 0.1:
            seen_w = sum(shares.active.values()) / busy_s
            self._power_w = (1 - POWER_WEIGHT) * self._power_w + POWER_WEIGHT * seen_w if self._power_w else seen_w

    # --- telling ---

    async def _charge(self) -> None:
        """Tell each engine what it has been charged, where that has changed."""
        for engine, seen in list(self._seen.items()):
            if seen.joules != seen.told_j:
                seen.told_j = seen.joules
                await engine.tell(Charge(joules=seen.joules, busy_s=seen.activity.busy_s))

    def report(self) -> m.EnergyReport:
        """The ledger so far: sums since this worker started, so that a report that gets lost is in the next."""
        ledger = self.ledger
        return m.EnergyReport(
            worker=self._worker,
            host=socket.gethostname(),
            device_class=self._device.device_class,
            source=self._meter.source,
            started_at=self._started_at,
            at=self._settled_at,
            elapsed_s=ledger.elapsed_s,
            total_j=ledger.total_j,
            idle_j=ledger.idle_j,
            other_j=ledger.other_j,
            accounts=[
                m.EnergyAccount(
                    artifact=name, active_j=t.active_j, load_j=t.load_j, loads=t.loads, busy_s=t.busy_s,
                    tokens_in=t.tokens_in, tokens_out=t.tokens_out,
                )
                for name, t in sorted(ledger.artifacts.items())
            ],
        )  # fmt: skip

    async def _publish(self) -> None:
        if self._bus is not None:
            with contextlib.suppress(nats.errors.Error):
                await self._bus.nc.publish(subjects.energy(self._worker), codec.pack(self.report()))


def _core_s(pid: int) -> float | None:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return None
    return float(times.user + times.system)


def _host_core_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.system)
