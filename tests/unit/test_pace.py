"""The machine's pace, its own time, and what a calibration makes of answers that others disturbed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from bench.calibrate import Calibration, as_toml, costs
from bench.live import Live
from bench.others import Used, used
from bench.pace import MARGIN, Clock, Pace, alone_s, fitting, pace
from services.planner.decide import cost
from services.simulator.profile import parse_profile
from shared.errors import DataInvalid
from tests.samples import GB, card, spec

PROFILE = parse_profile(
    """
name = "made"
[artifacts.small]
prefill_s = 0.001
tpot_s = 0.01
slope = 0.1
load_s = 1.0
prefill_j = 0.0
decode_j = 0.0
load_j = 0.0
"""
)


def _answer(live: Live, name: str, at: float, *, slower: float = 1.0, load_s: float = 0.0, read: int = 100) -> str:
    """An answer of 11 tokens by an artifact that takes 1 ms to read a token and 10 ms to write one."""
    query_id = f"q{len(live.at)}"
    prefill_s, decode_s = slower * (read * 0.001 + 0.01), slower * 10 * 0.01
    timings = {"queue_s": 0.0, "load_s": load_s, "prefill_s": prefill_s, "decode_s": decode_s}
    timings["total_s"] = sum(timings.values())
    answer: dict[str, Any] = {"artifact": name, "usage": {"tokens_in": read, "tokens_out": 11}, "timings": timings}
    live.at[query_id], live.latency[query_id] = at, timings["total_s"] + 0.005
    live.answer[query_id] = answer
    return query_id


def test_the_pace_is_what_lone_resident_queries_took() -> None:
    """A query that met another, or waited for its model, says nothing of it; the nearest in time count."""
    live = Live()
    ids = [_answer(live, "small", 0.0), _answer(live, "small", 100.0, slower=2.0)]
    ids.append(_answer(live, "small", 50.0, slower=9.0, load_s=1.0))
    ids += [_answer(live, "small", 60.0, slower=9.0), _answer(live, "small", 60.1, slower=9.0)]
    found = pace(live, ids, PROFILE)
    assert found.seen == pytest.approx([1.0, 2.0])
    assert found.of([0.0, 50.0, 100.0, 1e6]) == pytest.approx([1.0, 1.5, 2.0, 2.0], abs=0.06)
    assert alone_s(PROFILE, "small", 100, 11) == pytest.approx(0.21)
    assert Pace([], []).of([3.0]).tolist() == [1.0]


def test_the_machines_own_time_is_as_long_as_real_time_and_slow_where_it_is_slow() -> None:
    """Own and real time are inverse to each other, within the trace and far beyond it, and equally long over it; at a
    constant pace they are the same."""
    clock = Clock(Pace([20.0, 80.0], [1.0, 3.0]), 0.0, 100.0)
    for t in (-300.0, -50.0, 0.0, 31.4, 77.7, 100.0, 155.0, 900.0):
        assert clock.real(clock.own(t)) == pytest.approx(t)
    assert clock.own(100.0) - clock.own(0.0) == pytest.approx(100.0, abs=0.5)
    early, late = clock.own(21.0) - clock.own(20.0), clock.own(81.0) - clock.own(80.0)
    assert early / late == pytest.approx(3.0, rel=0.01)
    # Half the time at 1 and half at 3: 1.5 in the mean of speeds.
    assert clock.mean == pytest.approx(1.5, rel=0.02)
    even = Clock(Pace([0.0, 9.0], [1.25, 1.25]), 0.0, 10.0)
    assert even.mean == pytest.approx(1.25)
    assert even.own(7.5) - even.own(2.5) == pytest.approx(5.0)


def test_a_gap_is_used_where_a_slow_machine_would_still_be_done() -> None:
    usual = {"large": 1.0, "small": 0.4}
    assert fitting(MARGIN * 0.4 - 0.01, usual, {}) is None
    assert fitting(MARGIN * 0.4 + 0.01, usual, {"small": 7}) == "small"
    assert fitting(MARGIN + 0.01, usual, {"small": 1}) == "large"
    assert fitting(9.0, {}, {}) is None


def test_a_calibration_leaves_out_what_others_put_on_it() -> None:
    """Two of three answers took up to three times as long; the profile is still that of the machine by itself, and it
    can be read back."""
    rng = np.random.default_rng(0)
    live, name = Live(), "small"
    single = [_answer(live, name, 10.0 * i, slower=s) for i, s in enumerate((1.0, *rng.uniform(1.5, 3.0, 4), 1.0))]
    bursts = [[_answer(live, name, 100.0 + 10 * i + 0.01 * j, slower=2.0 + i) for j in range(6)] for i in range(2)]
    cold = [_answer(live, name, 200.0 + 10 * i, load_s=s) for i, s in enumerate((0.8, 0.8, 2.0, 2.5))]
    believed = cost.UnitCosts(
        prefill_s=1.0, tpot_s=1.0, load_s=2.0, prefill_j=0.1, decode_j=0.2, load_j=3.0, learned=True
    )
    asked = Calibration({name: single}, {name: bursts}, {name: cold}, [], [], {name: believed})
    one = card("one", spec(name, weights=GB // 3), domains={"d": 0.5}, quality=0.5)
    found = costs(live, asked, {"one": one})
    unit = found.artifacts[name].unit
    assert unit.tpot_s == pytest.approx(0.01)
    assert unit.prefill_s == pytest.approx(0.001)
    assert unit.load_s == pytest.approx(0.8, rel=0.05)
    assert unit.load_j == pytest.approx(3.0 * unit.load_s / 2.0)
    assert 0.1 < unit.slope < 0.25, "the quicker burst: six together take twice as long as one"
    assert found.overhead_s == pytest.approx(0.005)
    profile = parse_profile(as_toml(found, "made", "made"))
    assert alone_s(profile, name, 100, 11) == pytest.approx(0.21)
    with pytest.raises(DataInvalid, match="no profile"):
        parse_profile("name = 3")


def test_others_are_those_that_are_not_ours() -> None:
    """Of two cores for ten seconds, five idle and nine ours, others had the rest; a child's work is ours."""
    assert Used(15.0, 120.0, 39.0).others(Used(10.0, 100.0, 30.0)) == pytest.approx(0.3)
    before = used()
    assert before.others(before) == 0.0
    work = "import time\nwhile time.process_time() < 0.4: pass"
    subprocess.run([sys.executable, "-c", work], check=True, start_new_session=True, timeout=60)
    assert used().own_s - before.own_s > 0.3
