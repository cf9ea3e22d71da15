"""Objectives at run time: `calm.control`, the controller's weights, several planners, restarts, the record."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import structlog

from services.planner.service import Planner
from shared import codec, subjects
from shared import messages as m
from shared.broker import Broker
from shared.bus import Bus
from shared.runtime import Context, Health
from shared.settings import Settings
from tests import samples
from tests.integration.monitor_parts import Store, start_monitor, until

FLEET = m.Policy(fleet="pair", w_latency=0.1, w_energy=0.1)


class Replica:
    """A planner on a connection of its own."""

    def __init__(self, planner: Planner, bus: Bus) -> None:
        self.planner, self.bus = planner, bus

    @classmethod
    async def start(cls, settings: Settings, name: str) -> Replica:
        bus = await Bus.connect(settings, name)
        context = Context(
            dataclasses.replace(settings, drain_s=1.0), bus, structlog.get_logger(), Health(), name
        )  # fmt: skip
        planner = Planner(context)
        await planner.start()
        await bus.nc.flush()  # as a service does before it says that it is ready
        return cls(planner, bus)

    async def stop(self) -> None:
        await self.planner.stop()
        await self.bus.close()


@pytest.fixture
async def fleet(bus: Bus) -> Bus:
    """Two cards and a policy, as a monitor publishes them, and a worker that holds both."""
    await bus.kv_put(subjects.BUCKET_MODELS, subjects.POLICY_KEY, FLEET)
    for card in (samples.card("alpha", quality=0.5), samples.card("beta", samples.spec("b-int8"), quality=0.6)):
        await bus.kv_put(subjects.BUCKET_MODELS, card.name, card)
    return bus


@pytest.fixture
async def planner(fleet: Bus, settings: Settings) -> AsyncIterator[Replica]:
    replica = await Replica.start(settings, "one")
    yield replica
    await replica.stop()


async def ask(bus: Bus, asked: m.Control | bytes) -> m.ControlState | m.Failure:
    data = asked if isinstance(asked, bytes) else codec.to_json(asked)
    reply = await bus.nc.request(subjects.CONTROL, data, timeout=5)
    return codec.from_json(reply.data, m.ControlState | m.Failure)  # type: ignore[arg-type]


async def state(bus: Bus, check: Callable[[m.ControlState], bool]) -> m.ControlState:
    """Ask until `check` holds."""

    async def probe() -> m.ControlState | None:
        found = await ask(bus, m.Control())
        assert isinstance(found, m.ControlState)
        return found if check(found) else None

    return await until(probe)


async def serve(bus: Bus, first: int, count: int, *, energy_j: float, latency_s: float = 1.0) -> None:
    """Routes and ends as planners and engines publish them."""
    for i in range(first, first + count):
        candidate = m.Candidate(card="alpha", artifact="a-int8", quality=0.5, latency_s=latency_s, energy_j=energy_j)
        route = m.Route(
            query_id=f"q{i}", order=["alpha"], candidates=[candidate], reason="best_utility", decided_at=time.time()
        )
        answer = m.Answer(
            id=f"q{i}", text="x", model="alpha", artifact="a-int8", worker="w", finish_reason="stop",
            usage=m.Usage(tokens_in=1, tokens_out=1),
            timings=m.Timings(queue_s=0, load_s=0, prefill_s=0, decode_s=latency_s, overhead_s=0, total_s=latency_s),
            energy=m.Energy(joules=energy_j, source="model"),
            confidence=m.Confidence(mean_logprob=0, min_logprob=0, mean_entropy=0), attempt=1, why="",
        )  # fmt: skip
        await bus.nc.publish(subjects.DECISION_ROUTE, codec.pack(route))
        data, headers = codec.pack_done(m.Done(query_id=f"q{i}", answer=answer))
        await bus.nc.publish(subjects.done(f"q{i}", ""), data, headers=headers)
    await bus.nc.flush()


async def test_objectives_are_set_shown_and_reset_without_a_restart(fleet: Bus, planner: Replica) -> None:
    before = await ask(fleet, m.Control())
    assert isinstance(before, m.ControlState)
    assert before.version == 0
    assert before.weights["w_l"] == 0.1
    wanted = m.Objectives(latency_p95_s=2.0, energy_j_per_query=40.0, w_quality=2.0)
    now = await ask(fleet, m.Control(action="set", objectives=wanted, by="ann"))
    assert isinstance(now, m.ControlState)
    assert (now.version, now.changed_by, now.objectives) == (1, "ann", wanted)
    assert (now.weights["latency_slo_s"], now.weights["energy_ref_j"], now.weights["w_q"]) == (2.0, 40.0, 2.0)
    more = await ask(fleet, m.Control(action="set", objectives=m.Objectives(latency_p95_s=3.0), clear=["w_quality"]))
    assert isinstance(more, m.ControlState)
    assert more.objectives == m.Objectives(latency_p95_s=3.0, energy_j_per_query=40.0)
    reset = await ask(fleet, m.Control(action="reset"))
    assert isinstance(reset, m.ControlState)
    assert reset.objectives == m.Objectives()
    assert reset.version == 3
    assert reset.weights == before.weights


@pytest.mark.parametrize(
    ("asked", "code", "says"),
    [
        (b'{"action": "set", "objectives": {"latency_p95_s": -1}}', "invalid_query", "latency_p95_s"),
        (b'{"action": "set"}', "invalid_objective", "Nothing"),
        (b'{"action": "set", "clear": ["p95"]}', "invalid_objective", "latency_p95_s"),
        (b'{"action": "set", "objectives": {"min_quality_ratio": 0.9}}', "invalid_objective", "reference"),
        (b'{"action": "set", "objectives": {"reference": "gamma"}}', "invalid_objective", "alpha, beta"),
        (b'{"action": "set", "objectives": {"w_quality": 0, "w_latency": 0, "w_energy": 0}}', "invalid_objective", "0"),
        (b"nonsense", "invalid_query", ""),
    ],
)
async def test_bad_input_gets_a_typed_error_that_says_what_to_change(
    fleet: Bus, planner: Replica, asked: bytes, code: str, says: str
) -> None:
    failure = await ask(fleet, asked)
    assert isinstance(failure, m.Failure)
    assert failure.code == code
    assert failure.remedy
    assert says in f"{failure.message} {failure.remedy}"


async def test_the_leader_moves_the_weights_and_every_replica_routes_by_them(
    fleet: Bus, planner: Replica, settings: Settings
) -> None:
    other = await Replica.start(settings, "two")
    try:
        await ask(fleet, m.Control(action="set", objectives=m.Objectives(energy_j_per_query=10.0)))
        await until(lambda: _seen(other, 1))
        await until(lambda: _listens(planner))
        await serve(fleet, 0, 200, energy_j=30.0)
        moved = await state(fleet, lambda s: s.weights["w_e"] > 0.2)
        assert moved.controller == "one"
        assert moved.count > 0

        async def both() -> bool | None:
            policies = [replica.planner._knowledge.policy for replica in (planner, other)]
            same = policies[0] == policies[1]
            return True if same and policies[0] is not None and policies[0].w_energy > 0.2 else None

        assert await until(both)
    finally:
        await other.stop()


async def test_another_planner_goes_on_from_the_weights_when_the_leader_stops(
    fleet: Bus, planner: Replica, settings: Settings
) -> None:
    await ask(fleet, m.Control(action="set", objectives=m.Objectives(energy_j_per_query=10.0)))
    await until(lambda: _listens(planner))
    await serve(fleet, 0, 200, energy_j=30.0)
    before = await state(fleet, lambda s: s.weights["w_e"] > 0.2)
    other = await Replica.start(settings, "two")
    try:
        await planner.planner.stop()
        after = await state(fleet, lambda s: True)
        assert after.objectives == before.objectives
        assert after.weights["w_e"] >= 0.2

        async def leads() -> bool | None:
            return other.planner._placement.leads or None

        await until(leads)
        await until(lambda: _listens(other))
        await serve(fleet, 1000, 100, energy_j=30.0)
        on = await state(fleet, lambda s: s.controller == "two")
        assert on.weights["w_e"] >= 0.2
        assert on.count > 100  # those of the first leader are among them
    finally:
        await other.stop()


async def _listens(replica: Replica) -> bool | None:
    return replica.planner._control.listening or None


async def _seen(replica: Replica, version: int) -> bool | None:
    in_force = replica.planner._knowledge.control.in_force
    return True if in_force is not None and in_force.version == version else None


async def test_changes_survive_a_restart_of_the_broker_and_are_written_to_the_knowledge_base(
    broker: Broker, fleet: Bus, planner: Replica, settings: Settings, tmp_path: Path
) -> None:
    monitor = await start_monitor(settings, Store("small"))
    try:
        await ask(fleet, m.Control(action="set", objectives=m.Objectives(latency_p95_s=2.0), by="ann"))
        await broker.stop()
        again = await Broker.start(tmp_path / "nats", port=int(broker.url.rpartition(":")[2]))
        try:

            async def still() -> m.ControlState | None:
                try:
                    async with asyncio.timeout(2):
                        found = await ask(fleet, m.Control())
                except Exception:  # noqa: BLE001
                    return None
                return found if isinstance(found, m.ControlState) and found.version == 1 else None

            assert (await until(still)).objectives.latency_p95_s == 2.0

            async def recorded() -> m.ControlStates | None:
                try:
                    found = await fleet.ask(subjects.knowledge("controls"), m.KnowledgeRequest(), m.ControlStates, 2.0)
                except Exception:  # noqa: BLE001
                    return None
                return found if found.states else None

            states = (await until(recorded)).states
            assert [(s.event, s.changed_by, s.version) for s in states] == [("set", "ann", 1)]
        finally:
            await again.stop()
    finally:
        await monitor.stop()


async def test_weights_are_tried_promoted_and_dropped_on_every_replica(
    fleet: Bus, planner: Replica, settings: Settings
) -> None:
    """A trial is known to all planners, is kept by the broker, ends once, and changes the objectives when promoted."""
    other = await Replica.start(settings, "two")

    def sees(version: int | None) -> Callable[[], Awaitable[bool | None]]:
        async def check() -> bool | None:
            views = [r.planner._knowledge.control.trial for r in (planner, other)]
            return all((None if v is None else v.version) == version for v in views) or None

        return check

    try:
        wanted = m.Control(action="try", objectives=m.Objectives(w_latency=0.7), share=0.2, by="ann")
        begun = await ask(fleet, wanted)
        assert isinstance(begun, m.ControlState)
        assert begun.trial is not None
        assert (begun.trial.version, begun.trial.share, begun.version) == (1, 0.2, 0)
        await until(sees(1))
        for asked in (m.Control(action="promote", trial=9), m.Control(action="try")):
            refused = await ask(fleet, asked)
            assert isinstance(refused, m.Failure)
            assert (refused.code, bool(refused.remedy)) == ("invalid_objective", True)
        promoted = await ask(fleet, m.Control(action="promote", trial=1))
        assert isinstance(promoted, m.ControlState)
        assert (promoted.trial, promoted.objectives, promoted.version) == (None, m.Objectives(w_latency=0.7), 1)
        assert promoted.weights["w_l"] == 0.7
        await until(sees(None))
        again = await ask(fleet, wanted)
        assert isinstance(again, m.ControlState)
        assert again.trial is not None
        assert again.trial.version == 2
        await until(sees(2))
        dropped = await ask(fleet, m.Control(action="drop"))
        assert isinstance(dropped, m.ControlState)
        assert (dropped.trial, dropped.version) == (None, 1)
        await until(sees(None))
        assert isinstance(await ask(fleet, m.Control(action="drop")), m.Failure)
    finally:
        await other.stop()
