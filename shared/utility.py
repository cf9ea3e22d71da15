"""The utility of an answer, as routing predicts it and as it came. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

LN2 = math.log(2.0)


def latency_penalty(ratio: float) -> float:
    """f(L / SLO): 0 at 0, 1 at the objective, growing ever more slowly beyond it."""
    return math.log1p(max(ratio, 0.0)) / LN2


def utility(quality: float, latency_s: float, energy_j: float, weights: Mapping[str, float]) -> float:
    """U = w_q q - w_l f(L / SLO) - w_e E / E_ref: monotone in quality, antitone in latency and energy.

    Args:
        quality: 0 to 1.
        weights: `w_q`, `w_l`, `w_e`, with their scales `latency_slo_s` and `energy_ref_j`, as `Route.weights` has them.
    """
    return (
        weights["w_q"] * quality
        - weights["w_l"] * latency_penalty(latency_s / weights["latency_slo_s"])
        - weights["w_e"] * energy_j / weights["energy_ref_j"]
    )
