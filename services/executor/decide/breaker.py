"""Circuit breakers: an artifact that fails again and again rests for a while. Pure: state in, state out.

Closed, it counts consecutive failures; at `LIMIT` it opens for `REST_S` (doubled each time it opens again, up to
`MAX_REST_S`); after that one attempt is let through, whose outcome closes it or opens it again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

LIMIT = 3
REST_S = 5.0
MAX_REST_S = 120.0


@dataclass(frozen=True)
class Breaker:
    failures: int = 0
    """Consecutive."""
    opened: int = 0
    """Times in a row that it has opened."""
    open_until: float = 0.0


def usable(breaker: Breaker, now: float) -> bool:
    return now >= breaker.open_until


def failed(breaker: Breaker, now: float) -> Breaker:
    """After a failure. A breaker that had been open before opens again at the first."""
    failures = breaker.failures + 1
    if failures < LIMIT and not breaker.opened:
        return replace(breaker, failures=failures)
    rest = min(REST_S * 2.0**breaker.opened, MAX_REST_S)
    return Breaker(failures=0, opened=breaker.opened + 1, open_until=now + rest)


def succeeded(_breaker: Breaker) -> Breaker:
    return Breaker()
