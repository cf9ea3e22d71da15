"""Predicted latency and energy of an attempt: learned per (artifact, device class), stated priors until then."""

from __future__ import annotations

from dataclasses import dataclass

from shared import messages as m

BATCH_SLOPE = 0.19
"""Growth of a decode step per further sequence, relative to a step for one. Measured on SmolLM2-135M int8 with
two threads: 177 tokens/s at batch 1, 422 at 4, 604 at 8, which is 5.6, 9.5 and 13.2 ms a step."""
CPU_BYTES_PER_S = 1.2e10
"""Prior: decoding reads all weights once a token; a desktop CPU reads about 12 GB/s with two threads."""
GPU_BYTES_PER_S = 1.0e12
PREFILL_SPEEDUP = 8.0
"""Prior: tokens read at once cost this much less than tokens written one by one."""
LOAD_BASE_S = 0.8
LOAD_BYTES_PER_S = 6.0e8
CPU_POWER_W = 20.0
GPU_POWER_W = 350.0


@dataclass(frozen=True)
class UnitCosts:
    """Costs of one artifact on one device class at batch size 1."""

    prefill_s: float
    """Seconds per prompt token."""
    tpot_s: float
    """Seconds per output token of a sequence running alone."""
    load_s: float
    prefill_j: float
    decode_j: float
    load_j: float
    learned: bool


@dataclass(frozen=True)
class Estimate:
    """Predicted cost of one attempt. `latency_s` and `energy_j` are the sums of their parts."""

    worker: str
    queue_s: float
    load_s: float
    prefill_s: float
    decode_s: float
    active_j: float
    load_j: float

    @property
    def latency_s(self) -> float:
        return self.queue_s + self.load_s + self.prefill_s + self.decode_s

    @property
    def energy_j(self) -> float:
        return self.active_j + self.load_j


def unit_costs(spec: m.ArtifactSpec, device: m.Device, qos: m.ArtifactQos | None) -> UnitCosts:
    """What the artifact costs on the device: from telemetry where there is any, else from its size."""
    gpu = device.kind == "cuda"
    rate = GPU_BYTES_PER_S if gpu else CPU_BYTES_PER_S
    power = GPU_POWER_W if gpu else CPU_POWER_W
    tpot = spec.weights_bytes / rate
    load = LOAD_BASE_S + spec.weights_bytes / LOAD_BYTES_PER_S
    if qos is not None and qos.loads:
        load = qos.load_s
    if qos is None or not qos.count:
        return UnitCosts(
            tpot / PREFILL_SPEEDUP, tpot, load, tpot / PREFILL_SPEEDUP * power, tpot * power, load * power, False
        )
    alone = qos.tpot_s / (1.0 + BATCH_SLOPE * max(qos.tpot_batch - 1.0, 0.0))
    return UnitCosts(
        prefill_s=qos.prefill_s_per_token,
        tpot_s=alone,
        load_s=load,
        prefill_j=qos.energy_j_per_token_in,
        decode_j=qos.energy_j_per_token_out,
        load_j=load * power,
        learned=True,
    )


def estimate(
    spec: m.ArtifactSpec,
    worker: m.WorkerState,
    unit: UnitCosts,
    *,
    tokens_in: int,
    tokens_out: float,
    waiting: int,
) -> Estimate:
    """Cost of running the query on `worker`, given `waiting` queries of the same artifact before it.

    L = queue wait + load if cold + prefill + tokens out x time per token at the batch size it will meet.
    """
    engine = next((e for e in worker.engines if e.artifact == spec.name), None)
    ready = engine is not None and engine.state == "ready"
    active = engine.active if engine is not None else 0
    ahead = max(waiting, active)
    slots = spec.at_once(worker.device)
    batch = min(slots, ahead + 1)
    tpot = unit.tpot_s * (1.0 + BATCH_SLOPE * (batch - 1))
    prefill = unit.prefill_s * tokens_in
    decode = tpot * tokens_out
    service = prefill + decode
    queue = service * (ahead - slots + 1) / slots if ahead >= slots else 0.0
    return Estimate(
        worker=worker.worker,
        queue_s=queue,
        load_s=0.0 if ready else unit.load_s,
        prefill_s=prefill,
        decode_s=decode,
        active_j=unit.prefill_j * tokens_in + unit.decode_j * tokens_out,
        load_j=0.0 if ready else unit.load_j,
    )
