"""The scoring core: utility of every (card, worker) pair at once, on arrays that live from decision to decision.

`routing` (live), the simulator and the tests call this one module. For card k on artifact a and worker w:

    L = wait[a,w] + prefill_s[a,w] x tokens in + step_s[a,w] x tokens out
    E = prefill_j[a,w] x tokens in + decode_j[a,w] x tokens out + load_j[a,w] / (queries sharing the load)
    U = w_q q - w_l f(L / SLO) - w_e E / E_ref - crowding - burden

`wait` is the time before the prompt is read: what is left of a load, or the queue. `step_s` is the time of one token
at the batch size that the query will meet, times the engines that share the device. Two terms are what the choice
costs *others* (an externality in the sense of Pigou; without them each query would be routed as if it were alone):
`crowding`, the delay that one more sequence puts on those already running, and `burden`, the worth of the models that
a load would push out, told by the residency planner.

Arrays are [artifacts, workers] (float64, seconds, joules). State changes touch single entries (`set_state`), so a
decision costs a few vectorised operations whatever happened in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shared.utility import LN2

Array = NDArray[Any]
BROKEN = 1e9
"""Added to what is lost on a worker that breaks a limit: any that keeps it is better."""
TIE = 1e-9
"""Of two workers of equal utility the faster is taken: seconds weigh this much, and only for that."""


class Weights(Protocol):
    """What `shared.messages.Policy` has of weights and scales."""

    @property
    def w_quality(self) -> float: ...
    @property
    def w_latency(self) -> float: ...
    @property
    def w_energy(self) -> float: ...
    @property
    def latency_slo_s(self) -> float: ...
    @property
    def energy_ref_j(self) -> float: ...


@dataclass(frozen=True)
class Costs:
    """Unit costs, each [artifacts, workers]. `tpot_s` and `decode_j` are those of a sequence running alone."""

    prefill_s: Array
    tpot_s: Array
    slope: Array
    """Growth of `tpot_s` for each further sequence, as a share of it."""
    load_s: Array
    prefill_j: Array
    decode_j: Array
    load_j: Array


class Fleet:
    """What scoring knows of a fleet. Not shared between threads: it keeps scratch arrays."""

    def __init__(
        self,
        artifacts: Sequence[str],
        workers: Sequence[str],
        costs: Costs,
        slots: Sequence[int],
        fits: Array,
        *,
        shared: Sequence[bool] = (),
        joint: bool = True,
        crowding: bool = True,
    ) -> None:
        """`fits` [artifacts, workers]: the worker could ever hold it. `shared`: its engines divide one device.

        With `joint` off, scoring is blind to residency, loads and queues: every fitting worker looks ready and free
        (the ablation "routing and residency without knowledge of each other").
        """
        self.artifacts = tuple(artifacts)
        self.workers = tuple(workers)
        self.costs = costs
        self.slots = np.asarray(slots, np.float64)
        self.fits = np.asarray(fits, bool)
        self.rows = np.arange(len(self.artifacts))
        self.shared = tuple(shared) or (True,) * len(self.workers)
        self.joint = joint
        self.crowds = crowding
        shape = self.fits.shape
        self.service_tokens = np.full((len(self.artifacts), 2), (256.0, 128.0))
        """[artifacts, 2]: mean tokens in and out of the queries an artifact serves, for the queue's wait."""
        self.wait_s = np.zeros(shape)
        self.step_s = costs.tpot_s.copy()
        self.crowd_s = np.zeros(shape)
        """Seconds of delay to others for each token of one more sequence."""
        self.load_s = np.zeros(shape)
        """The part of `wait_s` that is loading."""
        self.load_j = np.zeros(shape)
        self.burden = np.where(self.fits, 0.0, np.inf)
        """Utility lost to others by loading here; infinite where the artifact cannot run."""
        self._arriving: dict[tuple[int, int], tuple[float, float]] = {}
        self._prefill_costs_energy = bool(costs.prefill_j.any())
        self._tpot, self._slope = costs.tpot_s.tolist(), costs.slope.tolist()
        self._prefill, self._load = costs.prefill_s.tolist(), costs.load_s.tolist()
        self._load_j, self._slots = costs.load_j.tolist(), self.slots.tolist()
        self._lat, self._a, self._b = np.empty(shape), np.empty(shape), np.empty(shape)

    def set_state(
        self,
        artifact: int,
        worker: int,
        *,
        ready: bool,
        active: int,
        waiting: int,
        busy_engines: float = 0.0,
        ready_at: float | None = None,
        delay_s: float = 0.0,
        burden: float = 0.0,
        sharing: float = 1.0,
    ) -> None:
        """Tell how things stand for an artifact on a worker.

        Args:
            artifact, worker: indices.
            ready: an engine holds it and takes work.
            active: sequences running on it there.
            waiting: queries in its queue that this worker will have to serve.
            busy_engines: other engines at work on the same device, for each that it runs at once.
            ready_at: when a load under way ends, in the clock of `score`; None when none is.
            delay_s: before a load could begin (victims drain).
            burden: utility that others lose by a load here.
            sharing: queries that one load is expected to serve while it is fresh; those waiting count at least.
        """
        if not self.joint or not self.fits[artifact, worker]:
            return
        key, slots = (artifact, worker), self._slots[artifact]
        tpot, slope = self._tpot[artifact][worker], self._slope[artifact][worker]
        share = 1 + busy_engines if self.shared[worker] else 1
        ahead = active + waiting
        step = tpot * (1.0 + slope * (min(slots, ahead + 1) - 1)) * share
        queue = 0.0
        if ahead >= slots:
            tokens_in, tokens_out = self.service_tokens[artifact]
            service = self._prefill[artifact][worker] * tokens_in * share + step * tokens_out
            queue = service * (ahead - slots + 1) / slots
        load = load_j = lost = 0.0
        if not ready and ready_at is None:
            load = self._load[artifact][worker] + delay_s
            # One load serves all who wait for it: each answers for its share.
            served = max(waiting + 1.0, sharing)
            load_j, lost = self._load_j[artifact][worker] / served, burden / served
        if not ready and ready_at is not None:
            self._arriving[key] = (ready_at, queue)  # the clock fills in what is left of the load
        elif self._arriving:
            self._arriving.pop(key, None)
        self.step_s[key] = step
        if self.crowds:
            self.crowd_s[key] = tpot * slope * share * min(active, slots - 1)
        self.load_s[key], self.load_j[key] = load, load_j
        self.wait_s[key] = queue + load
        self.burden[key] = lost

    def set_all(self, *, ready: Array, coming: Array, active: Array, waiting: Array) -> None:
        """`set_state` for all pairs at once, each [artifacts, workers]: `ready`, `coming` (a load is under way, its end
        unknown), `active` and `waiting` as there. Devices are taken as not divided: learned figures contain that."""
        if not self.joint:
            return
        costs, slots = self.costs, self.slots[:, None]
        ahead = active + waiting
        np.multiply(costs.tpot_s, 1.0 + costs.slope * (np.minimum(slots, ahead + 1) - 1), out=self.step_s)
        tokens = self.service_tokens
        service = costs.prefill_s * tokens[:, :1] + self.step_s * tokens[:, 1:]
        queue = np.where(ahead >= slots, service * (ahead - slots + 1) / slots, 0.0)
        self.load_s = np.where(ready, 0.0, costs.load_s)
        self.load_j = np.where(ready | coming, 0.0, costs.load_j / (waiting + 1))
        if self.crowds:
            self.crowd_s = costs.tpot_s * costs.slope * np.minimum(active, slots - 1)
        self.wait_s = queue + self.load_s
        self.burden = np.where(self.fits, 0.0, np.inf)

    def charge(self, artifact: int, burden: float, delay_s: float, sharing: float) -> None:
        """Tell what loading an artifact costs others, on every worker where it is not ready (see `set_state`)."""
        cold = self.fits[artifact] & (self.load_j[artifact] > 0.0)
        self.burden[artifact, cold] += burden / sharing
        self.load_j[artifact, cold] /= sharing
        self.load_s[artifact, cold] += delay_s
        self.wait_s[artifact, cold] += delay_s

    def bar(self, artifact: int, worker: int) -> None:
        """Nothing goes there until `set_state` says otherwise (the worker or the engine is leaving)."""
        self.burden[artifact, worker] = np.inf

    def clock(self, now: float) -> None:
        """Bring what is left of loads under way to the time `now`."""
        for (artifact, worker), (ready_at, queue) in self._arriving.items():
            left = max(ready_at - now, 0.0)
            self.load_s[artifact, worker] = left
            self.wait_s[artifact, worker] = left + queue

    def utilities(self, quality: Array, tokens_in: Any, tokens_out: Array, weights: Weights, now: float) -> Array:
        """[artifacts, workers], minus infinity where it cannot run; one card for each artifact.

        `quality` and `tokens_out` are [artifacts, 1], `tokens_in` a number or the same. The lean way for simulation:
        the same arithmetic as `score` (a property test compares them), without the parts. Overwritten by the next call.
        """
        if self._arriving:
            self.clock(now)
        costs, lat, a, b = self.costs, self._lat, self._a, self._b
        slo = weights.latency_slo_s
        np.multiply(self.step_s, tokens_out, out=lat)
        np.multiply(costs.prefill_s, tokens_in, out=a)
        np.add(lat, a, out=lat)
        np.add(lat, self.wait_s, out=lat)
        np.multiply(lat, 1.0 / slo, out=a)
        np.log1p(a, out=a)
        np.multiply(a, weights.w_latency / LN2, out=a)
        np.multiply(costs.decode_j, tokens_out, out=b)
        np.add(b, self.load_j, out=b)
        if self._prefill_costs_energy:
            b += costs.prefill_j * tokens_in
        np.multiply(b, weights.w_energy / weights.energy_ref_j, out=b)
        np.add(a, b, out=a)
        if self.joint and self.crowds:
            np.multiply(self.crowd_s, tokens_out, out=b)
            np.multiply(b, weights.w_latency * slope_of_penalty(slo), out=b)
            np.add(a, b, out=a)
        np.add(a, self.burden, out=a)
        np.multiply(lat, TIE, out=lat)
        np.add(a, lat, out=a)
        np.multiply(quality, weights.w_quality, out=b)
        return np.subtract(b, a, out=b)


@dataclass(frozen=True)
class Limits:
    """Hard constraints of a query that depend on the worker."""

    max_latency_s: float = math.inf
    max_energy_j: float = math.inf
    left_s: float = math.inf
    """Until the deadline; loading and reading the prompt must be done by then."""


@dataclass(frozen=True)
class Scores:
    """Terms of each card on its best worker, each [cards]. `utility` is minus infinity where no worker stands."""

    utility: Array
    worker: Array
    """Index of the best worker."""
    queue_s: Array
    load_s: Array
    prefill_s: Array
    decode_s: Array
    active_j: Array
    load_j: Array
    u_quality: Array
    u_latency: Array
    u_energy: Array
    u_crowding: Array
    u_burden: Array

    @property
    def latency_s(self) -> Array:
        return self.queue_s + self.load_s + self.prefill_s + self.decode_s

    @property
    def energy_j(self) -> Array:
        return self.active_j + self.load_j


def score(
    fleet: Fleet,
    artifact_of: Array,
    quality: Array,
    tokens_in: Array,
    tokens_out: Array,
    weights: Weights,
    limits: Limits | None = None,
    now: float = 0.0,
) -> Scores:
    """Score k cards against all workers and keep each card's best worker.

    Args:
        fleet: the arrays.
        artifact_of: [k] index of each card's artifact.
        quality, tokens_in, tokens_out: [k], predicted.
        weights: of the utility, with its scales.
        limits: a worker that keeps them is preferred to one that does not; whether any does, the result shows.
        now: the clock in which loads under way were told.
    """
    fleet.clock(now)
    costs = fleet.costs
    alike = len(artifact_of) == len(fleet.artifacts) and bool((artifact_of == fleet.rows).all())
    a: Any = slice(None) if alike else artifact_of  # a card for each artifact, in order: nothing need be copied
    t_in, t_out = np.asarray(tokens_in, np.float64)[:, None], np.asarray(tokens_out, np.float64)[:, None]
    prefill = costs.prefill_s[a] * t_in
    decode = fleet.step_s[a] * t_out
    latency = fleet.wait_s[a] + prefill + decode
    energy = costs.prefill_j[a] * t_in + costs.decode_j[a] * t_out + fleet.load_j[a]
    slope = weights.w_latency * slope_of_penalty(weights.latency_slo_s)
    lost = np.log1p(latency / weights.latency_slo_s) * (weights.w_latency / LN2)
    lost += energy * (weights.w_energy / weights.energy_ref_j)
    lost += fleet.crowd_s[a] * (t_out * slope)
    lost += fleet.burden[a]
    lost += latency * TIE
    if limits is None:
        best = np.argmin(lost, axis=1)
    else:
        broken = (latency > limits.max_latency_s) | (energy > limits.max_energy_j)
        broken |= fleet.load_s[a] + prefill > limits.left_s
        best = np.argmin(np.where(broken, lost + BROKEN, lost), axis=1)
    rows = np.arange(len(artifact_of))
    if alike:
        a = rows
    own = np.asarray(quality, np.float64) * weights.w_quality
    load_s, wait_s = fleet.load_s[a, best], fleet.wait_s[a, best]
    worst = lost[rows, best]
    energy_j = energy[rows, best]
    load_j = fleet.load_j[a, best]
    crowd = fleet.crowd_s[a, best] * tokens_out * slope
    return Scores(
        utility=own - worst,
        worker=best,
        queue_s=wait_s - load_s,
        load_s=load_s,
        prefill_s=prefill[rows, best],
        decode_s=decode[rows, best],
        active_j=energy_j - load_j,
        load_j=load_j,
        u_quality=own,
        u_latency=-np.log1p(latency[rows, best] / weights.latency_slo_s) * (weights.w_latency / LN2),
        u_energy=-energy_j * (weights.w_energy / weights.energy_ref_j),
        u_crowding=-crowd,
        u_burden=-fleet.burden[a, best],
    )


def slope_of_penalty(latency_slo_s: float) -> float:
    """f'(L), per second, at the objective: what a second costs a query that is just in time."""
    return 0.5 / (LN2 * latency_slo_s)
