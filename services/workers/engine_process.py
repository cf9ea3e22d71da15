"""The engine process: told by its supervisor what to load, serves it until drained. Not started by hand."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import time
from typing import Any

import msgspec

from services.workers import lean  # noqa: F401 before anything imports structlog
from services.workers.engine.batcher import Batcher
from services.workers.engine.energy import AttributedMeter
from services.workers.engine.gate import Gate, host_gate
from services.workers.engine.loader import Opened, give_back, measured_bytes, open_model
from services.workers.engine.loader import start as start_batcher
from services.workers.engine_host import EngineHost
from services.workers.protocol import Activity, Charge, Command, Drain, Parked, Ready, Refused, Report, Start
from shared import codec, tasks
from shared.bus import Bus
from shared.errors import CalmError
from shared.logs import configure
from shared.models.store import ModelStore
from shared.processes import yield_to_others
from shared.runtime import run_loop
from shared.settings import Settings

SWITCH_S = 0.0005
ACTIVITY_S = 0.2
"""Between two reports of an engine that is at work."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Command).decode


def _say(report: Report) -> None:
    try:
        sys.stdout.buffer.write(_encode(report) + b"\n")
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # the supervisor is gone, and this process is about to follow
        return


async def _run(settings: Settings) -> None:
    loop = asyncio.get_running_loop()
    stdin = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    # Imported and not yet told what to load, an engine is a spare: the supervisor keeps one, to load sooner.
    engine: Engine | None = None
    while line := await stdin.readline():
        command = _decode(line)
        if isinstance(command, Charge) and engine is not None:
            engine.meter.settle(command.joules, command.busy_s)  # for what it did before it was parked
        elif isinstance(command, Start):
            engine = engine or Engine(settings, command)
            if not await engine.serve(command, stdin):
                return
        elif isinstance(command, Drain):
            return


class Engine:
    """One artifact in this process: opened at the first start, kept while it is parked, served in between."""

    def __init__(self, settings: Settings, start: Start) -> None:
        # The engine thread must not keep the event loop waiting for the interpreter between two of its native calls:
        # by default a thread may hold on to it for 5 ms.
        sys.setswitchinterval(SWITCH_S)
        self._settings = settings
        self._instance = f"{start.worker}.{start.spec.name}"
        self._log: Any = configure("engine", self._instance, settings.log_level)
        self._priority = settings.engine_priority if start.device.kind == "cpu" else "normal"
        self._opened: Opened | None = None
        self._before = Activity()
        self.meter = AttributedMeter(start.energy_source, start.power_w)

    async def serve(self, start: Start, stdin: asyncio.StreamReader) -> bool:
        """Load, serve until told otherwise; True when it was told to park."""
        connecting = asyncio.create_task(Bus.connect(self._settings, f"calm-engine-{self._instance}", self._log))
        began = time.perf_counter()
        try:
            batcher = await asyncio.to_thread(self._load, start)
        except CalmError as error:
            _say(Refused(failure=codec.failure_of(error)))
            connecting.cancel()
            return False
        bus = await connecting
        host = EngineHost(bus, self._settings, start, batcher, self.meter, self._priority, _say, self._log)
        assert self._opened is not None
        held_bytes = measured_bytes()  # before it pulls: counting pages takes milliseconds
        gc.freeze()  # what stays for good is not searched for garbage between two tokens
        await host.start()
        load_s = time.perf_counter() - began
        _say(Ready(load_s=load_s, provider=self._opened.provider, measured_bytes=held_bytes))
        reporting = asyncio.create_task(self._report_activity(host))
        told = await _until_told(stdin, self._settings, self.meter)
        await host.stop(told.timeout_s)
        await tasks.end([reporting])
        self._before = self._activity(host)
        _say(self._before)
        await bus.close()
        self._log.info("engine_stopped", parked=told.park)
        if told.park:
            del host, batcher
            give_back()
            _say(Parked(measured_bytes=measured_bytes()))
        return told.park

    def _load(self, start: Start) -> Batcher:
        yield_to_others(self._priority)  # the threads that ONNX Runtime starts for the session inherit it
        if self._opened is None:
            settings = self._settings
            store = ModelStore(settings.models_path)
            self._opened = open_model(
                store.path(start.spec.model), store.get(start.spec.model), start.spec, start.device,
                caches=settings.weights_paths, cuda_graphs=settings.cuda_graphs, log=self._log,
            )  # fmt: skip
        batcher = start_batcher(self._opened, self.meter, gate=_gate(start))
        batcher.rehearse()
        return batcher

    def _activity(self, host: EngineHost) -> Activity:
        return Activity(
            busy_s=self.meter.busy_s,
            tokens_in=self._before.tokens_in + host.tokens_in,
            tokens_out=self._before.tokens_out + host.tokens_out,
        )

    async def _report_activity(self, host: EngineHost) -> None:
        """Tell what was done, while anything is being done: by this the supervisor divides the device's energy."""
        said = self._before
        while True:
            await asyncio.sleep(ACTIVITY_S)
            now = self._activity(host)
            if now != said:
                _say(now)
                said = now


def _gate(start: Start) -> Gate | None:
    """Engines on the CPUs of a host take turns, so that no more threads compute than there are cores."""
    if start.device.kind != "cpu":
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return host_gate(cores, start.device.threads)


async def _until_told(stdin: asyncio.StreamReader, settings: Settings, meter: AttributedMeter) -> Drain:
    """Take charges until `Drain`, SIGTERM, or the end of the supervisor; with how long to go on finishing work."""
    terminated = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminated.set)
    signalled = asyncio.create_task(terminated.wait())
    try:
        while True:
            line = asyncio.create_task(stdin.readline())
            await asyncio.wait({signalled, line}, return_when=asyncio.FIRST_COMPLETED)
            if not line.done():
                line.cancel()
                return Drain(timeout_s=settings.drain_s)
            told = line.result()
            if not told:
                return Drain(timeout_s=settings.drain_s if terminated.is_set() else 0.0)
            command = _decode(told)
            if isinstance(command, Drain):
                return command
            if isinstance(command, Charge):
                meter.settle(command.joules, command.busy_s)
    finally:
        signalled.cancel()


def main() -> None:
    try:
        run_loop(_run(Settings.from_env()))
    except CalmError as error:
        _say(Refused(failure=codec.failure_of(error)))
        sys.exit(1)
