"""One simulated setting: outcomes, predictions, fleet, arrivals; and how a routing policy becomes a run in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.sim import arrivals
from bench.sim.data import Outcomes, Trace
from bench.sim.learned import Learned, Side
from services.simulator import fleet as fleets
from services.simulator.engine import Residency, Result, Router, Simulation, Workload
from services.simulator.fleet import SimFleet
from services.simulator.profile import Profile
from shared import messages as m

Array = NDArray[Any]


@dataclass(frozen=True)
class Setting:
    """What all policies share."""

    learn: Outcomes
    judge: Outcomes
    embeddings_learn: Array
    embeddings_judge: Array
    learned: Learned
    embed: Callable[[Sequence[str]], Array]
    """Embeddings of texts, for models' descriptions."""
    file: fleets.File
    profile: Profile
    reference: str
    small: tuple[str, ...]
    rate_per_s: float
    count: int
    slo_s: float
    trace: Trace | None = None
    trace_tokens: bool = False
    shift_s: float = 0.0
    budget: float = 0.19
    """Share of the reference's energy that `calm-escalate` may use."""
    latency_budget: float | None = None
    """Share of the reference's mean latency that `calm-escalate` may take."""
    w_latency: float | None = None
    """Weight of latency; each policy's own when left out."""
    memory_for: int = 0
    workers: int = 0
    off: frozenset[str] = frozenset()
    """Mechanisms switched off (`--ablate`)."""
    patient: Setting | None = None
    """The same with answers cut off that ramble (`learned.patience`), in which ours run; None: nothing is cut off."""
    limits: Array | None = None
    """[k] tokens after which answers have been cut off in this setting; None: nowhere."""

    @property
    def own(self) -> Setting:
        """The setting in which ours run."""
        return self.patient or self

    @property
    def predictions(self) -> Side:
        """What is predicted for the queries to judge."""
        return self.learned.judge

    def columns(self, models: Sequence[str]) -> list[int]:
        return [self.judge.models.index(name) for name in models]

    def fleet(self, models: Sequence[str]) -> SimFleet:
        """The hardware with these models."""
        return fleets.build(self.file, self.profile, models, memory_for=self.memory_for, workers=self.workers)

    def work(self, models: Sequence[str], seed: int) -> Workload:
        """The same queries at the same times for a seed, whatever the models."""
        rng = np.random.default_rng(seed)
        if self.trace is not None:
            at = arrivals.like_trace(self.trace, self.count, self.rate_per_s, rng)
        else:
            at = arrivals.poisson(self.count, self.rate_per_s, rng)
        if self.shift_s:
            rows, _ = arrivals.shifting(self.judge, at, rng, every_s=self.shift_s)
        else:
            rows = arrivals.in_any_order(self.judge, self.count, rng)
        tokens = self.trace if self.trace_tokens else None
        return arrivals.workload(self.judge, at, rows, self.columns(models), tokens=tokens)

    def policy(self, **weights: float) -> m.Policy:
        """Weights over this setting's scales."""
        own = m.Policy(fleet=self.file.fleet.name, latency_slo_s=self.slo_s)
        return msgspec.structs.replace(own, **weights)

    def token_j(self, models: Sequence[str]) -> Array:
        """[m] joules of an output token."""
        built = fleets.build(self.file, self.profile, models)
        return np.array([built.unit[i][int(np.argmax(built.fits[i]))].decode_j for i in range(len(models))])


@dataclass(frozen=True)
class Plan:
    """How one policy runs: its models, its router and its residency for a given workload and seed."""

    models: tuple[str, ...]
    router: Callable[[Workload, SimFleet, int], Router]
    residency: Callable[[Workload, SimFleet, int], Residency]
    joint: bool = True
    setting: Setting | None = None
    """In which it runs, where that is not the one that all share."""
    notes: dict[str, Any] = field(default_factory=dict)


def run(setting: Setting, plan: Plan, seed: int) -> tuple[Result, Workload]:
    """One run."""
    built = setting.fleet(plan.models)
    work = (plan.setting or setting).work(plan.models, seed)
    router = plan.router(work, built, seed)
    simulation = Simulation(
        built, work, router, plan.residency(work, built, seed), joint=plan.joint,
        crowding="crowding" not in setting.off, clock=time.perf_counter,
    )  # fmt: skip
    return simulation.run(), work
