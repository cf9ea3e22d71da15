"""`python -m shared.health`."""

from __future__ import annotations

import contextlib

from shared import health
from shared.bus import Bus
from shared.settings import Settings
from tests.processes import running


async def test_health_says_whether_a_service_is_ready(
    settings: Settings, bus: Bus, stack: contextlib.AsyncExitStack
) -> None:
    """True once the service on this host says that it is ready, False while there is none."""
    assert not await health.ready("monitor", settings, timeout_s=1.2)
    await stack.enter_async_context(running("monitor", settings, bus))
    assert await health.ready("monitor", settings, timeout_s=5.0)
