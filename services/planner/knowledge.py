"""What a planner knows: cards, workers, QoS, and the demand for each artifact."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import nats.errors
from nats.aio.msg import Msg

from services.planner.decide import charges, cost, objectives
from services.planner.decide.demand import Demand, arrived, work_of
from services.planner.decide.learned import Learned
from services.planner.decide.outlook import FORECAST_FROM, Outlook, warm_row
from services.planner.decide.rooms import Forecast
from services.planner.decide.routing import State
from services.planner.decide.scoring import slope_of_penalty
from services.planner.decide.standing import Standings
from shared import codec, streams, subjects
from shared import messages as m
from shared.bus import Bus
from shared.errors import CalmError
from shared.learn import confidence
from shared.learn.live import Learner
from shared.learn.live_length import Lengths
from shared.views import ControlView, FleetView, ModelsView

PATIENCE = 0.6
"""Share of the rent-or-buy threshold at which a grouped load begins (`bench.residency` compares values)."""
CHARGES_S = 1.0
T = TypeVar("T")


class Knowledge:
    """Kept up to date from KV buckets, QoS broadcasts and route decisions of every planner replica."""

    def __init__(
        self,
        bus: Bus,
        planner: str,
        clock: Callable[[], float],
        on_change: Callable[[], None],
        on_control: Callable[[str], None],
    ) -> None:
        """`on_change`: models or workers have changed; `on_control`: an entry of the control bucket, with its key."""
        self._bus = bus
        self._planner = planner
        self._clock = clock
        self._on_change = on_change
        self.models = ModelsView(bus, on_change)
        self.fleet = FleetView(bus, lambda _state: on_change())
        self.control = ControlView(bus, on_control)
        self.qos = m.Qos()
        self.demand: dict[str, Demand] = {}
        self._standings = Standings()
        self._learner: tuple[int, Learner | None] = (0, None)
        self._lengths: tuple[int, Lengths | None] = (0, None)
        self._lines: tuple[int, dict[str, confidence.Line]] = (0, {})
        self._outlook = Outlook(())
        self._charges: dict[str, tuple[float, float, float]] = {}
        self._charged_at = 0.0

    async def start(self) -> None:
        await self._bus.subscribe(subjects.QOS, self._on_qos)
        await self.models.start()
        await self.fleet.start()
        await self.control.start()
        with contextlib.suppress(CalmError):  # the monitor may not be up yet; it will broadcast
            self.qos = await self._bus.ask(subjects.knowledge("qos"), m.KnowledgeRequest(), m.Qos, 1.0)

    @property
    def policy(self) -> m.Policy | None:
        """The fleet's policy with the objectives in force and the weights as moved; None until the fleet is known."""
        policy = self.models.policy
        return None if policy is None else objectives.effective(policy, self.control.in_force, self.control.moved)

    def state(self) -> State | None:
        """Everything a routing decision needs; None until the fleet is known."""
        if self.policy is None or not self.models.cards:
            return None
        return State(
            cards=self.models.cards,
            policy=self.policy,
            workers=self.fleet.workers(),
            qos=self.qos,
            waiting={artifact: d.waiting for artifact, d in self.demand.items()},
            planner=self._planner,
            trial=self.control.trial,
            standings=self._standings,
            learned=self._learned_now(),
            charges=self._charges,
        )

    def _learned_now(self) -> Learned:
        """Learned quality and lengths as last told, decoded once for each version."""
        # Of another version of this program: the cards' own scores, and means, stand until it is new.
        self._learner = self._newest("quality", self._learner, Learner.from_bytes, None)
        self._lengths = self._newest("length", self._lengths, Lengths.from_bytes, None)
        self._lines = self._newest("confidence", self._lines, confidence.heard, {})
        version, learner = self._learner
        return Learned(
            learner, version if learner is not None else 0, self.control.standings,
            self._lengths[1], self._lengths[0] if self._lengths[1] is not None else 0,
            self._lines[1], self._lines[0] if self._lines[1] else 0,
        )  # fmt: skip

    def _newest(self, name: str, known: tuple[int, T], decode: Callable[[bytes], T], unusable: T) -> tuple[int, T]:
        """Version and value of what was last told under this name; `known` while that is no other version."""
        told = self.control.learned.get(name)
        if told is None or told[0] == known[0]:
            return known
        try:
            return told[0], decode(told[1])
        except ValueError:
            return told[0], unusable

    def specs(self) -> dict[str, m.ArtifactSpec]:
        return {card.artifact.name: card.artifact for card in self.models.cards.values()}

    def forecast(self) -> Forecast | None:
        """What routing would gain from each artifact; None until enough queries have been routed."""
        policy, workers = self.policy, self.fleet.workers()
        if policy is None or not workers or self._outlook.count < FORECAST_FROM:
            return None
        utilities, rates = self._outlook.rows(self._clock())
        learned = {(a.artifact, a.device_class): a for a in self.qos.artifacts}
        device = workers[0].device
        load_j = {
            name: cost.unit_costs(spec, device, learned.get((name, device.device_class))).load_j
            for name, spec in self.specs().items()
        }
        return Forecast(
            artifacts=self._outlook.index,
            utilities=utilities,
            rates=rates,
            load_cost={name: policy.w_energy * joules / policy.energy_ref_j for name, joules in load_j.items()},
            patience=PATIENCE,
            second_cost=policy.w_latency * slope_of_penalty(policy.latency_slo_s),
        )

    def reckon(self) -> None:
        """What decisions use and takes milliseconds, between queries rather than in the way of one: learned models as
        last told, and, at most once a second, what loading costs others."""
        self._learned_now()
        now = self._clock()
        if now - self._charged_at < CHARGES_S:
            return
        self._charged_at, forecast, policy = now, self.forecast(), self.policy
        self._charges = {}
        if forecast is not None and policy is not None:
            found = charges.charges(
                workers=self.fleet.workers(), specs=self.specs(), pinned=self.pinned(), demand=self.demand,
                load_s=self.load_s(), policy=policy, now=now, forecast=forecast,
            )  # fmt: skip
            self._charges = {a: (s.burden, s.delay_s, s.sharing) for a, s in found.items()}

    def pinned(self) -> frozenset[str]:
        return frozenset(card.artifact.name for card in self.models.cards.values() if card.pinned)

    def popularity(self) -> dict[str, float]:
        """Past answers by artifact; a card that has none yet counts for a little by being there."""
        answered = {card.card: card.answered for card in self.qos.cards}
        result: dict[str, float] = {}
        for card in self.models.cards.values():
            name = card.artifact.name
            result[name] = result.get(name, 0.0) + answered.get(card.name, 0) + 0.1
        return result

    def load_s(self) -> dict[str, float]:
        """Learned load time by artifact, in seconds."""
        return {a.artifact: a.load_s for a in self.qos.artifacts if a.loads}

    def covered(self, artifact: str) -> bool:
        """Whether some live worker holds the artifact ready."""
        return any(
            e.artifact == artifact and e.state == "ready"
            for w in self.fleet.workers()
            if not w.draining
            for e in w.engines
        )

    def holds(self, route: m.Route) -> bool:
        """Whether some live worker holds what a decision chose ready."""
        card = self.models.cards.get(route.order[0]) if route.order else None
        return card is not None and self.covered(card.artifact.name)

    async def count_queues(self) -> None:
        """Read how many queries each artifact has."""
        try:
            counts = await streams.queued(self._bus.js)
        except (TimeoutError, nats.errors.Error):
            return  # the broker is away; the next count will tell
        now = self._clock()
        for artifact in {*counts, *self.demand}:
            old = self.demand.get(artifact, Demand())
            waiting = counts.get(artifact, 0)
            since = old.waiting_since
            if waiting == 0 or self.covered(artifact):
                since = None
            elif since is None:
                since = now
            self.demand[artifact] = replace(old, waiting=waiting, waiting_since=since)

    def routed(self, route: m.Route) -> None:
        """A planner, this one or another, has decided: its model is wanted."""
        card = self.models.cards.get(route.order[0]) if route.order else None
        if card is None:
            return
        artifact = card.artifact.name
        now = self._clock()
        self._foresee(route, now)
        demand = arrived(self.demand.get(artifact, Demand()), now, work_s=self._work_s(route, card))
        if self.covered(artifact):
            self.demand[artifact] = demand  # whether it is enough is seen by the length of its queue
            return
        if demand.waiting_since is None:
            demand = replace(demand, waiting_since=now)
        self.demand[artifact] = demand
        self._on_change()

    def _work_s(self, route: m.Route, card: m.Card) -> float:
        """Seconds of an engine that the query will take, by the terms of its own decision."""
        chosen = next((c for c in route.candidates if c.card == card.name), None)
        worker = None if chosen is None else self.fleet.worker(chosen.worker)
        if chosen is None or worker is None or not chosen.terms:
            return 0.0
        spec, device = card.artifact, worker.device
        known = next(
            (a for a in self.qos.artifacts if (a.artifact, a.device_class) == (spec.name, device.device_class)), None
        )
        return work_of(
            prefill_s=chosen.terms["prefill_s"], tokens_out=chosen.terms["tokens_out"],
            tpot_s=cost.unit_costs(spec, device, known).tpot_s, slope=cost.BATCH_SLOPE, slots=spec.slots,
        )  # fmt: skip

    def _foresee(self, route: m.Route, now: float) -> None:
        names = tuple(sorted(self.specs()))
        if names != self._outlook.artifacts:
            self._outlook = Outlook(names)  # other models: what was seen of the old ones says little
        policy = self.policy
        row = None if policy is None else warm_row(route, self._outlook.index, policy)
        if row is not None:
            self._outlook.seen(now, row)

    async def _on_qos(self, message: Msg) -> None:
        self.qos = codec.unpack(message.data, m.Qos)
        if self.models.cards:  # arrays for the new figures, made now and not within a decision
            self._standings.of(self.models.cards, self.fleet.workers(), self.qos)
