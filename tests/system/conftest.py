"""Fixtures: the whole system, of real processes, over a tiny model."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared.broker import Broker
from shared.bus import Bus
from shared.settings import Settings
from tests.processes import Process, running
from tests.system import fleet

STAGES = ("monitor", "analyzer", "planner", "executor")


@pytest.fixture(scope="session")
def tiny_fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fleet.write(tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def settings(broker: Broker, tmp_path: Path, tiny_fleet: Path) -> Settings:
    return Settings(nats_url=broker.url, home=tmp_path, models_dir=tiny_fleet.parent / "models", fleet=str(tiny_fleet))


@pytest.fixture
async def stack() -> AsyncIterator[contextlib.AsyncExitStack]:
    """Ends what a test starts, last started first."""
    async with contextlib.AsyncExitStack() as exits:
        yield exits


@dataclasses.dataclass
class System:
    """The running system and how to add workers to it."""

    settings: Settings
    bus: Bus
    stages: dict[str, Process]
    exits: contextlib.AsyncExitStack

    async def add_worker(self, name: str, **more: str) -> Process:
        return await self.exits.enter_async_context(
            running("worker", self.settings, self.bus, CALM_WORKER_ID=name, CALM_THREADS="1", **more)
        )


@pytest.fixture
async def system(settings: Settings, bus: Bus, stack: contextlib.AsyncExitStack) -> System:
    """The four stages, without workers."""
    starting = {name: running(name, settings, bus) for name in STAGES}
    processes = await asyncio.gather(*(context.__aenter__() for context in starting.values()))
    for context in starting.values():
        stack.push_async_exit(context.__aexit__)
    stages = dict(zip(STAGES, processes, strict=True))
    return System(settings, bus, stages, stack)
