"""Chances and their logits. Without NumPy: engines and executors use it as answers end."""

from __future__ import annotations

import math

NEAR = 0.02
"""No query's quality is taken to be nearer to 0 or 1."""
_FAR = 50.0


def logit(quality: float) -> float:
    near = min(max(quality, NEAR), 1.0 - NEAR)
    return math.log(near / (1.0 - near))


def chance(level: float, slope: float, confidence: float) -> float:
    """1 / (1 + exp(-(level + slope x confidence)))."""
    return 1.0 / (1.0 + math.exp(-min(max(level + slope * confidence, -_FAR), _FAR)))
