"""The fleet as arrays: what `scoring` needs, from cards, workers and learned costs. Pure, and kept between decisions.

What changes seldom (unit costs, quality by domain) is built once for each set of cards, workers and QoS figures and
then reused; what changes with every query (resident, active, waiting) is written anew, which takes a few array
operations however large the fleet is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.planner.decide import cost, quality
from services.planner.decide.scoring import Costs, Fleet
from shared import messages as m

Array = NDArray[Any]


class Standing:
    """Arrays for one set of cards, workers and QoS figures. Not shared between threads."""

    def __init__(self, cards: Sequence[m.Card], workers: Sequence[m.WorkerState], qos: m.Qos) -> None:
        self.cards = tuple(cards)
        self.workers = tuple(w.worker for w in workers)
        specs = {card.artifact.name: card.artifact for card in cards}
        self.specs = tuple(specs.values())
        self.row = {name: i for i, name in enumerate(specs)}
        self.artifact_of = np.array([self.row[card.artifact.name] for card in cards], np.intp)
        self.prior = quality.Prior(cards, qos)
        self.promise = quality.Prior(cards, m.Qos())
        """What the cards promise, feedback left out: what learning is relative to."""
        self.context = np.array([card.artifact.context for card in cards])
        self.most_tokens = np.array([card.max_tokens for card in cards], np.float64)
        answered = {c.card: c for c in qos.cards if c.answered >= 5}
        self.tokens_mean = np.array(
            [answered[card.name].tokens_out_mean if card.name in answered else np.nan for card in cards]
        )
        budgets = np.array([w.budget_bytes for w in workers], np.float64)
        footprint = np.array([spec.footprint_bytes for spec in self.specs], np.float64)
        roomy = np.less_equal.outer(footprint, budgets)
        here = np.array([[name not in w.lacks for w in workers] for name in specs], bool).reshape(roomy.shape)
        fits = roomy & here
        self.roomy_somewhere, self.fits_somewhere = (
            np.asarray(each.any(axis=1))[self.artifact_of] if len(workers) else np.zeros(len(cards), bool)
            for each in (roomy, fits)
        )
        """By card: some worker has memory enough; and its model in store as well."""
        at_once = [min((s.at_once(w.device) for w in workers), default=s.slots) for s in self.specs]
        self.fleet = Fleet(
            tuple(specs), self.workers, self._costs(workers, qos), at_once, fits,
            shared=(False,) * len(workers), crowding=len(workers) > 0,
        )  # fmt: skip
        self._held_key: tuple[Any, ...] = ()
        self._held: tuple[Array, Array, Array, Array]
        self._kept: tuple[m.WorkerState, ...] = ()
        """Kept alive, so that no new state can take over the identity of one in the key."""

    def _costs(self, workers: Sequence[m.WorkerState], qos: m.Qos) -> Costs:
        learned = {(a.artifact, a.device_class): a for a in qos.artifacts}
        classes: dict[str, list[float]] = {}
        names = [w.device.device_class for w in workers]
        for worker, name in zip(workers, names, strict=True):
            if name not in classes:
                classes[name] = [
                    x
                    for spec in self.specs
                    for u in (cost.unit_costs(spec, worker.device, learned.get((spec.name, name))),)
                    for x in (u.prefill_s, u.tpot_s, u.load_s, u.prefill_j, u.decode_j, u.load_j)
                ]
        table = np.array([classes[name] for name in names], np.float64).reshape(len(names), len(self.specs), 6)
        prefill, tpot, load, prefill_j, decode_j, load_j = (np.ascontiguousarray(table[:, :, i].T) for i in range(6))
        return Costs(prefill, tpot, np.full(tpot.shape, cost.BATCH_SLOPE), load, prefill_j, decode_j, load_j)

    def update(
        self,
        workers: Sequence[m.WorkerState],
        waiting: Mapping[str, int],
        tokens_in: float,
        tokens_out: float,
        charges: Mapping[str, tuple[float, float, float]],
    ) -> None:
        """Write how things stand now.

        Args:
            workers: in the order given at construction.
            waiting: queries waiting or running, by artifact.
            tokens_in, tokens_out: of the query; those before it in a queue are taken to be alike.
            charges: (burden, delay_s, sharing) of loading an artifact, for those that have any.
        """
        fleet, key = self.fleet, (*map(id, workers), *waiting.items())
        if key != self._held_key:
            self._held = self._holdings(workers, waiting)
            self._held_key, self._kept = key, tuple(workers)
        ready, coming, active, queued = self._held
        fleet.service_tokens[:] = (tokens_in, tokens_out)
        fleet.set_all(ready=ready, coming=coming, active=active, waiting=queued)
        for w, worker in enumerate(workers):
            if worker.draining:
                fleet.burden[:, w] = np.inf
        for artifact, (burden, delay_s, sharing) in charges.items():
            if artifact in self.row:
                fleet.charge(self.row[artifact], burden, delay_s, max(sharing, 1.0))

    def _holdings(
        self, workers: Sequence[m.WorkerState], waiting: Mapping[str, int]
    ) -> tuple[Array, Array, Array, Array]:
        """What is ready, loading, active and queued, each [artifacts, workers]."""
        shape = (len(self.specs), len(workers))
        ready, coming, active = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape)
        held, state, at_work = [], [], []
        for w, worker in enumerate(workers):
            for engine in worker.engines:
                row = self.row.get(engine.artifact)
                if row is not None:
                    held.append((row, w))
                    state.append(engine.state)
                    at_work.append(engine.active)
        if held:  # written at once: single entries of an array cost a hundred nanoseconds each
            rows, columns = np.array(held, np.intp).T
            ready[rows, columns] = [s == "ready" for s in state]
            coming[rows, columns] = [s == "loading" for s in state]
            active[rows, columns] = at_work
        queued = np.zeros(shape)
        counts = {self.row[a]: n for a, n in waiting.items() if n and a in self.row}
        if counts:
            mine = np.fromiter(counts, np.intp, len(counts))
            count, there = np.array(list(counts.values()), np.float64)[:, None], ready[mine]
            holders = there.sum(axis=1, keepdims=True)
            share = np.where(there, count // np.maximum(holders, 1), np.where(holders, 0.0, count))
            queued[mine] = np.maximum(share - active[mine], 0.0)
        return ready, coming, active, queued


class Standings:
    """Keeps the latest `Standing` for as long as cards, workers and QoS figures stay the same objects."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._kept: tuple[Any, ...] = ()
        self._standing: Standing | None = None

    def of(self, cards: Mapping[str, m.Card], workers: Sequence[m.WorkerState], qos: m.Qos) -> Standing:
        """The arrays for these; built when something of them is new."""
        fleet = tuple(
            (w.worker, w.budget_bytes, w.device.kind, w.device.name, w.device.threads, *w.lacks) for w in workers
        )
        key = (tuple(map(id, cards.values())), fleet, id(qos))
        if self._standing is None or key != self._key:
            ordered = sorted(cards.values(), key=_by_name)
            self._standing = Standing(ordered, workers, qos)
            # The objects are kept so that no new one can take over the identity of one in the key.
            self._key, self._kept = key, (tuple(cards.values()), qos)
        return self._standing


def _by_name(card: m.Card) -> str:
    return card.name
