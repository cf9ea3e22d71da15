"""Starts real service processes for tests, waits until they say that they are ready, and always ends them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nats.aio.msg import Msg

from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.settings import Settings

READY_S = 60.0
STOP_S = 30.0


@dataclass
class Process:
    """A running service."""

    name: str
    process: asyncio.subprocess.Process
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    async def stop(self) -> int:
        """SIGTERM, and wait; the exit status."""
        if self.process.returncode is None:
            os.kill(self.pid, signal.SIGTERM)
        async with asyncio.timeout(STOP_S):
            return await self.process.wait()

    async def kill(self) -> None:
        """SIGKILL, as a crash."""
        if self.process.returncode is None:
            os.kill(self.pid, signal.SIGKILL)
        await self.process.wait()


def environment(settings: Settings, **more: str) -> dict[str, str]:
    """The environment that gives a process these settings."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("CALM_")}
    return {
        **inherited,
        "CALM_NATS_URL": settings.nats_url,
        "CALM_HOME": str(settings.home),
        "CALM_MODELS_DIR": str(settings.models_path),
        "CALM_FLEET": settings.fleet,
        "CALM_DRAIN_S": "3",
        "CALM_HTTP": "127.0.0.1:0",
        **more,
    }


@contextlib.asynccontextmanager
async def running(
    service: str, settings: Settings, bus: Bus, *, states: Collection[str] = ("ready",), **more: str
) -> AsyncIterator[Process]:
    """`python -m services.<service>`, in one of `states`; `more` are further environment variables."""
    module = "services.workers" if service == "worker" else f"services.{service}"
    command = [sys.executable, "-m", module]
    started = start(command, environment(settings, **more), service, settings.home, bus, states)
    async with started as process:
        yield process


@contextlib.asynccontextmanager
async def start(
    command: Sequence[str],
    variables: Mapping[str, str],
    service: str,
    folder: Path,
    bus: Bus,
    states: Collection[str] = ("ready",),
) -> AsyncIterator[Process]:
    """Run a command that starts `service`, and wait for its heartbeat to say one of `states`."""
    log = folder / f"{service}-{len(list(folder.glob('*.test-log')))}.test-log"
    ready = asyncio.Event()
    pid = 0

    async def on_beat(message: Msg) -> None:
        beat = codec.unpack(message.data, m.Heartbeat)
        if beat.pid == pid and beat.state in states:
            ready.set()

    subscription = await bus.subscribe(subjects.health(service), on_beat)
    with log.open("wb") as file:
        child = await asyncio.create_subprocess_exec(*command, env=dict(variables), stderr=file, start_new_session=True)
    pid = child.pid
    process = Process(service, child, log)
    ended = asyncio.create_task(child.wait())
    said = asyncio.create_task(ready.wait())
    try:
        await asyncio.wait({ended, said}, timeout=READY_S, return_when=asyncio.FIRST_COMPLETED)
        if not ready.is_set():
            raise AssertionError(f"{service} did not become ready:\n{log.read_text()[-3000:]}")
        await subscription.unsubscribe()
        yield process
    finally:
        said.cancel()
        if child.returncode is None:
            with contextlib.suppress(TimeoutError):
                await process.stop()
            await process.kill()
        await asyncio.gather(ended, said, return_exceptions=True)


def of_home(home: Path) -> list[int]:
    """Processes of the system that lives in `home`, those that are nobody's children included."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("CALM_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


async def engines_of(worker: str, bus: Bus) -> list[int]:
    """Processes of a worker's engines, as it says itself."""
    states = (await bus.kv_all(subjects.BUCKET_FLEET)).values()
    found = [codec.unpack(state, m.WorkerState) for state in states if state]
    return [engine.pid for state in found if state.worker == worker for engine in state.engines]
