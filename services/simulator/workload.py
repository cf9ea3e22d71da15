"""What a simulation is given and what comes of it: queries, a router, a residency policy, a result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from services.planner.decide.scoring import Fleet

if TYPE_CHECKING:
    from services.simulator.engine import Simulation

Array = NDArray[Any]


@dataclass(frozen=True)
class Workload:
    """n queries in order of arrival, for m models."""

    arrival_s: Array
    row: Array
    """[n] the recorded query that each repeats."""
    tokens_in: Array
    """[n]"""
    tokens_out: Array
    """[n, m], what each model really writes."""
    score: Array
    """[n, m], what each model's answer is really worth, 0 to 1."""
    answered: Array | None = None
    """[n, m], whether an answer could be read; None counts all as answered."""
    group: Array | None = None
    """[n] domain, for reports and clairvoyant policies; routers do not see it."""

    def __len__(self) -> int:
        return len(self.arrival_s)


class Router(Protocol):
    """Chooses models. `route` is called for each query as it arrives, `after` when an attempt has ended."""

    def route(self, i: int, now: float, fleet: Fleet) -> tuple[int, int]:
        """(model, worker) for query i; worker -1 leaves it to who is free."""

    def after(self, i: int, model: int, attempt: int, now: float, fleet: Fleet) -> int:
        """The model to ask next; -1 when this answer stands; -2 - m when the earlier answer of model m does."""

    def observe(self, i: int, model: int, latency_s: float, energy_j: float, now: float) -> None:
        """Query i has ended."""


class Residency(Protocol):
    """Decides what is loaded and evicted, by `Simulation.load` and `Simulation.evict`."""

    tick_s: float
    """Seconds between two calls of `tick`; 0 for never."""

    def start(self, sim: Simulation) -> None:
        """Before the first arrival: `Simulation.place` puts a model into memory at no cost."""

    def routed(self, sim: Simulation, i: int, model: int, now: float) -> None:
        """Query i goes to this model."""

    def need(self, sim: Simulation, model: int, now: float) -> None:
        """Queries wait for this model, and no worker holds or loads it. Called again until one does."""

    def tick(self, sim: Simulation, now: float) -> None: ...


@dataclass
class Result:
    """What happened, [n] unless said otherwise. Energy includes every attempt, and loads in `load_j` apart."""

    model: Array
    latency_s: Array
    ttft_s: Array
    energy_j: Array
    attempts: Array
    hit: Array
    """The first attempt found its model resident."""
    score: Array
    arrival_s: Array
    row: Array
    loads: int = 0
    evictions: int = 0
    load_j: float = 0.0
    engine_j: float = 0.0
    """Joules by the engines' own counters: the sum of `energy_j`."""
    peak_bytes: list[int] = field(default_factory=list)
    """[w] most memory in use."""
    events: int = 0
    decision_s: list[float] = field(default_factory=list)
    """Wall time of sampled routing decisions."""
