"""The energy ledger on the running system: what answers were charged is what their engine was."""

from __future__ import annotations

import asyncio
import math

import pytest

from shared import messages as m
from shared import subjects
from shared.bus import Bus
from tests.system.client import ask
from tests.system.conftest import System

pytestmark = pytest.mark.system


async def _ledger(bus: Bus) -> m.EnergyReport:
    """The first worker's ledger, once it has reported the answers."""
    for _ in range(200):
        found = await bus.ask(subjects.knowledge("energy"), m.KnowledgeRequest(), m.EnergyReports, 5.0)
        if found.workers and any(a.answers >= 3 for a in found.workers[0].accounts):
            return found.workers[0]
        await asyncio.sleep(0.1)  # workers report every five seconds, to nobody in particular
    raise AssertionError("no report arrived")


async def test_answers_are_charged_and_the_accounts_add_up(system: System) -> None:
    """Each answer has its joules; active, load and idle joules are the meter's total."""
    await system.add_worker("w1")
    answers = [await ask(system.bus.nc, prompt=f"hello there {n}", model="plain") for n in range(3)]
    assert all(a["energy"]["joules"] > 0 and a["energy"]["source"] in {"model", "rapl"} for a in answers)
    worker = await _ledger(system.bus)
    held = math.fsum(a.active_j + a.load_j for a in worker.accounts) + worker.idle_j + worker.other_j
    assert abs(held - worker.total_j) <= 1e-9 * worker.total_j
    account = next(a for a in worker.accounts if a.artifact == answers[0]["artifact"])
    assert account.loads == 1
    assert account.load_j > 0
    assert account.active_j > 0
    assert account.answers_j == pytest.approx(sum(a["energy"]["joules"] for a in answers))
