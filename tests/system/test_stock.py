"""A worker on a host whose model store is empty: nothing is loaded there until it has the models."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from shared import codec, subjects
from shared import messages as m
from tests.system.client import ask
from tests.system.conftest import System

pytestmark = pytest.mark.system

ARTIFACTS = ["tiny-fp32", "tiny-int4", "tiny-int8"]


async def state(system: System, worker: str) -> m.WorkerState:
    data = (await system.bus.kv_all(subjects.BUCKET_FLEET))[subjects.fleet_key(worker)]
    return codec.unpack(data, m.WorkerState)


@pytest.mark.timeout(120)
async def test_a_worker_without_models_is_left_alone_until_it_has_them(system: System, tmp_path: Path) -> None:
    """It says what it lacks; the other answers, and no load fails there. Then it gets the models."""
    loads: list[m.Load] = []

    async def on_load(message: object) -> None:
        loads.append(codec.unpack(message.data, m.Load))  # type: ignore[attr-defined]

    store = tmp_path / "elsewhere"
    await system.bus.subscribe(subjects.worker_request("poor", "load"), on_load)
    await system.add_worker("poor", CALM_MODELS_DIR=str(store))
    assert (await state(system, "poor")).lacks == ARTIFACTS
    refused = await ask(system.bus.nc, prompt="hello", deadline_s=20)
    assert refused["code"] == "no_feasible_model"
    assert "calm models pull" in refused["remedy"]

    await system.add_worker("rich")
    answers = await asyncio.gather(*(ask(system.bus.nc, prompt=f"hello {n}") for n in range(6)))
    assert {answer["worker"] for answer in answers} == {"rich"}
    assert loads == []

    registered = asyncio.Event()

    async def on_state(message: object) -> None:
        if not codec.unpack(message.data, m.WorkerState).lacks:  # type: ignore[attr-defined]
            registered.set()

    await system.bus.subscribe(subjects.kv(subjects.BUCKET_FLEET, subjects.fleet_key("poor")), on_state)
    shutil.copytree(system.settings.models_path, store)
    async with asyncio.timeout(30):
        await registered.wait()
