"""Engines forked from one process of a host: who shares it, who dies with whom, and what it saves."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
import structlog

from services.workers import cradle as cradles
from services.workers.children import Child
from services.workers.cradle import UNKNOWN, Cradle
from services.workers.protocol import Start
from services.workers.reserve import Reserve
from shared.bus import Bus
from shared.errors import NotReady, SettingsInvalid
from shared.messages import ArtifactSpec, Device
from shared.models.gguf_import import import_gguf
from shared.models.store import ModelStore
from shared.settings import Settings
from tests.tiny import write_tiny_gguf

CPU = Device(kind="cpu", name="cpu", threads=1)
pytestmark = pytest.mark.skipif(not cradles.possible(), reason="forks on Linux alone")


@pytest.fixture
async def cradle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Callable[[], Cradle]]:
    """Connections to a nursery of this test's own."""
    monkeypatch.setenv("LD_CALM_TEST", str(tmp_path))  # part of what a nursery is named for
    made: list[Cradle] = []

    def new() -> Cradle:
        made.append(Cradle())
        return made[-1]

    yield new
    for one in made:
        one.close()


async def gone(pid: int) -> None:
    """Wait until a process that is not ours has ended."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    try:
        life = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop.add_reader(life, ended.set)
    try:
        await asyncio.wait_for(ended.wait(), 20)
    finally:
        loop.remove_reader(life)
        os.close(life)


async def test_workers_share_a_nursery_and_each_takes_its_own_engines_with_it(cradle: Callable[[], Cradle]) -> None:
    """One process for both; an engine ends with its worker's connection, the other's lives; at last nothing does."""
    one, other = cradle(), cradle()
    mine, theirs = await Child.fork(one), await Child.fork(other)
    nursery = one.nursery
    assert other.nursery == nursery
    assert psutil.Process(mine.pid).ppid() == nursery
    other.close()
    await gone(theirs.pid)
    await asyncio.wait_for(theirs.ended.wait(), 20)
    assert not mine.ended.is_set()
    await mine.drain(0)
    assert mine.returncode == 0
    one.close()
    await gone(nursery)


async def test_how_an_engine_ended_is_told(cradle: Callable[[], Cradle]) -> None:
    """The status of one that was killed, as of a process of our own; the next is forked as if nothing had been."""
    one = cradle()
    child = await Child.fork(one)
    child.kill()
    await asyncio.wait_for(child.ended.wait(), 20)
    assert child.returncode == -signal.SIGKILL
    assert child.memory_bytes() == 0
    again = await Child.fork(one)
    await again.drain(0)
    assert again.returncode == 0


async def test_engines_outlive_the_nursery_and_the_next_comes_from_another(cradle: Callable[[], Cradle]) -> None:
    """Its end ends no engine; their own end is still noticed."""
    one = cradle()
    child = await Child.fork(one)
    first = one.nursery
    os.kill(first, signal.SIGKILL)
    await gone(first)
    after = await Child.fork(one)
    assert one.nursery not in (0, first)
    assert not child.ended.is_set()
    await child.drain(0)
    assert child.returncode == UNKNOWN
    await after.drain(0)


async def test_a_forked_engine_serves_and_shares_what_it_imported(
    cradle: Callable[[], Cradle], settings: Settings, bus: Bus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Loaded it is as good as one of its own making, and has less than half of its memory for itself."""
    for name, value in (("NATS_URL", settings.nats_url), ("HOME", str(settings.home)), ("LOG_LEVEL", "error")):
        monkeypatch.setenv(f"CALM_{name}", value)
    store = ModelStore(settings.models_path)
    with store.staging() as folder:
        gguf = write_tiny_gguf(tmp_path / "tiny.gguf", context=64)
        imported = import_gguf(gguf, folder, name="t", licence="", source="", variants=["fp32"])
        manifest = store.publish(folder, imported)
    spec = manifest.artifact(manifest.variants[0], slots=2, context=64, overhead_bytes=0)
    forked, spawned = await Child.fork(cradle(), spec.model), await Child.spawn()
    for child in (forked, spawned):
        await child.start(Start(worker="w", spec=spec, device=CPU, power_w=1.0), lambda _state: None)
        await child.wait_ready(30)
    own = [psutil.Process(child.pid).memory_full_info().uss for child in (forked, spawned)]
    assert own[0] < 0.5 * own[1]
    await asyncio.gather(forked.drain(1), spawned.drain(1))
    assert (forked.returncode, spawned.returncode) == (0, 0)


async def test_where_nothing_can_be_forked_engines_are_spawned(
    cradle: Callable[[], Cradle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A nursery that cannot be had costs a warning, not the load."""

    async def refuse(_name: str) -> None:
        raise NotReady("no nursery here")

    monkeypatch.setattr(cradles, "_connected", refuse)
    held = Reserve(spares=0, standby_bytes=0, log=structlog.get_logger(), cradle=cradle())
    spec = ArtifactSpec(
        name="a", model="m", variant="v", weights_bytes=1, kv_bytes_per_token=1, slots=1, context=1
    )  # fmt: skip
    child = await held.take(spec)
    assert psutil.Process(child.pid).ppid() == os.getpid()
    await child.drain(0)
    await held.close()


def test_only_the_very_same_engine_would_be_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What acts when a program starts is part of a nursery's name; what it is given at the fork is not."""
    name = cradles.name()
    monkeypatch.setenv("CALM_HOME", "/elsewhere")
    assert cradles.name() == name
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert cradles.name() != name


def test_engines_of_a_gpu_are_never_forked() -> None:
    """They are on a CPU, unless told otherwise; anything else is refused."""
    gpu = Device(kind="cuda", name="gpu", threads=1)
    assert cradles.wanted(Settings(), CPU)
    assert not cradles.wanted(Settings(), gpu)
    assert not cradles.wanted(Settings(engine_start="spawn"), CPU)
    with pytest.raises(SettingsInvalid, match="CALM_ENGINE_START"):
        cradles.wanted(Settings(engine_start="thread"), CPU)
