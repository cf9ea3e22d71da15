"""Simulated fleets: models with their size and memory, and the hardware, from a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from services.planner.decide.scoring import Costs
from services.simulator.profile import Profile, UnitCosts, load_profile
from shared.errors import DataInvalid
from shared.settings import parse_bytes

FLEETS = Path(__file__).parents[2] / "fleets"
Positive = Annotated[float, msgspec.Meta(gt=0.0)]


class SimModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model of the fleet."""

    name: str
    parameters_b: Positive
    active_b: float = 0.0
    """Billions of parameters used for a token; all of them when left out."""
    memory: str | int
    """Of one resident copy: weights, KV cache and process."""
    small: bool = True
    gpus: int = 1
    """It runs on workers with this many GPUs."""
    slots: int = 32
    description: str = ""
    quality: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    """What its card promises of an answer, 0 to 1; learning from nothing begins there, as a running system does."""


class SimWorker(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`count` equal workers."""

    name: str
    count: int = 1
    gpus: int = 1
    memory: str | int
    """What models may use of it."""


class Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    description: str = ""
    profile: str
    energy_sequences: int = 0
    """Take the energy of a token at this many concurrent sequences; 0 follows the simulated concurrency."""


class File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    fleet: Head
    models: list[SimModel]
    workers: list[SimWorker]


@dataclass(frozen=True)
class SimFleet:
    """A fleet ready to simulate: m models (in order) on w workers."""

    name: str
    models: tuple[SimModel, ...]
    workers: tuple[str, ...]
    budget_bytes: tuple[int, ...]
    footprint_bytes: tuple[int, ...]
    unit: tuple[tuple[UnitCosts, ...], ...]
    """[m][w]."""
    fits: np.ndarray
    shared: bool
    """Engines on one device divide it."""
    overhead_s: float
    device: tuple[int, ...] = ()
    """[w] number of the device (a GPU, or a host's cores) that a worker computes on; each on its own when empty."""
    places: tuple[float, ...] = ()
    """[w] engines that its device runs at once at full speed; 1 when empty."""
    turns: bool = False
    """Engines take turns at a device step by step, and loads compute there too (`profile`)."""
    turn_cost: float = 1.0
    load_beside: float = 0.0
    """See `profile`; both only where engines take turns."""
    believed: tuple[tuple[UnitCosts, ...], ...] = ()
    """[m][w] what the planner takes costs to be, where that is not what they are: means over loaded times, as it learns
    them. It then takes nothing else off for sharing a device: they contain that."""

    @property
    def planned_with(self) -> tuple[tuple[UnitCosts, ...], ...]:
        """[m][w] the planner's costs."""
        return self.believed or self.unit

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(model.name for model in self.models)

    def costs(self) -> Costs:
        """As the planner takes them to be, as arrays."""

        return costs_of(self.planned_with)


def costs_of(units: Sequence[Sequence[UnitCosts]]) -> Costs:
    """[m][w] as arrays."""

    def table(field: str) -> np.ndarray:
        return np.array([[getattr(u, field) for u in row] for row in units], np.float64)

    return Costs(*(table(f) for f in ("prefill_s", "tpot_s", "slope", "load_s", "prefill_j", "decode_j", "load_j")))


def load_fleet(name_or_path: str | Path) -> tuple[File, Profile]:
    """Read a simulated fleet's file and its profile.

    Raises:
        DataInvalid: there is no such file, or it cannot be used.
    """
    path = Path(name_or_path)
    if not path.suffix:
        path = FLEETS / f"{name_or_path}.toml"
    try:
        file = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), File)
    except OSError:
        raise DataInvalid("There is no such fleet file.", "Name one that can be read.", path=str(path)) from None
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise DataInvalid(
            f"This is no simulated fleet: {error}.", "See fleets/mmlu_pro.toml.", path=str(path)
        ) from None
    near = path.parent / file.fleet.profile
    profile = load_profile(near if near.suffix == ".toml" and near.is_file() else file.fleet.profile)
    return file, profile


def build(
    file: File,
    profile: Profile,
    models: Sequence[str],
    *,
    memory_for: int = 0,
    workers: int = 0,
    energy_sequences: int | None = None,
) -> SimFleet:
    """The fleet with these models, in this order.

    Args:
        file, profile: from `load_fleet`.
        models: names; each must be in the file.
        memory_for: if not 0, each worker's memory holds just this many of the largest of its models.
        workers: if not 0, as many workers of each kind.
        energy_sequences: replaces the file's.

    Raises:
        DataInvalid: a model is missing from the file, or fits no worker.
    """
    by_name = {model.name: model for model in file.models}
    missing = [name for name in models if name not in by_name]
    if missing:
        raise DataInvalid(
            f"The fleet file {file.fleet.name} does not have: {', '.join(missing)}.",
            "Add a [[models]] section with parameters_b, memory and small for each (see fleets/mmlu_pro.toml).",
        )
    chosen = tuple(by_name[name] for name in models)
    footprint = tuple(parse_bytes(model.memory) for model in chosen)
    names: list[str] = []
    budgets: list[int] = []
    gpus: list[int] = []
    for kind in file.workers:
        mine = sorted((f for m_, f in zip(chosen, footprint, strict=True) if m_.gpus == kind.gpus), reverse=True)
        if not mine:
            continue
        count = workers or kind.count
        budget = sum(mine[:memory_for]) if memory_for else parse_bytes(kind.memory)
        for i in range(count):
            names.append(kind.name if count == 1 else f"{kind.name}-{i + 1}")
            budgets.append(budget)
            gpus.append(kind.gpus)
    fits = np.array(
        [
            [m_.gpus == g and f <= b for g, b in zip(gpus, budgets, strict=True)]
            for m_, f in zip(chosen, footprint, strict=True)
        ]
    ).reshape(len(chosen), len(names))
    for model, row in zip(chosen, fits, strict=True):
        if not row.any():
            raise DataInvalid(
                f"{model.name} fits no worker of {file.fleet.name}.",
                f"Give a [[workers]] section with gpus = {model.gpus} and memory of at least {model.memory}.",
            )
    sequences = file.fleet.energy_sequences if energy_sequences is None else energy_sequences
    unit = tuple(
        tuple(
            profile.costs(
                m_.name, parameters_b=m_.parameters_b, active_b=m_.active_b or m_.parameters_b, memory_bytes=f,
                gpus=m_.gpus, sequences=sequences,
            )
            for _ in names
        )
        for m_, f in zip(chosen, footprint, strict=True)
    )  # fmt: skip
    return SimFleet(
        file.fleet.name, chosen, tuple(names), tuple(budgets), footprint, unit, fits, profile.shared,
        profile.overhead_s, turns=profile.turns, turn_cost=profile.turn_cost, load_beside=profile.load_beside,
    )  # fmt: skip
