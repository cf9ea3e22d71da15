"""The knowledge base behind the monitor: recording, answering, restarts, replicas."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import nats.errors
import pytest
from nats.aio.msg import Msg

from shared import codec, subjects
from shared import messages as m
from shared.broker import Broker
from shared.bus import Bus
from shared.errors import InvalidQuery, NotFound
from shared.puller import Puller
from shared.settings import Settings
from tests.integration.monitor_parts import Running, Store, knows, ready, reply, start_monitor, until
from tests.unit.monitor_records import done, failed, operation, route


@pytest.fixture
async def monitor(settings: Settings, bus: Bus) -> AsyncIterator[Running]:
    running = await start_monitor(settings, Store("small"))
    try:
        await ready(bus)
        yield running
    finally:
        await running.stop()


async def _counts(bus: Bus, **wanted: int) -> m.Counts:
    """Counts, once they have these values."""
    return await knows(bus, "counts", m.Counts, lambda c: all(getattr(c, k) == v for k, v in wanted.items()))


async def _journal(bus: Bus, query_id: str) -> None:
    await bus.publish(subjects.DECISION_ROUTE, route(query_id), msg_id=f"{query_id}-route")


async def test_a_query_is_known_from_acceptance_to_feedback(bus: Bus, monitor: Running) -> None:
    """A query is in flight once accepted; its route, its end and its feedback join it."""
    await bus.nc.publish(subjects.QUERY, codec.to_json(m.Query(prompt="What is law?", id="q")))
    assert (await _counts(bus, accepted=1)).in_flight == 1
    await _journal(bus, "q")
    await bus.claim(done("q"))
    counts = await _counts(bus, answered=1)
    assert counts.in_flight == 0
    assert counts.by_card == {"alpha": 1}
    given = m.Feedback(query_id="q", score=0.75, label="good")
    assert isinstance(await reply(bus, codec.to_json(given), subject=subjects.FEEDBACK), m.Ok)
    record = await knows(bus, "query", m.QueryRecord, lambda r: r.route is not None, "q")
    assert record.query is not None
    assert record.query.prompt == "What is law?"
    assert record.route == route("q")
    assert record.done == done("q")
    assert record.feedback == [given]
    assert record.state == "answered"
    qos = await bus.ask(subjects.knowledge("qos"), m.KnowledgeRequest(), m.Qos, 5.0)
    assert [(c.card, c.answered, c.feedback_mean) for c in qos.cards] == [("alpha", 1, 0.75)]
    assert [(a.artifact, a.device_class) for a in qos.artifacts] == [("small-int8", "cpu-2t")]


async def test_the_energy_ledger_is_kept_and_answered(bus: Bus, monitor: Running) -> None:
    """What a worker reports is asked for as `energy`; a later report of the same start takes its place."""
    for total_j in (5.0, 8.0):
        report = m.EnergyReport(worker="w1", source="nvml", started_at=1.0, at=time.time(), total_j=total_j, idle_j=3.0)
        await bus.nc.publish(subjects.energy("w1"), codec.pack(report))
    found = await knows(bus, "energy", m.EnergyReports, lambda r: [w.total_j for w in r.workers] == [8.0])
    assert (found.workers[0].worker, found.workers[0].source, found.workers[0].idle_j) == ("w1", "nvml", 3.0)


async def test_feedback_may_follow_the_answer_at_once(bus: Bus, monitor: Running) -> None:
    """Feedback for a query whose end is not recorded yet is accepted, for the broker knows the end."""
    await bus.claim(done("quick"))
    given = codec.to_json(m.Feedback(query_id="quick", score=1.0))
    assert isinstance(await reply(bus, given, subject=subjects.FEEDBACK), m.Ok)
    assert (await _counts(bus, feedback=1)).feedback == 1


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b'{"query_id": "unknown", "score": 1.0}', "not_found"),
        (b'{"query_id": "q", "score": 1.5}', "invalid_query"),
        (b"nonsense", "invalid_query"),
        (b'{"query_id": "q"}', "invalid_query"),
    ],
)
async def test_bad_feedback_is_refused_with_a_remedy(bus: Bus, monitor: Running, data: bytes, code: str) -> None:
    """Feedback for an unknown query, out of range or undecodable gets a typed error."""
    await _counts(bus, feedback=0)
    failure = await reply(bus, data, subject=subjects.FEEDBACK)
    assert isinstance(failure, m.Failure)
    assert failure.code == code
    assert failure.remedy


async def test_refused_input_is_counted(bus: Bus, monitor: Running) -> None:
    """What the intake refuses is counted by the knowledge owner, and nothing else is recorded of it."""
    before = (await _counts(bus)).rejected
    for _ in range(3):
        await reply(bus, b"{}")
    counts = await knows(bus, "counts", m.Counts, lambda c: c.rejected >= before + 3)
    assert counts.accepted == 0


async def test_redelivery_does_not_double(bus: Bus, settings: Settings) -> None:
    """Messages handed back after they were written are written again without counting again."""
    ids = [f"q{n}" for n in range(20)]
    running = await start_monitor(settings, Store("small"))
    for query_id in ids:
        await bus.claim(done(query_id))
        await _journal(bus, query_id)
    await bus.publish(subjects.JOURNAL_OPERATION, operation("o1", at=time.time()), msg_id="o1")
    await _counts(bus, answered=20, loads=1)
    await running.stop()
    for stream in (subjects.STREAM_DONE, subjects.STREAM_JOURNAL):
        await bus.js.delete_consumer(stream, "recorder")  # its successor gets every message again
    again = await start_monitor(settings, Store("small"), "two")

    async def all_read() -> bool | None:
        for stream in (subjects.STREAM_DONE, subjects.STREAM_JOURNAL):
            info = await bus.js.consumer_info(stream, "recorder")
            if info.num_pending or info.num_ack_pending or not info.delivered or not info.delivered.consumer_seq:
                return None
        return True

    await _counts(bus)
    await until(all_read)
    counts = await _counts(bus)
    assert (counts.answered, counts.accepted, counts.loads) == (20, 20, 1)
    qos = await bus.ask(subjects.knowledge("qos"), m.KnowledgeRequest(), m.Qos, 5.0)
    assert qos.cards[0].answered == 20
    assert sum(a.loads for a in qos.artifacts) == 1
    await again.stop()


async def test_a_restart_keeps_counts_and_learned_costs(bus: Bus, settings: Settings) -> None:
    """What happened while the monitor was down is recorded when it is back, beside what it knew."""
    running = await start_monitor(settings, Store("small"))
    await bus.claim(done("before"))
    await _counts(bus, answered=1)
    first = await bus.ask(subjects.knowledge("qos"), m.KnowledgeRequest(), m.Qos, 5.0)
    await running.stop()
    with pytest.raises(nats.errors.NoRespondersError):
        await bus.nc.request(subjects.knowledge("counts"), b"", timeout=5)
    await bus.claim(failed("meanwhile"))
    again = await start_monitor(settings, Store("small"))
    counts = await _counts(bus, answered=1, failed=1)
    assert counts.failures == {"engine_failed": 1}
    second = await knows(bus, "qos", m.Qos, lambda q: bool(q.cards) and q.cards[0].failed == 1)
    assert second.cards[0].answered == 1
    assert second.artifacts == first.artifacts
    assert second.version > first.version
    await again.stop()


async def test_a_replica_takes_the_knowledge_base_over(bus: Bus, settings: Settings) -> None:
    """Two monitors take queries; one owns the knowledge, and when it stops the other does."""
    first = await start_monitor(settings, Store("small"), "one")
    second = await start_monitor(settings, Store("small"), "two")
    await ready(bus)
    for number in range(10):
        await bus.nc.publish(subjects.QUERY, codec.to_json(m.Query(prompt="x", id=f"q{number}")))
    await _counts(bus, accepted=10)
    assert [r.health.detail() for r in (first, second)] == ["owns the knowledge base", ""]
    await first.stop()
    await bus.claim(done("q0"))
    assert (await _counts(bus, answered=1)).accepted == 10
    assert second.health.detail() == "owns the knowledge base"
    await second.stop()


async def test_an_undecodable_record_goes_to_the_dead_letters(bus: Bus, monitor: Running) -> None:
    """A message that cannot be read is kept in `calm.dead`, and what follows is recorded."""
    await bus.js.publish(subjects.done("broken", ""), b"\xc1nonsense")
    await bus.js.publish("calm.journal.unheard-of", b"\x80")
    await bus.claim(done("sound"))
    await _counts(bus, answered=1)
    dead: asyncio.Queue[m.Dead] = asyncio.Queue()

    async def collect(message: Msg) -> None:
        dead.put_nowait(codec.unpack(message.data, m.Dead))
        await message.ack()

    puller = Puller(bus, stream=subjects.STREAM_DEAD, durable="test", subject=subjects.DEAD, handler=collect)
    await puller.start()
    async with asyncio.timeout(10):
        kept = [await dead.get(), await dead.get()]
    await puller.stop(1)
    assert {d.subject for d in kept} == {"calm.done.broken.end", "calm.journal.unheard-of"}
    assert all(d.reason and d.service == "monitor" for d in kept)
    info = await bus.js.consumer_info(subjects.STREAM_DONE, "recorder")
    assert info.num_redelivered == 0


async def test_knowledge_is_asked_in_json_or_messagepack(bus: Bus, monitor: Running) -> None:
    """An empty or JSON request is answered in JSON, a MessagePack one in MessagePack; errors are typed."""
    await _counts(bus)
    empty = await bus.nc.request(subjects.knowledge("counts"), b"", timeout=5)
    assert codec.from_json(empty.data, m.Counts).answered == 0
    recent = await bus.nc.request(subjects.knowledge("recent"), b'{"limit": 1}', timeout=5)
    assert codec.from_json(recent.data, m.QueryRecords).records == []
    missing = await bus.nc.request(subjects.knowledge("query"), b'{"id": "x"}', timeout=5)
    assert codec.from_json(missing.data, m.Failure).code == "not_found"
    with pytest.raises(NotFound) as caught:
        await bus.ask(subjects.knowledge("query"), m.KnowledgeRequest(id="x"), m.QueryRecord, 5.0)
    assert caught.value.remedy
    wrong = await bus.nc.request(subjects.knowledge("recent"), b'{"limit": 0}', timeout=5)
    assert codec.from_json(wrong.data, m.Failure).code == "invalid_query"


async def test_operations_placements_and_symptoms_are_kept(bus: Bus, monitor: Running) -> None:
    """Loads with their device class, and the latest residency decision, can be asked for."""
    now = time.time()
    state = m.WorkerState(worker="w1", host="h", device=m.Device(kind="cpu", name="c", threads=2), budget_bytes=9)
    await bus.kv_put(subjects.BUCKET_FLEET, subjects.fleet_key("w1"), state)
    placed = m.Placement(id="p1", reason="demand", decided_at=now)
    await bus.publish(subjects.DECISION_PLACEMENT, placed, msg_id="p1")
    ops = [operation("o1", at=now), operation("o2", "evict", reason="idle", at=now + 1)]
    for op in ops:
        await bus.publish(subjects.JOURNAL_OPERATION, op, msg_id=op.op_id)
    found = await knows(bus, "operations", m.Operations, lambda o: len(o.operations) == 2)
    assert found.operations == [ops[1], ops[0]]

    async def latest() -> m.Placement | None:
        try:
            return await bus.ask(subjects.knowledge("placement"), m.KnowledgeRequest(), m.Placement, 2.0)
        except NotFound:
            return None

    assert await until(latest) == placed
    qos = await bus.ask(subjects.knowledge("qos"), m.KnowledgeRequest(), m.Qos, 5.0)
    assert [(a.artifact, a.device_class, a.load_s) for a in qos.artifacts] == [("small-int8", "cpu-2t", 2.0)]


async def test_qos_is_broadcast(bus: Bus, monitor: Running) -> None:
    """Planners hear of what was learned without asking."""
    heard: asyncio.Queue[m.Qos] = asyncio.Queue()

    async def collect(message: Msg) -> None:
        heard.put_nowait(codec.unpack(message.data, m.Qos))

    await bus.subscribe(subjects.QOS, collect)
    await bus.claim(done("q"))
    async with asyncio.timeout(15):
        while not (await heard.get()).cards:
            pass


async def test_a_broker_restart_loses_no_record(bus: Bus, broker: Broker, settings: Settings, monitor: Running) -> None:
    """After the broker is killed and back, the monitor owns the knowledge again and records what follows."""
    await bus.claim(done("before"))
    await _counts(bus, answered=1)
    await broker.kill()
    again = await Broker.start(settings.home / "nats", port=broker.port)
    try:
        await bus.claim(done("after"))
        assert (await _counts(bus, answered=2)).accepted == 2
        await ready(bus)
        await monitor.stop()
    finally:
        await again.stop()


async def test_decisions_under_a_trial_are_told_with_what_came_of_them(bus: Bus, monitor: Running) -> None:
    """Only those of the trial asked for, oldest first and in parts, with judgement, latency and energy."""
    for n, version in enumerate((1, 1, 2, 1)):
        candidates = [
            m.Candidate(card=name, artifact="small-int8", quality=quality, latency_s=1.0, energy_j=5.0)
            for name, quality in (("alpha", 0.5), ("beta", 0.4))
        ]
        tried = m.Tried(version=version, present="alpha", candidate="beta")
        decided = m.Route(
            query_id=f"t{n}", order=["alpha", "beta"], candidates=candidates, reason="best_utility",
            decided_at=10.0 + n,
            propensity=0.8, trial=tried,
        )  # fmt: skip
        await bus.publish(subjects.DECISION_ROUTE, decided, msg_id=f"t{n}-route")
    await bus.claim(done("t0"))
    await _counts(bus, answered=1)
    given = m.Feedback(query_id="t0", score=0.75)
    assert isinstance(await reply(bus, codec.to_json(given), subject=subjects.FEEDBACK), m.Ok)

    async def asked(limit: int, after: float = 0.0) -> m.TrialRows:
        request = m.KnowledgeRequest(id="1", limit=limit, after=after)
        return await bus.ask(subjects.knowledge("trial"), request, m.TrialRows, 5.0)

    async def all_there() -> m.TrialRows | None:
        found = await asked(10)
        return found if len(found.rows) == 3 else None

    whole = await until(all_there)
    assert not whole.more
    first, second, _ = whole.rows
    answer = done("t0").answer
    assert answer is not None
    assert (first.at, first.chosen, first.candidate, first.propensity) == (10.0, "alpha", "beta", 0.8)
    assert first.predicted == [[0.5, 1.0, 5.0], [0.5, 1.0, 5.0], [0.4, 1.0, 5.0]]
    assert (first.score, first.latency_s, first.energy_j) == (0.75, answer.timings.total_s, answer.energy.joules)
    assert (second.score, second.latency_s, second.energy_j) == (None, None, None)
    part = await asked(2)
    assert (part.more, [r.at for r in part.rows]) == (True, [10.0, 11.0])
    assert [r.at for r in (await asked(2, after=11.0)).rows] == [13.0]
    with pytest.raises(InvalidQuery):
        await bus.ask(subjects.knowledge("trial"), m.KnowledgeRequest(id="x"), m.TrialRows, 5.0)
