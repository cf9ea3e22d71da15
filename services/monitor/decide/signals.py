"""Changes of latency, energy and confidence of each card, and of the mix of queries. Pure: state in, symptoms out.

Latency and energy are compared with what was predicted for the query, so that longer answers or a fuller batch are no
change of the model. A symptom is told once; after it the level reached is the new reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from shared import messages as m
from shared.learn import edetect
from shared.learn.edetect import Mix, Ranks


@dataclass
class Signals:
    """All signals: `card/latency`, `card/energy`, `card/confidence`, and the mix of domains."""

    ranks: dict[str, Ranks] = field(default_factory=dict)
    mix: Mix = field(default_factory=Mix)

    def ended(self, done: m.Done, route: m.Route | None, now: float) -> list[m.Symptom]:
        """A query has been answered."""
        answer = done.answer
        if answer is None:
            return []
        card = done.card or answer.model
        values = {"confidence": answer.confidence.mean_logprob}
        chosen = next((c for c in route.candidates if c.card == card), None) if route is not None else None
        if chosen is not None:
            expected_s = chosen.terms.get("prefill_s", 0.0) + chosen.terms.get("decode_s", 0.0)
            took_s = answer.timings.prefill_s + answer.timings.decode_s
            if expected_s > 0.0 and took_s > 0.0:
                values["latency"] = math.log(took_s / expected_s)
            expected_j, took_j = chosen.terms.get("active_j", 0.0), answer.energy.joules - answer.energy.retried_j
            if expected_j > 0.0 and took_j > 0.0:
                values["energy"] = math.log(took_j / expected_j)
        return [found for name, value in values.items() if (found := self._observe(card, name, value, now))]

    def routed(self, route: m.Route, now: float) -> list[m.Symptom]:
        """A query has been routed: its domains count."""
        if not route.domains:
            return []
        self.mix = edetect.mixed(self.mix, sorted(route.domains.items()))
        if self.mix.evidence < edetect.THRESHOLD:
            return []
        grown, evidence = self.mix.growing, self.mix.evidence
        self.mix = Mix()
        detail = f"the mix of queries has changed: more of {grown}"
        return [m.Symptom(kind="drift", subject="queries", detail=detail, value=evidence, at=now)]

    def _observe(self, card: str, name: str, value: float, now: float) -> m.Symptom | None:
        key = f"{card}/{name}"
        state = self.ranks[key] = edetect.ranked(self.ranks.get(key, Ranks()), value)
        if state.evidence < edetect.THRESHOLD:
            return None
        direction = "higher" if state.rising else "lower"
        self.ranks[key] = Ranks()
        detail = f"{name} has become {direction} than it used to be, for what was predicted"
        return m.Symptom(kind="drift", subject=card, detail=detail, value=state.evidence, at=now)
