"""What the simulated planner takes costs to be, learned from simulated answers as the live one learns from real ones.

Live, an artifact's figures are ratios of sums over its last answers (`services/monitor/decide/qos.py`): they contain
what others at work took off it, and they move while a trace is played. Here the same sums are kept, begun at what was
known when the trace began; once there are more answers than that window holds, older ones fade out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from services.planner.decide import cost
from services.simulator.profile import UnitCosts
from shared import messages as m

REFRESH_S = 1.0
"""Planners hear of new figures this often, as live."""
ANSWERS, LOADS = 200, 20
"""As many are remembered, as live."""


@dataclass
class _Sums:
    """Of one artifact on one class of devices."""

    answers: float
    read: float
    prefill_s: float
    steps: float
    decode_s: float
    batch: float
    """Sequences that shared the steps, summed over the steps."""
    loads: float
    load_s: float


class Beliefs:
    """Costs [artifacts][workers] as the planner would have learned them."""

    def __init__(
        self,
        specs: Sequence[m.ArtifactSpec],
        devices: Sequence[m.Device],
        qos: m.Qos,
        *,
        tokens_in: float = 100.0,
        tokens_out: float = 100.0,
    ) -> None:
        """`qos`: what was known at the start, from answers of about so many tokens."""
        self._specs, self._devices = specs, devices
        self._known = {(a.artifact, a.device_class): a for a in qos.artifacts}
        self._sums: dict[tuple[str, str], _Sums] = {}
        steps = max(tokens_out - 1.0, 1.0)
        for key, a in self._known.items():
            self._sums[key] = _Sums(
                a.count, a.count * tokens_in, a.count * tokens_in * a.prefill_s_per_token,
                a.count * steps, a.count * steps * a.tpot_s, a.count * steps * a.tpot_batch,
                a.loads, a.loads * a.load_s,
            )  # fmt: skip
        self.changes = 0
        """Observations so far."""

    def answered(
        self, model: int, worker: int, *, tokens_in: float, tokens_out: float, prefill_s: float, decode_s: float,
        batch_mean: float,
    ) -> None:  # fmt: skip
        """An answer has ended; `prefill_s` up to its first token, `decode_s` from there."""
        sums, steps = self._of(model, worker), max(tokens_out - 1.0, 0.0)
        if sums.answers >= ANSWERS:
            kept = 1.0 - 1.0 / ANSWERS
            sums.answers *= kept
            sums.read, sums.prefill_s = sums.read * kept, sums.prefill_s * kept
            sums.steps, sums.decode_s, sums.batch = sums.steps * kept, sums.decode_s * kept, sums.batch * kept
        sums.answers += 1.0
        sums.read, sums.prefill_s = sums.read + tokens_in, sums.prefill_s + prefill_s
        sums.steps, sums.batch = sums.steps + steps, sums.batch + steps * max(batch_mean, 1.0)
        sums.decode_s += decode_s if steps else 0.0
        self.changes += 1

    def loaded(self, model: int, worker: int, seconds: float) -> None:
        """A load has ended."""
        sums = self._of(model, worker)
        if sums.loads >= LOADS:
            kept = 1.0 - 1.0 / LOADS
            sums.loads, sums.load_s = sums.loads * kept, sums.load_s * kept
        sums.loads, sums.load_s = sums.loads + 1.0, sums.load_s + seconds
        self.changes += 1

    def units(self) -> tuple[tuple[UnitCosts, ...], ...]:
        """[artifacts][workers] by the live planner's own rules. Joules are those of the start."""
        return tuple(tuple(self._unit(spec, device) for device in self._devices) for spec in self._specs)

    def _of(self, model: int, worker: int) -> _Sums:
        key = (self._specs[model].name, self._devices[worker].device_class)
        return self._sums.setdefault(key, _Sums(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))

    def _unit(self, spec: m.ArtifactSpec, device: m.Device) -> UnitCosts:
        key = (spec.name, device.device_class)
        known, sums = self._known.get(key), self._sums.get(key)
        if sums is not None and (known is None or not known.count):  # joules were never seen: as believed beforehand
            prior = cost.unit_costs(spec, device, None)
            known = m.ArtifactQos(
                artifact=spec.name, device_class=device.device_class, count=0, prefill_s_per_token=prior.prefill_s,
                tpot_s=prior.tpot_s, tpot_batch=1.0, load_s=0.0, loads=0, energy_j_per_token_in=prior.prefill_j,
                energy_j_per_token_out=prior.decode_j, energy_source="model",
            )  # fmt: skip
        if known is not None and sums is not None:
            known = msgspec.structs.replace(
                known,
                count=round(sums.answers),
                prefill_s_per_token=sums.prefill_s / sums.read if sums.read else known.prefill_s_per_token,
                tpot_s=sums.decode_s / sums.steps if sums.steps else known.tpot_s,
                tpot_batch=sums.batch / sums.steps if sums.steps else known.tpot_batch,
                loads=round(sums.loads),
                load_s=sums.load_s / sums.loads if sums.loads else known.load_s,
            )
        u = cost.unit_costs(spec, device, known)
        return UnitCosts(
            u.prefill_s, u.tpot_s, cost.BATCH_SLOPE, u.load_s, u.prefill_j, u.decode_j, u.load_j, (0.0, u.decode_j)
        )
