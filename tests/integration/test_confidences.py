"""What confidences say is learned by the knowledge owner from judgements, told, and kept across a restart."""

from __future__ import annotations

import msgspec
import pytest

from services.monitor import keeper
from services.monitor.confidences import ConfidenceKeeper
from shared import messages as m
from shared import subjects
from shared.bus import Bus
from shared.learn import confidence
from shared.learn.confidence import Line
from shared.settings import Settings
from shared.views import ControlView
from tests.integration.monitor_parts import Store, ready, start_monitor, until
from tests.integration.test_trust import features, judge, recorded
from tests.unit.monitor_records import done


async def answered(bus: Bus, i: int, logprob: float, passed: list[m.Unread] | None = None) -> None:
    """A query that alpha answered with this mean log-probability."""
    candidates = [m.Candidate(card=name, artifact="small-int8", quality=0.6) for name in ("alpha", "beta")]
    route = m.Route(query_id=f"q{i}", order=["alpha"], candidates=candidates, reason="r", embedding=features(i))
    await bus.publish(subjects.DECISION_ROUTE, route, msg_id=f"q{i}-route")
    ended = done(f"q{i}", "alpha", unread=passed or [])
    assert ended.answer is not None
    sure = m.Confidence(mean_logprob=logprob, min_logprob=logprob, mean_entropy=0.1)
    await bus.claim(msgspec.structs.replace(ended, answer=msgspec.structs.replace(ended.answer, confidence=sure)))


async def told(view: ControlView, newer_than: int = 0) -> tuple[int, dict[str, Line]]:
    async def probe() -> tuple[int, dict[str, Line]] | None:
        version, data = view.learned.get(ConfidenceKeeper.name, (0, b""))
        return (version, confidence.heard(data)) if version > newer_than else None

    return await until(probe)


async def test_judgements_teach_what_confidence_says_and_that_survives_a_restart(
    bus: Bus, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alpha is right where it is sure. A passed-over answer of beta counts towards how sure beta usually is."""
    monkeypatch.setattr(keeper, "TELL_S", 0.2)
    monitor = await start_monitor(settings, Store("small"))
    view = ControlView(bus)
    await view.start()
    passed = m.Unread(
        card="beta", artifact="small-int8", worker="w1", attempt=1, why="unsure", readable=None, mean_logprob=-2.0
    )
    try:
        await ready(bus)
        for i in range(60):
            await answered(bus, i, -0.1 if i % 2 else -0.5, [passed] if i < 5 else None)
        await recorded(monitor, 60)
        for i in range(60):
            await judge(bus, i, float(i % 2))

        async def learned() -> dict[str, Line] | None:
            lines = (
                confidence.heard(view.learned[ConfidenceKeeper.name][1])
                if ConfidenceKeeper.name in view.learned
                else {}
            )
            return lines if lines.get("alpha", Line()).slope > 0.8 else None

        line = (await until(learned))["alpha"]
        assert line.chance(0.6, -0.5) < 0.4 < 0.8 < line.chance(0.6, -0.1)
        base = monitor.monitor._owner._base
        assert base is not None
        assert base._confidences._confidences._usual["beta"].count == 5
        version = view.learned[ConfidenceKeeper.name][0]
    finally:
        await monitor.stop()
    again = await start_monitor(settings, Store("small"), "two")
    try:
        _, lines = await told(view, version)
        assert lines["alpha"].slope == pytest.approx(line.slope, abs=0.1)
        await judge(bus, 3, 1.0)  # of an answer that this owner knows from the knowledge base alone
        base = again.monitor._owner._base
        assert base is not None
        assert base._confidences._confidences.judgements == 60
    finally:
        await again.stop()
