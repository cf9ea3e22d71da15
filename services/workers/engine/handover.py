"""Which events leave the engine's thread, and when: each time costs the cores that generate (0.3 to 0.5 ms a token)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from services.workers.engine.batcher import Delta, Event

TOGETHER_S = 0.025
"""Text of a stream follows the last by no less, so that quick steps wake the event loop once for several tokens, and
slower steps give each token its own chunk. Forty chunks a second read as a flow. At 12 ms a chunk, streaming took 8 %
of the decoding speed of SmolLM2 (`bench.worker`, of the bare loop: 0.87 streamed, 0.96 whole; at 25 ms 0.95, 0.99)."""


class Handover:
    """Drops text that nobody streams (the end of a sequence holds all of it), and gathers what comes quickly."""

    def __init__(self, streamed: Callable[[str], bool], timer: Callable[[], float] = time.perf_counter) -> None:
        """`streamed` tells of a sequence id whether somebody wants its text as it grows; `timer` counts seconds."""
        self._streamed = streamed
        self._timer = timer
        self._held: list[Event] = []
        self._started: set[str] = set()
        self._last_s = -TOGETHER_S

    def pass_on(self, events: Iterable[Event]) -> list[Event]:
        """What is to go now, of a step's events and those held. An end waits for nothing, nor does a first text."""
        pressing = False
        for event in events:
            if not isinstance(event, Delta):
                self._started.discard(event.id)
                pressing = True
            elif not (event.text and self._streamed(event.id)):
                continue
            elif event.id not in self._started:
                self._started.add(event.id)
                pressing = True
            self._held.append(event)
        now_s = self._timer()
        if not self._held or not (pressing or now_s - self._last_s >= TOGETHER_S):
            return []
        passed, self._held, self._last_s = self._held, [], now_s
        return passed

    def forget(self, sequence: str) -> None:
        """It was cancelled: no end will come."""
        self._started.discard(sequence)
