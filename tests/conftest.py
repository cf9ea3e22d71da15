"""Fixtures: a real nats-server per test, started on a free port with files of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared.broker import Broker
from shared.bus import Bus
from shared.settings import Settings


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    server = await Broker.start(tmp_path / "nats")
    yield server
    await server.stop()


@pytest.fixture
def settings(broker: Broker, tmp_path: Path) -> Settings:
    return Settings(nats_url=broker.url, home=tmp_path)


@pytest.fixture
async def bus(settings: Settings) -> AsyncIterator[Bus]:
    connection = await Bus.connect(settings, "test")
    await connection.ensure()
    yield connection
    await connection.close()
