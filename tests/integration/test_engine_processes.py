"""Engine processes as a worker's supervisor uses them: spare, loaded, parked, loaded again, ended."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog

from services.workers.children import Child
from services.workers.protocol import Start
from services.workers.reserve import Reserve
from shared.bus import Bus
from shared.messages import ArtifactSpec, Device
from shared.models.gguf_import import import_gguf
from shared.models.store import ModelStore
from shared.settings import Settings
from tests.tiny import write_tiny_gguf

CPU = Device(kind="cpu", name="cpu", threads=1)


@pytest.fixture
def spec(settings: Settings, tmp_path: Path) -> ArtifactSpec:
    store = ModelStore(settings.models_path)
    with store.staging() as folder:
        gguf = write_tiny_gguf(tmp_path / "tiny.gguf", context=64)
        manifest = store.publish(
            folder, import_gguf(gguf, folder, name="t", licence="", source="", variants=["fp32"])
        )  # fmt: skip
    return manifest.artifact(manifest.variants[0], slots=2, context=64, overhead_bytes=0)


@pytest.fixture
async def environment(settings: Settings, bus: Bus, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """What engine processes read; they need the broker."""
    for name, value in (("NATS_URL", settings.nats_url), ("HOME", str(settings.home)), ("LOG_LEVEL", "error")):
        monkeypatch.setenv(f"CALM_{name}", value)
    yield


def reserve(standby_bytes: int = 10**9) -> Reserve:
    return Reserve(spares=1, standby_bytes=standby_bytes, log=structlog.get_logger())


async def load(child: Child, spec: ArtifactSpec) -> None:
    await child.start(Start(worker="w", spec=spec, device=CPU, power_w=1.0), lambda _state: None)
    await child.wait_ready(30)


async def test_an_evicted_engine_stands_by_and_serves_again_in_the_same_process(
    environment: None, spec: ArtifactSpec
) -> None:
    """Parked, it is counted and no longer resident; taken back it is ready without a load; at last nothing is left."""
    held = reserve()
    child = await held.take(spec)
    await load(child, spec)
    assert child.memory_bytes() > 0
    size = await held.put(spec, child, 5)
    assert held.standbys == [spec.name]
    assert held.standby_bytes == size > 0
    again = await held.take(spec)
    assert again is child
    assert held.standby_bytes == 0
    await load(again, spec)
    await held.put(spec, again, 5)
    await held.close()
    assert child.ended.is_set()
    assert child.memory_bytes() == 0


async def test_standbys_keep_to_their_budget_and_to_their_artifact(environment: None, spec: ArtifactSpec) -> None:
    """Without room for it an evicted engine ends; one made for other slots is not used."""
    for budget in (0, 1):
        held = reserve(budget)
        child = await held.take(spec)
        await load(child, spec)
        assert await held.put(spec, child, 5) == 0
        assert child.ended.is_set()
        await held.close()
    held = reserve()
    child = await held.take(spec)
    await load(child, spec)
    await held.put(spec, child, 5)
    other = ArtifactSpec(
        name=spec.name, model=spec.model, variant=spec.variant, weights_bytes=spec.weights_bytes,
        kv_bytes_per_token=spec.kv_bytes_per_token, slots=1, context=64,
    )  # fmt: skip
    fresh = await held.take(other)
    assert fresh is not child
    assert child.ended.is_set()
    await fresh.drain(0)
    await held.close()


async def test_a_spare_is_used_and_a_dead_one_is_not(environment: None, spec: ArtifactSpec) -> None:
    """A load takes the process that waits; one that died meanwhile is replaced."""
    held = reserve()
    held.fill()
    assert held._filling is not None
    await held._filling
    (spare,) = held._spares
    assert await held.take(spec) is spare
    await load(spare, spec)
    await spare.drain(1)
    held.fill()
    await held._filling
    (dead,) = held._spares
    os.kill(dead.pid, 9)
    await dead.ended.wait()
    fresh = await held.take(spec)
    assert fresh is not dead
    await load(fresh, spec)
    await fresh.drain(1)
    await held.close()
