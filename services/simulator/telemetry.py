"""What an artifact costs alone on its device, from answers that were given while others ran beside them. Pure.

The simulator adds up what queries do to each other, so it needs the costs of one alone. The means that routing learns
contain the others: a sequence's decoding stands still while another's prompt is read, and engines of one device take
turns. Being disturbed only ever adds time, so a low quantile of what was measured is close to being alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from services.planner.decide import cost
from services.simulator.profile import UnitCosts
from shared import messages as m

QUANTILE = 0.25
ENOUGH = 5
"""Answers from which on a quantile is taken; below, what routing learned stands."""


@dataclass(frozen=True)
class Run:
    """What one answer took. Times in seconds."""

    artifact: str
    tokens_read: int
    """Of the prompt, those that did not lie in the cache."""
    tokens_out: int
    prefill_s: float
    decode_s: float
    batch_mean: float
    """Sequences that shared its decode steps, itself included, on average."""


def alone(spec: m.ArtifactSpec, device: m.Device, qos: m.ArtifactQos | None, runs: Sequence[Run]) -> UnitCosts:
    """Costs of the artifact alone; what was not seen is as routing believes it to be."""
    known = cost.unit_costs(spec, device, qos)
    decode = [
        r.decode_s / (r.tokens_out - 1) / (1.0 + cost.BATCH_SLOPE * (max(r.batch_mean, 1.0) - 1.0))
        for r in runs
        if r.tokens_out > 1
    ]
    prefill = [r.prefill_s / r.tokens_read for r in runs if r.tokens_read > 0]
    return UnitCosts(
        prefill_s=float(np.quantile(prefill, QUANTILE)) if len(prefill) >= ENOUGH else known.prefill_s,
        tpot_s=float(np.quantile(decode, QUANTILE)) if len(decode) >= ENOUGH else known.tpot_s,
        slope=cost.BATCH_SLOPE,
        load_s=known.load_s,
        prefill_j=known.prefill_j,
        decode_j=known.decode_j,
        load_j=known.load_j,
        token_j=(0.0, known.decode_j),
    )


def by_artifact(runs: Sequence[Run]) -> Mapping[str, list[Run]]:
    """The same, apart."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.artifact, []).append(run)
    return found


def devices(workers: Sequence[m.WorkerState]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """([w] number of the device that each computes on, [w] engines that it runs at once).

    CPU workers of one host share its cores, and threads of all of them are taken to add up to the cores (as `calm up`
    sets them); engines take turns beyond that (`services/workers/engine/gate.py`).
    """
    keys = [(w.host, w.device.kind, w.device.index if w.device.kind != "cpu" else 0) for w in workers]
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    at_once = {key: float(keys.count(key)) if key[1] == "cpu" else 1.0 for key in numbers}
    return tuple(numbers[key] for key in keys), tuple(at_once[key] for key in keys)
