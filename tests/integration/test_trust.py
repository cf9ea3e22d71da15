"""Learned quality and trust in cards: told to planners, recorded, kept across a restart of the knowledge owner."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from nats.aio.msg import Msg

from services.monitor import trust
from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.learn.kept import compact
from shared.learn.live import Learner
from shared.learn.standing import Standing
from shared.settings import Settings
from shared.views import ControlView
from tests.integration.monitor_parts import Running, Store, ready, start_monitor, until
from tests.unit.monitor_records import done

WIDTH = 8


def features(i: int) -> bytes:
    """Two kinds of query, told apart by their first entry."""
    x = np.random.default_rng(i).normal(0.0, 0.05, WIDTH)
    x[0] += 1.0 if i % 2 else -1.0
    return compact((x / np.linalg.norm(x)).astype("<f4").tobytes())


async def answer(bus: Bus, i: int, card: str, quality: float) -> None:
    """A query that was routed to `card` and answered by it."""
    candidates = [
        m.Candidate(card=name, artifact="small-int8", quality=quality, terms={"prior": quality})
        for name in ("alpha", "beta")
    ]
    route = m.Route(query_id=f"q{i}", order=[card], candidates=candidates, reason="best_utility", embedding=features(i))
    await bus.publish(subjects.DECISION_ROUTE, route, msg_id=f"q{i}-route")
    await bus.claim(done(f"q{i}", card))


async def judge(bus: Bus, i: int, score: float) -> None:
    reply = await bus.nc.request(subjects.FEEDBACK, codec.to_json(m.Feedback(query_id=f"q{i}", score=score)), timeout=5)
    assert isinstance(codec.from_json(reply.data, m.Ok | m.Failure), m.Ok)  # type: ignore[arg-type]


async def recorded(monitor: Running, count: int) -> None:
    """Wait until the owner has the routes."""

    async def probe() -> bool | None:
        base = monitor.monitor._owner._base
        return True if base is not None and len(base._trust._routes) >= count else None

    await until(probe)


async def told(view: ControlView, judgements: int) -> tuple[int, Learner]:
    async def probe() -> tuple[int, Learner] | None:
        if "quality" not in view.learned:
            return None
        version, data = view.learned["quality"]
        learner = Learner.from_bytes(data)
        return (version, learner) if learner.judgements >= judgements else None

    return await until(probe)


async def test_judgements_teach_planners_which_card_is_good_at_what_and_that_survives_a_restart(
    bus: Bus, settings: Settings
) -> None:
    monitor = await start_monitor(settings, Store("small"))
    view = ControlView(bus)
    await view.start()
    try:
        for i in range(80):
            await answer(bus, i, "alpha" if i % 4 < 2 else "beta", 0.5)
        await recorded(monitor, 80)
        for i in range(80):
            alpha, odd = i % 4 < 2, i % 2 == 1
            await judge(bus, i, 1.0 if alpha == odd else 0.0)  # alpha is good at the odd kind, beta at the even
        version, learner = await told(view, 80)
        assert learner.quality is not None
        for i in (1001, 1002):
            x = np.frombuffer(features(i), "<f2").astype(np.float64)
            alpha_mean, beta_mean = learner.quality.predict(x[None, :]).mean[0]
            assert (alpha_mean > beta_mean) == (i % 2 == 1)
    finally:
        await monitor.stop()
    again = await start_monitor(settings, Store("small"), "two")
    try:
        await answer(bus, 80, "alpha", 0.5)
        await judge(bus, 80, 1.0)
        later, learner = await told(view, 81)
        assert later > version
    finally:
        await again.stop()


@pytest.mark.timeout(60)
async def test_a_card_that_gets_worse_is_quarantined_and_a_symptom_is_recorded(bus: Bus, settings: Settings) -> None:
    monitor = await start_monitor(settings, Store("small"))
    view = ControlView(bus)
    await view.start()
    heard: list[m.Symptom] = []

    async def on_symptom(message: object) -> None:
        heard.append(codec.unpack(message.data, m.Symptom))  # type: ignore[attr-defined]

    await bus.subscribe(subjects.symptom("drift"), on_symptom)
    try:
        for i in range(60):
            await answer(bus, i, "alpha", 0.8)
        await recorded(monitor, 60)
        for i in range(60):
            await judge(bus, i, 0.0)

        async def quarantined() -> m.CardStanding | None:
            found = view.standings.get("alpha")
            return found if found is not None and found.state == "quarantined" else None

        found = await until(quarantined)
        assert found.reason == "drift"
        assert [s.subject for s in heard] == ["alpha"]
    finally:
        await monitor.stop()
    fresh = ControlView(bus)
    await fresh.start()
    assert fresh.standings["alpha"].state == "quarantined"  # a planner that starts now knows it


async def test_golden_probes_are_asked_of_a_quarantined_card_and_judged(bus: Bus, settings: Settings) -> None:
    """The test plays analyzer, planner and engine: it answers what the intake accepted."""
    probes = (
        '\n[[probes]]\nprompt = "What is 6 times 7?"\nexpect = "\\\\b42\\\\b"\ncards = ["alpha"]\n'
        '\n[[probes]]\nprompt = "Capital of France?"\nexpect = "paris"\n'
    )
    monitor = await start_monitor(settings, Store("small"), more=probes)
    view = ControlView(bus)
    await view.start()
    asked: list[m.Query] = []

    async def serve(message: Msg) -> None:
        accepted = codec.unpack(message.data, m.Accepted)
        asked.append(accepted.query)
        candidate = m.Candidate(card="alpha", artifact="small-int8", quality=0.8, terms={"prior": 0.8})
        route = m.Route(
            query_id=accepted.query_id, order=["alpha"], candidates=[candidate], reason="asked_for",
            embedding=features(len(asked)),
        )  # fmt: skip
        await bus.publish(subjects.DECISION_ROUTE, route, msg_id=f"{accepted.query_id}-route")
        ended = done(accepted.query_id, "alpha")
        assert ended.answer is not None
        words = "It is 42." if "6 times 7" in (accepted.query.prompt or "") else "PARIS, of course"
        answer = msgspec.structs.replace(ended.answer, text=words)
        await bus.finish(
            msgspec.structs.replace(ended, answer=answer, reply=accepted.reply, encoding=accepted.encoding)
        )

    await bus.subscribe(subjects.NEW, serve)
    try:
        await ready(bus)
        base = monitor.monitor._owner._base
        assert base is not None
        base._trust._standings["alpha"] = Standing(state="quarantined")
        base._probing._last_s = 0.0

        async def judged() -> bool | None:
            return True if base._trust.standings["alpha"].since >= 1 else None

        await until(judged)
        assert asked[0].model == "alpha"
        assert asked[0].priority == "lo"
        assert base._trust.standings["alpha"].probed == 1.0
    finally:
        await monitor.stop()


async def test_a_judgement_given_again_takes_the_place_of_the_first_across_a_restart_too(
    bus: Bus, settings: Settings
) -> None:
    """The knowledge owner restarts between an answer's two judgements: it is still learned from once."""
    monitor = await start_monitor(settings, Store("small"))
    view = ControlView(bus)
    await view.start()
    try:
        for i in range(60):
            await answer(bus, i, "alpha", 0.5)
        await recorded(monitor, 60)
        for i in range(60):
            await judge(bus, i, 1.0)
        await told(view, 60)
    finally:
        await monitor.stop()
    again = await start_monitor(settings, Store("small"), "two")
    try:
        await answer(bus, 60, "alpha", 0.5)
        for i in (7, 7, 60):  # the last is new: once it is told, so are those before it
            await judge(bus, i, 0.0)
        _, learner = await told(view, 61)
        assert learner.judgements == 61
        assert learner.quality is not None
        assert learner.quality.sums.count.sum() == pytest.approx(61.0)
    finally:
        await again.stop()


async def answered(
    bus: Bus, i: int, card: str, reading: m.Reading | None, unread: list[m.Unread] | None = None
) -> None:
    """A query that was routed to alpha, and answered by `card`."""
    candidates = [
        m.Candidate(card=name, artifact="small-int8", quality=0.5, terms={"prior": 0.5}) for name in ("alpha", "beta")
    ]
    route = m.Route(query_id=f"q{i}", order=["alpha"], candidates=candidates, reason="r", embedding=features(i))
    await bus.publish(subjects.DECISION_ROUTE, route, msg_id=f"q{i}-route")
    ended = done(f"q{i}", card, unread=unread or [])
    assert ended.answer is not None
    await bus.claim(msgspec.structs.replace(ended, answer=msgspec.structs.replace(ended.answer, reading=reading)))


async def heard(view: ControlView, readings: int) -> Learner:
    async def probe() -> Learner | None:
        if "quality" not in view.learned:
            return None
        learner = Learner.from_bytes(view.learned["quality"][1])
        return learner if learner.readings >= readings else None

    return await until(probe)


def chances(learner: Learner) -> list[float]:
    """Of alpha and beta to be read, for a query of the odd kind."""
    assert learner.readable is not None
    x = np.frombuffer(features(1), "<f2").astype(np.float64)
    return [float(chance) for chance in learner.readable.predict(x[None, :], np.ones((1, 2))).mean[0]]


async def test_whether_answers_could_be_read_teaches_planners_without_any_judgement_and_survives_a_restart(
    bus: Bus, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third answer of alpha is retried with beta: the end of such a query teaches of both. Answers that nothing
    was expected of teach nothing; nor do judgements of unreadable ones, for they are known to be worth nothing."""
    monkeypatch.setattr(trust, "READINGS_S", 0.0)
    monitor = await start_monitor(settings, Store("small"))
    view = ControlView(bus)
    await view.start()
    good, bad = m.Reading(value="A", why="announced"), m.Reading(value=None, why="nothing")
    first = m.Unread(card="alpha", artifact="small-int8", worker="w1", attempt=1, why="nothing", tokens_out=9)
    try:
        await ready(bus)
        for i in range(60):
            if i % 3 == 0:
                await answered(bus, i, "beta", good, [first])
            else:
                await answered(bus, i, "alpha", bad if i % 3 == 1 else None)
        learner = await heard(view, 60)
        alpha, beta = chances(learner)
        assert alpha < 0.4
        assert beta > alpha + 0.4
        assert learner.judgements == 0
        await judge(bus, 1, 0.0)  # alpha's, not readable
        await judge(bus, 0, 1.0)  # beta's, readable
        learner = await told(view, 1)
        assert learner[1].judgements == 1
        assert learner[1].quality is not None
        assert learner[1].quality.sums.count.tolist() == [0.0, 1.0]
    finally:
        await monitor.stop()
    again = await start_monitor(settings, Store("small"), "two")
    try:
        await answered(bus, 60, "alpha", bad)
        learned = await heard(view, 61)
        assert chances(learned)[0] == pytest.approx(alpha, abs=0.05)
        assert learned.judgements == 1
    finally:
        await again.stop()
