"""Each service by itself, with nothing but a broker."""

from __future__ import annotations

import pytest

from shared import messages as m
from shared import subjects
from shared.bus import Bus
from shared.settings import Settings
from shared.views import FleetView
from tests.integration.monitor_parts import until
from tests.processes import running
from tests.samples import card
from tests.system.conftest import STAGES


@pytest.mark.parametrize("service", [*STAGES, "worker", "gateway"])
async def test_a_service_that_is_alone_starts_and_leaves_when_it_is_told_to(
    service: str, settings: Settings, bus: Bus
) -> None:
    """Most wait for the fleet that a monitor would publish: SIGTERM ends that waiting, too, without an error."""
    async with running(service, settings, bus, states=("starting", "ready")) as process:
        assert await process.stop() == 0, process.log.read_text()[-3000:]
        assert "Traceback" not in process.log.read_text()


async def test_a_worker_waits_for_its_fleet_however_long_that_takes_and_keeps_to_its_budget(
    settings: Settings, bus: Bus
) -> None:
    """The fleet of a first run is fetched while workers are up already: its `worker_memory` holds all the same."""
    fleet = FleetView(bus)
    await fleet.start()
    async with running("worker", settings, bus, states=("starting",)) as process:

        async def waits() -> bool | None:
            return "waiting_for_fleet" in process.log.read_text() or None

        async def registered() -> m.WorkerState | None:
            return next(iter(fleet.workers()), None)

        await until(waits)
        assert not fleet.workers()
        policy = m.Policy(fleet="late", worker_memory_bytes=123_456_789)
        await bus.kv_put(subjects.BUCKET_MODELS, subjects.POLICY_KEY, policy)
        await bus.kv_put(subjects.BUCKET_MODELS, "late", card("late"))
        assert (await until(registered)).budget_bytes == 123_456_789
        assert await process.stop() == 0, process.log.read_text()[-3000:]
