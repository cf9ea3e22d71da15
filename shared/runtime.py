"""What every service process has in common: settings, logs, the bus, heartbeats, signals and draining."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from shared import messages as m
from shared import subjects, tasks
from shared.bus import Bus
from shared.errors import CalmError
from shared.logs import configure
from shared.settings import Settings

try:  # a query's way takes about a tenth less processor time on it
    from uvloop import run as run_loop
except ImportError:  # there is none for Windows
    from asyncio import run as run_loop  # type: ignore[assignment]

__all__ = ["Context", "Health", "Service", "main", "run_loop", "settle_memory"]


@dataclass
class Health:
    """Counters that a service keeps and the heartbeat publishes."""

    state: Literal["starting", "ready", "draining"] = "starting"
    handled: int = 0
    failed: int = 0
    in_flight: Callable[[], int] = field(default=lambda: 0)
    detail: Callable[[], str] = field(default=lambda: "")


@dataclass(frozen=True)
class Context:
    """What a service is given."""

    settings: Settings
    bus: Bus
    log: Any
    health: Health
    instance: str
    clock: Callable[[], float] = time.time


class Service(Protocol):
    """A service: `start` subscribes and returns; `stop` takes no new work, finishes or hands back the rest."""

    async def start(self) -> None: ...
    async def stop(self) -> None: ...


def main(service: str, build: Callable[[Context], Service]) -> None:
    """Run a service until SIGTERM or SIGINT; the whole of a service's `__main__`."""
    try:
        settings = Settings.from_env()
        log = configure(service, settings.name, settings.log_level)
        run_loop(_serve(service, settings, log, build))
    except CalmError as error:
        print(f"{service}: {error}", file=sys.stderr)
        sys.exit(2)


async def _serve(service: str, settings: Settings, log: Any, build: Callable[[Context], Service]) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    async with _until(stopping) as connecting:
        bus = await connecting(Bus.connect(settings, f"calm-{service}-{settings.name}", log))
        if bus is None:
            return
        if await connecting(_ensure(bus)) is None:
            await bus.close()
            return
    health = Health()
    running = build(Context(settings, bus, log, health, settings.name))
    beat = asyncio.create_task(_beat(service, settings.name, bus, health))
    start = asyncio.create_task(running.start())
    stop = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        if start.done():
            start.result()
            settle_memory()
            await bus.rehearse()
            await bus.nc.flush()  # the server knows our subscriptions before anyone is told that we are ready
            health.state = "ready"
            log.info("ready", pid=os.getpid())
            await stop
        else:
            await tasks.end([start])
        health.state = "draining"
        log.info("draining", in_flight=health.in_flight())
        await running.stop()
    finally:
        beat.cancel()
        stop.cancel()
        await bus.close()
    log.info("stopped", handled=health.handled, failed=health.failed)


def settle_memory() -> None:
    """What a service has at its start it keeps: the garbage collector need not look at it again, and young objects,
    nearly all freed by their reference counts, are looked at seldom. A full collection takes milliseconds of a query.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


async def _ensure(bus: Bus) -> bool:
    await bus.ensure()
    return True


@contextlib.asynccontextmanager
async def _until(stopping: asyncio.Event) -> Any:
    """Give a function that awaits something, or returns None as soon as `stopping` is set."""
    stop = asyncio.create_task(stopping.wait())

    async def run(awaitable: Any) -> Any:
        task = asyncio.ensure_future(awaitable)
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        await tasks.end([task])
        return None

    try:
        yield run
    finally:
        stop.cancel()


async def _beat(service: str, instance: str, bus: Bus, health: Health) -> None:
    while True:
        await bus.send(
            subjects.health(service),
            m.Heartbeat(
                service=service,
                instance=instance,
                state=health.state,
                in_flight=health.in_flight(),
                handled=health.handled,
                failed=health.failed,
                pid=os.getpid(),
                host=socket.gethostname(),
                at=time.time(),
                detail=health.detail(),
            ),
        )
        await asyncio.sleep(1.0)
