"""A monitor in this process, with a fleet file and a model store of its own."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import structlog

from services.monitor.service import Monitor
from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.errors import BusUnavailable, ModelMissing
from shared.models.manifest import Architecture, Manifest, Variant
from shared.runtime import Context, Health
from shared.settings import Settings

FLEET = """
[fleet]
name = "pair"

[[models]]
name = "small"
source = "pypi:some-package==1.0#model.gguf"
licence = "Apache-2.0"
variants = ["int8"]

[[cards]]
name = "alpha"
model = "small"
variant = "int8"
description = "General questions."
tags = ["local"]

[[cards]]
name = "beta"
model = "small"
variant = "int8"
description = "Law."
domains = { law = 0.7 }
"""
T = TypeVar("T")


class Store:
    """Manifests by name, as the model store holds them; `models` may grow later, as in a pull."""

    def __init__(self, *names: str) -> None:
        self.models = {name: manifest(name) for name in names}

    def get(self, name: str) -> Manifest:
        if name not in self.models:
            raise ModelMissing(f"{name} is not in the store.", "Pull it.")
        return self.models[name]


def manifest(name: str) -> Manifest:
    return Manifest(
        name=name,
        architecture=Architecture(
            family="llama", layers=2, hidden=64, heads=4, kv_heads=2, head_size=16, vocab=100, context=512,
            parameters=135_000_000,
        ),
        variants=[Variant(name="int8", path="int8", layout="calm", weights_bytes=1000)],
    )  # fmt: skip


@dataclass
class Running:
    monitor: Monitor
    bus: Bus
    health: Health

    async def stop(self) -> None:
        await self.monitor.stop()
        await self.bus.close()


async def start_monitor(settings: Settings, store: Store, instance: str = "one", more: str = "") -> Running:
    """A started monitor on a connection of its own, with the fleet `pair` and `more` in its file."""
    path = settings.home / "fleet.toml"
    await asyncio.to_thread(Path(path).write_text, FLEET + more)
    settings = dataclasses.replace(settings, fleet=str(path), instance=instance, drain_s=2.0)
    bus = await Bus.connect(settings, f"monitor-{instance}")
    await bus.ensure()
    health = Health()
    monitor = Monitor(Context(settings, bus, structlog.get_logger(), health, instance), store)
    await monitor.start()
    await bus.nc.flush()  # as a service does before it says that it is ready
    return Running(monitor, bus, health)


async def until(check: Callable[[], Awaitable[T | None]]) -> T:
    """Wait, at most 15 s, until `check` gives something; the state asked about announces no change."""
    async with asyncio.timeout(15):
        while (result := await check()) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return result


async def ready(bus: Bus) -> None:
    """Wait until queries are taken."""

    async def probe() -> bool | None:
        failure = await reply(bus, b'{"prompt": " "}')
        unready = await reply(bus, b'{"prompt": "x", "model": "no-such-model"}')
        assert isinstance(failure, m.Failure)
        assert isinstance(unready, m.Failure)
        return None if unready.code == "not_ready" else True

    await until(probe)


async def reply(
    bus: Bus, data: bytes, headers: dict[str, str] | None = None, subject: str = subjects.QUERY
) -> m.Answer | m.Failure | m.Ok:
    """The reply to a public request."""
    message = await bus.nc.request(subject, data, timeout=5, headers=headers)
    kind = m.Answer | m.Failure | m.Ok
    return codec.unpack(message.data, kind) if message.data[:1] != b"{" else codec.from_json(message.data, kind)  # type: ignore[arg-type]


async def knows(bus: Bus, verb: str, kind: type[T], check: Callable[[T], bool], request_id: str = "") -> T:
    """Ask for knowledge until `check` holds of the reply."""

    async def probe() -> T | None:
        try:
            found = await bus.ask(subjects.knowledge(verb), m.KnowledgeRequest(id=request_id), kind, 2.0)
        except BusUnavailable:
            return None
        return found if check(found) else None

    return await until(probe)
