"""Subjects measured in turns: one after the other, round by round, so that what drifts on the machine drifts for all.

What is compared is each round's ratio of two rates that were measured a second apart; the rates themselves are only
for orientation.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

Rates = dict[str, list[float]]
"""By subject, one rate for each round."""


@dataclass
class Rounds:
    """What was measured."""

    rates: Rates = field(default_factory=dict)
    busy_s: float = 0.0
    """Processor time of the others' processes while one was measured: they are to sleep."""
    measured_s: float = 0.0

    def interleave(self, measures: Mapping[str, Callable[[], float]], rounds: int, pids: dict[str, int]) -> None:
        """Add a rate of each subject in each of `rounds` rounds.

        Every round begins with another subject, so that none always follows the same. `pids`: the process of each.
        """
        names = list(measures)
        processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        for number in range(rounds):
            first = number % len(names)
            for name in [*names[first:], *names[:first]]:
                others = [process for other, process in processes.items() if other != name]
                before_s, began = sum(map(_busy_s, others)), time.perf_counter()
                rate = measures[name]()
                self.measured_s += time.perf_counter() - began
                self.busy_s += sum(map(_busy_s, others)) - before_s
                self.rates.setdefault(name, []).append(rate)


def compare(rates: Rates, subject: str, others: Sequence[str]) -> dict[str, Any]:
    """`subject` over the quickest of `others` (by its median rate): that one's name, all rounds' ratios, their median
    and their quartiles."""
    peer = max(others, key=lambda name: statistics.median(rates[name]))
    ratios = [ours / theirs for ours, theirs in zip(rates[subject], rates[peer], strict=True)]
    quarter, median, three = statistics.quantiles(ratios, n=4, method="inclusive") if ratios[1:] else ratios * 3
    return {"peer": peer, "ratio": median, "quartiles": [quarter, three], "ratios": ratios}


def _busy_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
