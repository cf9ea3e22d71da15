"""What `calm up` does about a service that has ended. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

FIRST_S = 0.2
LONGEST_S = 10.0
STEADY_S = 30.0
"""A service that has run this long is steady: its next end counts as its first."""


@dataclass(frozen=True)
class History:
    """How often a service has ended in a row without having been steady."""

    restarts: int = 0
    """In all."""
    quick: int = 0


def after_end(history: History, ran_s: float) -> tuple[float, History]:
    """Seconds to wait before the restart, doubled each time it ends quickly again, and the new history."""
    quick = 0 if ran_s >= STEADY_S else history.quick
    wait_s = min(FIRST_S * 2.0**quick, LONGEST_S)
    return wait_s, replace(history, restarts=history.restarts + 1, quick=quick + 1)
