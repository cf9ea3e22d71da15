"""Replaying recorded queries: what is built from decisions, what another fleet changes, and how it is shown."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from services.cli import replay
from services.planner.decide import routing
from services.planner.decide.routing import State
from services.simulator import recorded
from services.simulator.recorded import Answered, Recorded
from shared import messages as m
from shared.errors import DataInvalid
from tests.samples import GB, analyzed, card, engine, spec, worker

POLICY = m.Policy(fleet="f", latency_slo_s=5.0, energy_ref_j=50.0, min_residence_s=1.0)
SPECS = [spec(name, weights=GB // 3) for name in ("a-int8", "b-int8", "c-int8")]
CARDS = {c.name: c for c in (card(s.model, s, domains={s.model: 0.9}, quality=0.3) for s in SPECS)}


def _recorded(count: int = 40) -> Recorded:
    """Queries for three models in turn, on a worker with memory for two."""
    fleet = [worker(engines=[engine(SPECS[0]), engine(SPECS[1])])]
    state = State(cards=CARDS, policy=POLICY, workers=fleet)
    answered = []
    for i in range(count):
        wanted = SPECS[i % 3].model
        query = msgspec.structs.replace(
            analyzed(domains={wanted: 1.0}, tokens_in={x.model: 20 for x in SPECS}, tokens_out=30.0)
        )
        answered.append(Answered(100.0 + 2.0 * i, routing.decide(query, state, 0.0), 20, 30))
    return recorded.build(answered, CARDS, fleet, m.Qos(), POLICY, overhead_s=0.1)


def test_recorded_queries_become_a_simulation_of_the_same_fleet() -> None:
    """Arrivals, predicted qualities, lengths and resident models are those that were recorded."""
    was = _recorded()
    assert was.fleet.names == ("a-int8", "b-int8", "c-int8")
    assert was.work.arrival_s[1] == 2.0
    assert was.resident == ((0, 1),)
    assert (was.quality.argmax(axis=1) == np.arange(40) % 3).all()
    result = recorded.simulate(was)
    assert len(result.latency_s) == 40
    assert (result.latency_s > 0.1).all()


def test_more_memory_or_workers_make_loads_needless() -> None:
    """With memory for all three models queries go to the best model each, at no more latency than before."""
    was = _recorded()
    roomy = recorded.simulate(recorded.changed(was, budget_bytes=4 * GB))
    tight = recorded.simulate(was, "lru")
    assert roomy.score.mean() >= recorded.simulate(was).score.mean()
    assert roomy.loads <= 3 + tight.loads
    two = recorded.changed(was, workers=2)
    assert two.fleet.workers == ("worker-1", "worker-2")
    assert len(recorded.simulate(two).latency_s) == 40


def test_faster_arrivals_are_not_faster_answers() -> None:
    """At a hundred times the load nothing becomes quicker."""
    was = _recorded()
    rushed = recorded.simulate(recorded.changed(was, faster=100.0))
    assert rushed.latency_s.mean() >= recorded.simulate(was).latency_s.mean() - 1e-9


def test_what_cannot_be_replayed_is_said() -> None:
    """Nothing recorded, memory for no model, an unknown policy."""
    with pytest.raises(DataInvalid, match="nothing to replay"):
        recorded.build([], CARDS, [worker()], m.Qos(), POLICY, 0.0)
    with pytest.raises(DataInvalid, match="fit no worker"):
        recorded.changed(_recorded(), budget_bytes=1000)
    with pytest.raises(DataInvalid, match="no residency policy"):
        recorded.simulate(_recorded(), "magic")


def test_the_outcome_is_shown_as_text_page_and_picture(tmp_path: Path) -> None:
    """Every figure stands in the table and on the page; the page refers to nothing elsewhere; PNG is PNG."""
    was = _recorded()
    outcomes = [replay.outcome("as it was", was, recorded.simulate(was)),
                replay.outcome("what if", was, recorded.simulate(was, "lru"))]  # fmt: skip
    text = replay.render(outcomes)
    for label, _ in replay.ROWS:
        assert label in text
    replay.write(tmp_path / "r.html", outcomes)
    page = (tmp_path / "r.html").read_text()
    assert "share of c-int8" in page
    assert "http" not in page
    pytest.importorskip("matplotlib")
    replay.write(tmp_path / "r.png", outcomes)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataInvalid, match="neither PNG nor HTML"):
        replay.write(tmp_path / "r.pdf", outcomes)
