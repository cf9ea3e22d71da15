"""The worker's supervisor: registers its device and memory, and obeys load and evict."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import msgspec
import nats.errors
import structlog
from nats.aio.msg import Msg

from services.workers import cradle, sole, stock
from services.workers import device as devices
from services.workers.children import Child
from services.workers.energy_keeper import EnergyKeeper, Running
from services.workers.ledger import Ledger
from services.workers.protocol import Start, State
from services.workers.reserve import Reserve
from shared import codec, subjects, tasks
from shared import messages as m
from shared.errors import CalmError, OperationTimeout, Overloaded
from shared.lease import Lease
from shared.models.store import ModelStore
from shared.runtime import Context
from shared.settings import slug
from shared.views import ModelsView

REMEMBERED = 256
"""Outcomes kept, so that a repeated command gets the same answer."""
DEVICE_SHARE = 0.8


@dataclass
class _Engine:
    spec: m.ArtifactSpec
    state: m.EngineState
    child: Child | None = None
    draining: bool = False


@dataclass(frozen=True)
class _Outcome:
    """What a load or an evict came to, in bytes."""

    footprint_bytes: int = 0
    held_bytes: int = 0
    """Measured memory of the engine: after a load, or before an evict."""
    freed_bytes: int = 0
    """Of these, what came back, measured."""


class Worker:
    """One device, its memory budget, and an engine process per resident artifact."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._bus = context.bus
        self._log = context.log
        self._clock = context.clock
        self._settings = context.settings
        self.name = slug(context.settings.worker_id or context.settings.name)
        self._looking = asyncio.Event()
        """The fleet has changed: the store is to be looked at."""
        self._models = ModelsView(self._bus, self._looking.set)
        self._device: m.Device
        self._claim: Lease | None = None
        self._ledger: Ledger
        self._energy: EnergyKeeper
        self._engines: dict[str, _Engine] = {}
        self._reserve: Reserve
        self._operations: OrderedDict[str, asyncio.Task[m.WorkerReply]] = OrderedDict()
        self._locks: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._lacks: list[str] = []
        self._stopping = False
        self._started_at = self._clock()
        self._register: asyncio.Task[None] | None = None
        self._stocktaking: asyncio.Task[None] | None = None
        context.health.in_flight = lambda: sum(e.state.active for e in self._engines.values())
        context.health.detail = lambda: ", ".join(f"{a} {e.state.state}" for a, e in sorted(self._engines.items()))

    async def start(self) -> None:
        self._device = await asyncio.to_thread(devices.probe, self._settings)
        self._claim = await sole.claim(self._bus, self._device, self.name)
        await self._models.start()
        budget = self._settings.worker_memory or await self._budget_of_fleet()
        budget = budget or int(self._device.memory_bytes * DEVICE_SHARE)
        self._ledger = Ledger(budget)
        standby = self._settings.standby_memory if self._device.kind == "cpu" else 0
        self._reserve = Reserve(
            spares=self._settings.spare_engines, standby_bytes=standby, log=self._log,
            cradle=cradle.Cradle() if cradle.wanted(self._settings, self._device) else None,
        )  # fmt: skip
        self._log.info("device", kind=self._device.kind, name=self._device.name, budget_bytes=budget)
        self._energy = EnergyKeeper(
            self._bus, self._settings, self.name, self._device, self._running, clock=self._clock
        )
        await self._bus.subscribe(subjects.worker_request(self.name, "load"), self._on_load)
        await self._bus.subscribe(subjects.worker_request(self.name, "evict"), self._on_evict)
        self._energy.start()
        self._log.info("energy", source=self._energy.source)
        self._bus.on_reconnect(self._changed.set)
        await self._take_stock()
        self._stocktaking = asyncio.create_task(self._keep_stock())
        self._register = asyncio.create_task(self._keep_registered())
        self._reserve.fill()

    async def stop(self) -> None:
        self._stopping = True
        if self._register is not None:  # else it was told to stop before it had anything to leave
            await self._leave(self._register)
        if self._claim is not None:
            await self._claim.stop()

    async def _leave(self, register: asyncio.Task[None]) -> None:
        for engine in self._engines.values():
            engine.draining = True
        await self._publish()
        children = [e.child for e in self._engines.values() if e.child is not None]
        await asyncio.gather(*(child.drain(self._settings.drain_s) for child in children), self._reserve.close())
        await self._energy.stop()
        await tasks.end([register, self._stocktaking])
        key = subjects.kv(subjects.BUCKET_FLEET, subjects.fleet_key(self.name))
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            await self._bus.nc.request(key, b"", timeout=1, headers={"KV-Operation": "DEL"})
        await tasks.end([*self._tasks, *self._operations.values()])

    async def _budget_of_fleet(self) -> int:
        """The fleet's own, once it is known: a first run may fetch it for minutes. A worker can load nothing before,
        and one that began with all of its device's memory would hold more than the fleet allows."""
        if not self._models.ready.is_set():
            self._log.info("waiting_for_fleet")
            await self._models.ready.wait()
        return self._models.policy.worker_memory_bytes if self._models.policy else 0

    # --- registration ---

    def _state(self) -> m.WorkerState:
        return m.WorkerState(
            worker=self.name,
            host=socket.gethostname(),
            device=self._device,
            budget_bytes=self._ledger.budget_bytes,
            engines=[e.state for _, e in sorted(self._engines.items())],
            standby=self._reserve.standbys,
            lacks=self._lacks,
            draining=self._stopping,
            started_at=self._started_at,
            at=self._clock(),
            version=_version(),
        )

    async def _take_stock(self) -> None:
        """See what of the fleet the model store lacks."""
        specs = {card.artifact.name: card.artifact for card in self._models.cards.values()}
        store = ModelStore(self._settings.models_path)
        lacks = await asyncio.to_thread(stock.lacking, store, specs.values(), self._device)
        if lacks != self._lacks:
            say = self._log.warning if lacks else self._log.info
            say("store_lacks", artifacts=lacks, store=str(store.root))
            self._lacks = lacks
            self._changed.set()

    async def _keep_stock(self) -> None:
        while True:
            await tasks.changed(self._looking, stock.AGAIN_S if self._lacks else stock.SELDOM_S)
            await self._take_stock()

    async def _publish(self) -> None:
        with contextlib.suppress(nats.errors.Error):
            await self._bus.nc.publish(
                subjects.kv(subjects.BUCKET_FLEET, subjects.fleet_key(self.name)), codec.pack(self._state())
            )

    async def _keep_registered(self) -> None:
        while True:
            await self._publish()
            await tasks.changed(self._changed, 1.0)

    # --- operations ---

    async def _on_load(self, message: Msg) -> None:
        self._operate(message, codec.unpack(message.data, m.Load))

    async def _on_evict(self, message: Msg) -> None:
        self._operate(message, codec.unpack(message.data, m.Evict))

    def _operate(self, message: Msg, command: m.Load | m.Evict) -> None:
        """Start the operation, or join the one of the same id; reply when it has ended."""
        operation = self._operations.get(command.op_id)
        if operation is None:
            operation = asyncio.create_task(self._run(command))
            self._operations[command.op_id] = operation
            while len(self._operations) > REMEMBERED and next(iter(self._operations.values())).done():
                self._operations.popitem(last=False)
        task = asyncio.create_task(self._reply(message, operation))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reply(self, message: Msg, operation: asyncio.Task[m.WorkerReply]) -> None:
        reply = await asyncio.shield(operation)
        await self._bus.nc.publish(message.reply, codec.pack(reply))

    async def _run(self, command: m.Load | m.Evict) -> m.WorkerReply:
        began = time.perf_counter()
        done, failure = _Outcome(), None
        with structlog.contextvars.bound_contextvars(op_id=command.op_id):
            try:
                done = await (self._load(command) if isinstance(command, m.Load) else self._evict(command))
            except CalmError as error:
                failure = codec.failure_of(error)
                self._log.warning("operation_failed", code=error.code, error=str(error))
        return m.WorkerReply(
            op_id=command.op_id,
            ok=failure is None,
            failure=failure,
            seconds=time.perf_counter() - began,
            bytes=done.footprint_bytes,
            held_bytes=done.held_bytes,
            freed_bytes=done.freed_bytes,
        )

    async def _load(self, command: m.Load) -> _Outcome:
        spec = command.spec
        await self._await_others(command)
        async with self._locks.setdefault(spec.name, asyncio.Lock()):
            if self._stopping:
                raise Overloaded("The worker is leaving.", "Use another worker.")
            engine = self._engines.get(spec.name)
            if engine is not None and engine.state.state == "ready":
                return _Outcome(spec.footprint_bytes, engine.state.measured_bytes)
            self._ledger.reserve(spec.name, spec.footprint_bytes)
            engine = _Engine(
                spec,
                m.EngineState(
                    artifact=spec.name,
                    state="loading",
                    footprint_bytes=spec.footprint_bytes,
                    slots=spec.at_once(self._device),
                ),
            )
            self._engines[spec.name] = engine
            self._changed.set()
            try:
                await self._bring_up(engine, command.expires_at)
            except BaseException:
                if engine.child is not None:
                    engine.draining = True
                    engine.child.kill()
                    await engine.child.ended.wait()
                self._forget(spec.name)
                raise
        return _Outcome(spec.footprint_bytes, engine.state.measured_bytes)

    async def _bring_up(self, engine: _Engine, expires_at: float) -> None:
        spec = engine.spec
        start = Start(
            worker=self.name, spec=spec, device=self._device, energy_source=self._energy.source,
            power_w=self._energy.power_w,
        )  # fmt: skip
        began = time.perf_counter()
        engine.child = await self._reserve.take(spec)
        await engine.child.start(start, lambda state: self._on_state(engine, state))
        ready = await engine.child.wait_ready(max(expires_at - self._clock(), 1.0))
        self._energy.tick()  # a load may be over between two ticks: what it took is its own all the same
        now = self._clock()
        engine.state = msgspec.structs.replace(
            engine.state, state="ready", measured_bytes=ready.measured_bytes, loaded_at=now, last_used_at=now,
            load_s=time.perf_counter() - began, pid=engine.child.pid,
        )  # fmt: skip
        self._log.info(
            "loaded", artifact=spec.name, load_s=round(engine.state.load_s, 3), in_engine_s=round(ready.load_s, 3),
            provider=ready.provider, measured_bytes=ready.measured_bytes,
        )  # fmt: skip
        self._reserve.fill()
        await self._publish()
        watch = asyncio.create_task(self._watch(engine))
        self._tasks.add(watch)
        watch.add_done_callback(self._tasks.discard)

    async def _evict(self, command: m.Evict) -> _Outcome:
        async with self._locks.setdefault(command.artifact, asyncio.Lock()):
            engine = self._engines.get(command.artifact)
            if engine is None or engine.child is None:
                return _Outcome()
            engine.draining = True
            engine.state = msgspec.structs.replace(engine.state, state="draining")
            await self._publish()
            before = engine.child.memory_bytes()
            kept = await self._reserve.put(engine.spec, engine.child, self._settings.drain_s)
            freed = before - (kept or engine.child.memory_bytes())
            size = self._forget(command.artifact)
            self._log.info(
                "evicted", artifact=command.artifact, reason=command.reason, measured_bytes=before, freed_bytes=freed,
                standby_bytes=kept,
            )  # fmt: skip
            await self._publish()
            return _Outcome(size, before, freed)

    async def _await_others(self, command: m.Load) -> None:
        """Wait for the operations that must have ended first; one that is not known here has."""
        others = [self._operations[op_id] for op_id in command.after if op_id in self._operations]
        missing = [op_id for op_id in command.after if op_id not in self._operations]
        try:
            async with asyncio.timeout(max(command.expires_at - self._clock(), 0.0)):
                for op_id in missing:  # published before this one, it may be delivered after it
                    others += await self._arrival(op_id)
                for other in others:
                    await asyncio.shield(other)
        except TimeoutError:
            raise OperationTimeout("The evictions before this load took too long.", "It is planned anew.") from None

    async def _arrival(self, op_id: str) -> list[asyncio.Task[m.WorkerReply]]:
        for _ in range(50):  # at most a second: two commands on their way at once, no event between them
            if op_id in self._operations:
                return [self._operations[op_id]]
            await asyncio.sleep(0.02)
        return []

    # --- engines ---

    def _running(self) -> list[Running]:
        return [
            Running(name, engine.child, engine.state.state == "loading")
            for name, engine in self._engines.items()
            if engine.child is not None
        ] + [Running(name, child, False) for name, child in self._reserve.children()]

    def _on_state(self, engine: _Engine, report: State) -> None:
        state: Literal["ready", "draining"] = "draining" if engine.draining else "ready"
        if engine.state.state == "loading":
            return
        engine.state = msgspec.structs.replace(
            engine.state, state=state, active=report.active, held=report.held, tokens_out=report.tokens_out,
            tpot_s=report.tpot_s, last_used_at=max(report.last_used_at, engine.state.loaded_at),
            measured_bytes=report.measured_bytes,
        )  # fmt: skip
        self._changed.set()

    async def _watch(self, engine: _Engine) -> None:
        """Notice an engine that ends by itself."""
        assert engine.child is not None
        await engine.child.ended.wait()
        if engine.draining or self._engines.get(engine.spec.name) is not engine:
            return
        code = engine.child.returncode
        size = self._forget(engine.spec.name)
        self._log.error("engine_lost", artifact=engine.spec.name, status=code)
        await self._publish()
        detail = f"the engine process ended with status {code}"
        operation = m.Operation(
            op_id=uuid.uuid4().hex, kind="lost", worker=self.name, artifact=engine.spec.name, ok=False,
            reason="engine_lost", failure=m.Failure(code="engine_lost", message=detail, retryable=True),
            bytes=size, at=self._clock(),
        )  # fmt: skip
        await self._bus.publish(subjects.JOURNAL_OPERATION, operation, msg_id=operation.op_id)
        symptom = m.Symptom(
            kind="engine_lost", subject=engine.spec.name, detail=f"{self.name}: {detail}", at=operation.at
        )
        await self._bus.send(subjects.symptom(symptom.kind), symptom)

    def _forget(self, artifact: str) -> int:
        self._energy.tick()  # what it did last is still its own
        self._engines.pop(artifact, None)
        self._changed.set()
        return self._ledger.release(artifact)


def _version() -> str:
    try:
        return version("calm-fleet")
    except PackageNotFoundError:
        return ""
