"""Lengths of answers are learned by the knowledge owner from every answer, told, and kept across a restart."""

from __future__ import annotations

import numpy as np
import pytest

from services.monitor import keeper
from services.monitor.lengths import LengthKeeper
from shared.bus import Bus
from shared.learn.live_length import START, Lengths
from shared.settings import Settings
from shared.views import ControlView
from tests.integration.monitor_parts import Store, ready, start_monitor, until
from tests.integration.test_trust import answer, features


async def told(view: ControlView, answers: int) -> tuple[int, Lengths]:
    async def probe() -> tuple[int, Lengths] | None:
        if LengthKeeper.name not in view.learned:
            return None
        version, data = view.learned[LengthKeeper.name]
        lengths = Lengths.from_bytes(data)
        return (version, lengths) if lengths.answers >= answers else None

    return await until(probe)


async def test_every_answer_teaches_its_length_without_any_judgement_and_that_survives_a_restart(
    bus: Bus, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "TELL_S", 0.1)
    monitor = await start_monitor(settings, Store("small"))
    view = ControlView(bus)
    await view.start()
    try:
        await ready(bus)
        for i in range(START + 10):
            await answer(bus, i, "alpha" if i % 4 < 2 else "beta", 0.5)
        version, lengths = await told(view, START + 10)
        x = np.frombuffer(features(1), "<f2").astype(float)
        assert np.isfinite(lengths.expected(x, ["alpha", "beta"])).all()
    finally:
        await monitor.stop()
    monitor = await start_monitor(settings, Store("small"))
    try:
        for i in range(1000, 1002):
            await answer(bus, i, "alpha", 0.5)
        newer, again = await told(view, START + 12)
        assert newer > version
        assert again.expected(x, ["alpha"]) == pytest.approx(lengths.expected(x, ["alpha"]), rel=0.5)
    finally:
        await monitor.stop()
