"""How a model stands: healthy, or quarantined because its answers became worse than predicted. Pure.

1. Each judged answer is compared with the quality that was *predicted* for that very query, so that harder queries
   are not taken for a worse model. The prediction is first calibrated by what the model earned, relative to its
   predictions, before the last `LAG` judgements (those may already be of the changed model).
2. When the evidence that the mean has fallen reaches the threshold (`edetect`), the model is quarantined: it is left
   out of routing, apart from probes.
3. Judgements of probes are evidence on recovery: a second detector, against "it still earns at most `DEGRADED` of what
   it used to". When that reaches its threshold the model is restored, with its calibration from before.
4. A model that has not recovered after `PATIENCE` probes is released with a *scale*: its predicted quality is
   multiplied by the share that it earned under quarantine. What is restored later raises the scale again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from shared.learn import edetect
from shared.learn.edetect import Sums

LAG = 200
"""Judgements that do not count for the calibration yet."""
MEMORY = 1000.0
"""Judgements over which the calibration reaches back."""
PRIOR = 40.0
"""Judgements that the belief in calibrated predictions is worth."""
CALIBRATION = (0.4, 1.5)
"""Bounds of the calibration."""
DEGRADED = 0.65
"""A model that earns at most this share of what it used to has not recovered."""
RECOVERED = (1.0 / DEGRADED, 1.25)
"""Bets on the mean being this many times `DEGRADED` of what it was."""
RESTORE = 200.0
"""Evidence that restores. A false restoration costs the queries until it is noticed again, so less is asked for."""
PATIENCE = 400
"""Judgements in quarantine after which the new level is accepted."""
WARNING = 0.5
"""Share of the threshold's logarithm from which on a model is watched more closely (probed more often)."""

Event = Literal["drift", "restored", "rebased"]


@dataclass(frozen=True)
class Standing:
    """One model. `since` counts judgements in the present state."""

    state: Literal["healthy", "quarantined"] = "healthy"
    scale: float = 1.0
    """Predicted quality is multiplied by this: 1 until a lower level had to be accepted."""
    sums: Sums = field(default_factory=Sums)
    """Evidence of a fall while healthy, of recovery while quarantined."""
    earned: float = 0.0
    expected: float = 0.0
    """Discounted sums of scores and of predictions, older than `LAG` judgements."""
    recent: tuple[tuple[float, float], ...] = ()
    """(prediction, score) of the last `LAG` judgements."""
    since: int = 0
    probed: float = 0.0
    probed_expected: float = 0.0
    """Sums of scores and of calibrated predictions in quarantine."""

    @property
    def calibration(self) -> float:
        """What the model earned relative to its predictions before the last `LAG` judgements, at the lower end of
        what that many judgements leave open: what is not known yet must not look like a fall."""
        known = self.expected + PRIOR * 0.5
        level = (self.earned + PRIOR * 0.5) / known - 0.5 * math.sqrt(0.5 / known)
        return min(max(level, CALIBRATION[0]), CALIBRATION[1])

    @property
    def evidence(self) -> float:
        """Of a fall while healthy, of recovery while quarantined."""
        return edetect.evidence(self.sums, edetect.DROP_WEIGHTS if self.state == "healthy" else None)

    @property
    def warning(self) -> bool:
        """Healthy, but worth probing."""
        return self.state == "healthy" and self.evidence >= edetect.THRESHOLD**WARNING


def judged(standing: Standing, predicted: float, score: float) -> tuple[Standing, Event | None]:
    """Take in the judgement of one answer.

    Args:
        standing: so far.
        predicted: quality predicted for this query when it was routed, 0 to 1, before `scale`.
        score: what the answer was judged to be worth, 0 to 1.

    Returns:
        The new standing, and what happened: `drift` (now quarantined), `restored`, `rebased` (released with a lower
        scale), or None.
    """
    level = min(max(predicted * standing.calibration, 0.02), 0.98)
    if standing.state == "quarantined":
        return _probed(standing, level, score)
    sums = edetect.bet(standing.sums, edetect.fallen(score, level * standing.scale))
    after = replace(_remember(standing, predicted, score), sums=sums, since=standing.since + 1)
    if edetect.evidence(sums, edetect.DROP_WEIGHTS) < edetect.THRESHOLD:
        return after, None
    # What came lately is of the changed model: the calibration stays that of before.
    bad = replace(after, state="quarantined", sums=Sums(), recent=(), since=0, probed=0.0, probed_expected=0.0)
    return bad, "drift"


def _probed(standing: Standing, level: float, score: float) -> tuple[Standing, Event | None]:
    sums = edetect.bet(standing.sums, edetect.risen(score, DEGRADED * level, RECOVERED))
    after = replace(
        standing,
        sums=sums,
        since=standing.since + 1,
        probed=standing.probed + score,
        probed_expected=standing.probed_expected + level,
    )
    if edetect.evidence(sums) >= RESTORE:
        return replace(after, state="healthy", scale=1.0, sums=Sums(), since=0), "restored"
    if after.since >= PATIENCE:
        scale = min(max(after.probed / max(after.probed_expected, 1e-9), 0.02), 1.0)
        return replace(after, state="healthy", scale=scale, sums=Sums(), since=0), "rebased"
    return after, None


def _remember(standing: Standing, predicted: float, score: float) -> Standing:
    """Move the oldest recent judgement into the calibration."""
    recent = (*standing.recent, (predicted, score))
    if len(recent) <= LAG:
        return replace(standing, recent=recent)
    old_predicted, old_score = recent[0]
    keep = 1.0 - 1.0 / MEMORY
    return replace(
        standing,
        recent=recent[1:],
        earned=standing.earned * keep + old_score / standing.scale,
        expected=standing.expected * keep + old_predicted,
    )
