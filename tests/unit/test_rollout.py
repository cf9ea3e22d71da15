"""Residency by rollout, and what `bench.residency` says of its runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.residency_claims import at_equal_quality, best, claims
from services.simulator.engine import Result, Simulation, Workload
from services.simulator.fleet import SimFleet, SimModel
from services.simulator.profile import UnitCosts
from services.simulator.residency import Lru
from services.simulator.rollout import Rollout
from services.simulator.routers import Fixed

UNIT = UnitCosts(prefill_s=0.0, tpot_s=0.01, slope=0.1, load_s=5.0, prefill_j=0.0, decode_j=0.5, load_j=300.0)
MODELS = 3


def _fleet(workers: int = 1) -> SimFleet:
    """Three models of one size, and room for two of them."""
    return SimFleet(
        name="test", models=tuple(SimModel(name=f"m{i}", parameters_b=1.0, memory=100) for i in range(MODELS)),
        workers=tuple(f"w{i}" for i in range(workers)), budget_bytes=(200,) * workers, footprint_bytes=(100,) * MODELS,
        unit=((UNIT,) * workers,) * MODELS, fits=np.ones((MODELS, workers), bool), shared=True, overhead_s=0.0,
    )  # fmt: skip


def _run(at: list[float], choices: list[int], keeper: Any, workers: int = 1) -> Result:
    n = len(at)
    work = Workload(
        np.array(at), np.arange(n), np.full(n, 1.0), np.full((n, MODELS), 50.0), np.ones((n, MODELS))
    )  # fmt: skip
    return Simulation(_fleet(workers), work, Fixed(np.array(choices)), keeper).run()


def _mixed(n: int = 240) -> tuple[list[float], list[int]]:
    """Two models are asked often, a third now and then."""
    rng = np.random.default_rng(3)
    return np.cumsum(rng.exponential(1.0, n)).tolist(), rng.choice(MODELS, n, p=[0.45, 0.4, 0.15]).tolist()


@pytest.mark.parametrize("known", [True, False])
def test_a_rollout_waits_less_and_swaps_less_than_lru(known: bool) -> None:
    """Queries for the rare model are served together; every query ends, within memory."""
    at, choices = _mixed()
    lru = _run(at, choices, Lru([0, 1, 2]))
    keeper = Rollout(
        [0, 1, 2], worth_s=40.0, swap_price_s=10.0, future=(np.array(at), np.array(choices)) if known else None
    )
    ours = _run(at, choices, keeper)
    assert (ours.model == np.array(choices)).all()
    assert max(ours.peak_bytes) <= 200
    assert 0 < ours.loads < lru.loads
    assert ours.latency_s.mean() < lru.latency_s.mean()


def test_a_dear_swap_is_made_less_often() -> None:
    """The price is that of a bound on swaps."""
    at, choices = _mixed()
    loads = [
        _run(at, choices, Rollout([0, 1, 2], worth_s=40.0 + price, swap_price_s=price)).loads for price in (0.0, 200.0)
    ]
    assert loads[1] < loads[0]


def test_a_rollout_refuses_what_it_does_not_know() -> None:
    """It plays one worker's memory on."""
    with pytest.raises(ValueError, match="one worker"):
        _run([0.0], [0], Rollout([0, 1, 2], worth_s=40.0), workers=2)


def _figures(accuracy: float, p95: float, per_swap: float = 30.0) -> dict[str, float]:
    return {
        "accuracy": accuracy, "latency_s_p95": p95, "latency_s_mean": p95 / 4.0, "queries_per_swap": per_swap
    }  # fmt: skip


def _runs(**joint: float) -> dict[str, dict[str, float]]:
    return {
        "blind + lru": _figures(0.48, 200.0, 9.0), "blind + gdsf": _figures(0.48, 180.0, 9.0),
        "blind + planned": _figures(0.48, 40.0, 15.0), "blind + planned, patient": _figures(0.48, 60.0, 22.0),
        "joint + planned": _figures(joint["full"], 2.0), "joint + planned, latency x 0.5": _figures(joint["half"], 4.0),
        "joint + foresight": _figures(0.475, 2.0),
    }  # fmt: skip


def test_equal_quality_lies_between_the_runs_around_it() -> None:
    """Accuracy 0.47 and 0.49 with p95 2 and 4 s: at 0.48 it is 3 s."""
    found = at_equal_quality(_runs(full=0.47, half=0.49), [0.5], 0.48)
    assert found is not None
    assert found[0] == pytest.approx(0.75)
    assert found[1]["latency_s_p95"] == pytest.approx(3.0)


def test_equal_quality_needs_no_lighter_weight_or_is_not_reached() -> None:
    """The run itself where it is accurate enough; nothing where none is, and the claims say so."""
    found = at_equal_quality(_runs(full=0.485, half=0.49), [0.5], 0.48)
    assert found is not None
    assert found[0] == 1.0
    assert found[1] == {"latency_s_mean": 0.5, "latency_s_p95": 2.0, "queries_per_swap": 30.0}
    runs = _runs(full=0.47, half=0.475)
    assert at_equal_quality(runs, [0.5], 0.48) is None
    assert any("at every weight" in claim for claim, _, _ in claims(runs, [0.5]))


def test_the_best_of_those_that_do_not_thrash() -> None:
    """Of the blind router's, the fastest, with and without the bound on swaps."""
    runs = _runs(full=0.47, half=0.49)
    assert best(runs, "blind + ", 0.0) == "blind + planned"
    assert best(runs, "blind + ", 20.0) == "blind + planned, patient"
    assert best(runs, "blind + ", 50.0) is None
