"""`calm energy` and the ledger in the knowledge base: sums over starts, answers beside them, estimates marked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.cli.energy import joules, overhead, render, residual_j
from shared import messages as m
from shared.knowledge import reads, rows
from shared.knowledge.store import Batch, Store
from tests.unit.monitor_records import done


def report(started_at: float = 1.0, at: float = 9.0, total_j: float = 100.0, **more: object) -> m.EnergyReport:
    accounts = [
        m.EnergyAccount(artifact="a", active_j=0.45 * total_j, load_j=0.1 * total_j, loads=2, busy_s=3.0),
        m.EnergyAccount(artifact="b", active_j=0.15 * total_j, tokens_out=7),
    ]
    values: dict[str, object] = {
        "worker": "w1", "host": "h", "device_class": "cuda-x", "source": "nvml", "started_at": started_at, "at": at,
        "elapsed_s": 8.0, "total_j": total_j, "idle_j": 0.3 * total_j, "accounts": accounts,
    }  # fmt: skip
    return m.EnergyReport(**{**values, **more})  # type: ignore[arg-type]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    made = Store(f"sqlite+aiosqlite:///{tmp_path / 'knowledge.db'}")
    await made.open()
    yield made
    await made.close()


async def test_the_latest_report_of_each_start_counts(store: Store) -> None:
    """Reports of one start replace each other, those of several starts are added up; answers stand beside them."""
    for one in (report(total_j=40.0), report(total_j=100.0), report(started_at=20.0, at=30.0, total_j=10.0)):
        await store.commit(Batch(energy=rows.energy(one)))
    end = done("q")
    assert end.answer is not None
    row = {**rows.completion(end, 5.0), "worker": "w1", "artifact": "a"}
    await store.commit(Batch(completions=[row]))
    (worker,) = (await reads.energy(store)).workers
    assert (worker.worker, worker.source, worker.started_at, worker.at) == ("w1", "nvml", 1.0, 30.0)
    assert (worker.total_j, worker.idle_j, worker.elapsed_s) == (pytest.approx(110.0), pytest.approx(33.0), 16.0)
    assert abs(residual_j(worker)) < 1e-9
    a, b = worker.accounts
    assert (a.active_j, a.load_j, a.loads) == (pytest.approx(49.5), pytest.approx(11.0), 4)
    assert (a.answers, a.answers_j, b.answers) == (1, end.answer.energy.joules, 0)
    assert await store.forget(20.0) == 5  # three rows of the first start, the query and its answer


async def test_answers_wait_for_the_report_that_has_their_work(store: Store) -> None:
    """An answer that ended after the last report is not yet held against it: both sums speak of the same time."""
    await store.commit(Batch(energy=rows.energy(report(at=9.0))))
    ends = {"before": 8.9, "after": 9.1}
    for name, at in ends.items():
        row = {**rows.completion(done(name), at), "worker": "w1", "artifact": "a"}
        await store.commit(Batch(completions=[row]))
    assert (await reads.energy(store)).workers[0].accounts[0].answers == 1
    await store.commit(Batch(energy=rows.energy(report(at=14.0))))
    assert (await reads.energy(store)).workers[0].accounts[0].answers == 2


def test_no_joules_are_shown_as_less_than_none() -> None:
    """What answers were charged too much at once is called that, and no negative amount is in no answer."""
    account = m.EnergyAccount(artifact="a", active_j=10.0, answers=1, answers_j=12.5)
    text = render(m.EnergyReports(workers=[report(accounts=[account])]))
    assert "charged 2.5 J more than was active" in text
    assert "in no answer" not in text
    assert "in no answer (cancelled, failed, not readable, still running, rounding): 60 J" in render(
        m.EnergyReports(workers=[report()])
    )


def test_loads_and_idling_are_shared_out_over_the_answers() -> None:
    """Each model pays for its own loads, and for idling as much as it was active."""
    worker = report()
    assert [overhead(worker, x) for x in worker.accounts] == pytest.approx([10.0 + 30.0 * 0.75, 30.0 * 0.25])


def test_the_ledger_is_shown_with_its_residual_and_carbon() -> None:
    """Each model, idling, the meter and what is left; carbon when its intensity is set."""
    text = render(m.EnergyReports(workers=[report(total_j=3.6e6)]), 400.0)
    for part in ("w1 on cuda-x", "measured by the GPU", "3.6 MJ in 8 s", "(400 g CO2 at 400 g/kWh)", "residual"):
        assert part in text
    assert "(0.00%)" in text
    assert "CO2" not in render(m.EnergyReports(workers=[report()]))
    assert "ESTIMATED" not in text
    assert render(m.EnergyReports()).startswith("No worker")


def test_an_estimate_is_marked_at_every_figure() -> None:
    """Stated powers are no measurement, and nobody is left to think so."""
    text = render(m.EnergyReports(workers=[report(source="model"), report(source="model", worker="w2")]))
    assert "ESTIMATED" in text
    assert "~45 J" in text
    assert "~100 J in 8 s" in text
    assert "w1, w2 share the host h" in text


def test_amounts_are_readable() -> None:
    """Joules, kilojoules, megajoules."""
    assert [joules(x) for x in (0.0, 12.34, 4560.0, 7.89e6)] == ["0 J", "12.3 J", "4.56 kJ", "7.89 MJ"]
