"""Each service by itself, with nothing but a broker."""

from __future__ import annotations

import pytest

from shared.bus import Bus
from shared.settings import Settings
from tests.processes import running
from tests.system.conftest import STAGES


@pytest.mark.parametrize("service", [*STAGES, "worker"])
async def test_a_service_that_is_alone_starts_and_leaves_when_it_is_told_to(
    service: str, settings: Settings, bus: Bus
) -> None:
    """Most wait for the fleet that a monitor would publish: SIGTERM ends that waiting, too, without an error."""
    async with running(service, settings, bus, states=("starting", "ready")) as process:
        assert await process.stop() == 0, process.log.read_text()[-3000:]
        assert "Traceback" not in process.log.read_text()
