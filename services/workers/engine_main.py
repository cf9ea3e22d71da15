"""The engine process: told by its supervisor what to load, serves it until drained. Not started by hand."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import msgspec

from services.workers.engine.energy import AttributedMeter
from services.workers.engine.loader import Loaded, load
from services.workers.engine_host import EngineHost
from services.workers.protocol import Activity, Charge, Command, Drain, Ready, Refused, Report, Start
from shared import codec, tasks
from shared.bus import Bus
from shared.errors import CalmError
from shared.logs import configure
from shared.models.store import ModelStore
from shared.processes import yield_to_others
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
    start = _decode(await stdin.readline())
    assert isinstance(start, Start)
    instance = f"{start.worker}.{start.spec.name}"
    # The engine thread must not keep the event loop waiting for the interpreter between two of its native calls:
    # by default a thread may hold on to it for 5 ms.
    sys.setswitchinterval(SWITCH_S)
    log: Any = configure("engine", instance, settings.log_level)
    priority = settings.engine_priority if start.device.kind == "cpu" else "normal"
    meter = AttributedMeter(start.energy_source, start.power_w)
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
    reporting = asyncio.create_task(_report_activity(meter, host))
    timeout_s = await _until_told(stdin, settings, meter)
    await host.stop(timeout_s)
    await tasks.end([reporting])
    _say(_activity(meter, host))
    await bus.close()
    log.info("engine_stopped")


def _activity(meter: AttributedMeter, host: EngineHost) -> Activity:
    return Activity(busy_s=meter.busy_s, tokens_in=host.tokens_in, tokens_out=host.tokens_out)


async def _report_activity(meter: AttributedMeter, host: EngineHost) -> None:
    """Tell what was done, while anything is being done: by this the supervisor divides the device's energy."""
    said = Activity()
    while True:
        await asyncio.sleep(ACTIVITY_S)
        now = _activity(meter, host)
        if now != said:
            _say(now)
            said = now


async def _until_told(stdin: asyncio.StreamReader, settings: Settings, meter: AttributedMeter) -> float:
    """Take charges until `Drain`, SIGTERM, or the end of the supervisor; how long to go on finishing work."""
    terminated = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminated.set)
    signalled = asyncio.create_task(terminated.wait())
    try:
        while True:
            line = asyncio.create_task(stdin.readline())
            await asyncio.wait({signalled, line}, return_when=asyncio.FIRST_COMPLETED)
            if not line.done():
                line.cancel()
                return settings.drain_s
            told = line.result()
            if not told:
                return settings.drain_s if terminated.is_set() else 0.0
            command = _decode(told)
            if isinstance(command, Drain):
                return command.timeout_s
            if isinstance(command, Charge):
                meter.settle(command.joules, command.busy_s)
    finally:
        signalled.cancel()


def main() -> None:
    try:
        asyncio.run(_run(Settings.from_env()))
    except CalmError as error:
        _say(Refused(failure=codec.failure_of(error)))
        sys.exit(1)


if __name__ == "__main__":
    main()
