"""The engine process: told by its supervisor what to load, serves it until drained. Not started by hand."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import msgspec

from services.workers.engine.energy import choose_meter
from services.workers.engine.loader import Loaded, load
from services.workers.engine_host import EngineHost
from services.workers.protocol import Command, Drain, Ready, Refused, Report, Start
from shared import codec
from shared.bus import Bus
from shared.errors import CalmError
from shared.logs import configure
from shared.models.store import ModelStore
from shared.processes import yield_to_others
from shared.settings import Settings

SWITCH_S = 0.0005

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
    start = _decode(await stdin.readline())
    assert isinstance(start, Start)
    instance = f"{start.worker}.{start.spec.name}"
    # The engine thread must not keep the event loop waiting for the interpreter between two of its native calls:
    # by default a thread may hold on to it for 5 ms.
    sys.setswitchinterval(SWITCH_S)
    log: Any = configure("engine", instance, settings.log_level)
    priority = settings.engine_priority if start.device.kind == "cpu" else "normal"
    meter = choose_meter(start.device, settings.power_idle_w, settings.power_core_w)
    store = ModelStore(settings.models_path)

    def load_in_background() -> Loaded:
        yield_to_others(priority)  # the threads that ONNX Runtime starts for the session inherit it
        return load(store.path(start.spec.model), store.get(start.spec.model), start.spec, start.device, meter)

    connecting = asyncio.create_task(Bus.connect(settings, f"calm-engine-{instance}", log))
    try:
        loaded = await asyncio.to_thread(load_in_background)
    except CalmError as error:
        _say(Refused(failure=codec.failure_of(error)))
        connecting.cancel()
        return
    bus = await connecting
    host = EngineHost(bus, settings, start, loaded.batcher, meter, priority, _say, log)
    await host.start()
    _say(Ready(load_s=loaded.load_s, provider=loaded.provider, measured_bytes=loaded.measured_bytes))
    timeout_s = await _until_told(stdin, settings)
    await host.stop(timeout_s)
    await bus.close()
    log.info("engine_stopped")


async def _until_told(stdin: asyncio.StreamReader, settings: Settings) -> float:
    """Wait for `Drain`, SIGTERM, or the end of the supervisor; how long to go on finishing work."""
    terminated = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminated.set)
    signalled = asyncio.create_task(terminated.wait())
    line = asyncio.create_task(stdin.readline())
    await asyncio.wait({signalled, line}, return_when=asyncio.FIRST_COMPLETED)
    told = line.done() and line.result()
    signalled.cancel()
    line.cancel()
    if told:
        command = _decode(told)
        if isinstance(command, Drain):
            return command.timeout_s
    return settings.drain_s if terminated.is_set() else 0.0


def main() -> None:
    try:
        asyncio.run(_run(Settings.from_env()))
    except CalmError as error:
        _say(Refused(failure=codec.failure_of(error)))
        sys.exit(1)


if __name__ == "__main__":
    main()
