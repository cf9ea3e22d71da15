"""Fixtures: a real nats-server per test, started on a free port with files of its own."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest

from shared.broker import Broker
from shared.bus import Bus
from shared.settings import Settings

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")


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


@pytest.fixture(autouse=True)
def subnormal_numbers() -> Iterator[None]:
    """Sessions have the processor treat subnormal numbers as zeros in the thread that made them, for good; hypothesis
    refuses to draw floats then. On glibc, -1 stands for the default environment."""
    yield
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libm.so.6").fesetenv(ctypes.c_void_p(-1))
