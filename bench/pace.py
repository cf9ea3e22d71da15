"""How quick a machine is just now: queries asked one at a time, in what they take relative to what a profile says.

A machine that others use too is not as quick as it was when its profile was measured. Its pace during a trace is seen
in queries of known cost that are not judged: directly before the trace, in its quiet gaps, and directly after it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.live import Live, System, loaded, read_tokens
from services.simulator.profile import Profile
from shared import messages as m

MARGIN = 2.5
"""A gap is used that is so many times as long as the query takes by the profile: a slow machine shows there too."""
EVERY_S = 2.0
"""At least, between queries in gaps: the trace is to find the system as it would be without them."""
PAUSE_S = 0.25
"""Between looks at whether a gap can be used."""
USUAL_IN = 100
"""Tokens of a prompt, to see what fits into a gap."""
WIDTH_S = 10.0
"""Of the kernel. Of 5, 10 and 20 the one that fitted best three runs that are not judged by it."""
GRID_S, REACH_S = 0.25, 60.0
Floats = NDArray[np.float64]


def alone_s(profile: Profile, artifact: str, read: int, written: int) -> float:
    """Seconds that reading and writing take a resident artifact that has the machine to itself, by the profile."""
    unit = profile.costs(artifact, parameters_b=1.0, active_b=1.0, memory_bytes=1, gpus=1, sequences=0)
    return read * unit.prefill_s + written * unit.tpot_s


@dataclass(frozen=True)
class Pace:
    """What everything takes relative to a profile, over time: means of what was seen, the nearer in time the weightier
    (a Gaussian kernel of `WIDTH_S`)."""

    at: list[float]
    """[n] seconds, in any clock."""
    seen: list[float]
    """[n] times the profile's."""

    def of(self, times: Sequence[float]) -> Floats:
        """[k] at these times; 1 where nothing was seen at all."""
        t = np.asarray(times, float)
        if not self.at:
            return np.ones_like(t)
        z = -0.5 * ((t[:, None] - np.array(self.at)) / WIDTH_S) ** 2
        weight = np.exp(z - z.max(axis=1, keepdims=True))  # far from all, the nearest counts
        return np.asarray((weight * self.seen).sum(axis=1) / weight.sum(axis=1))


class Clock:
    """The machine's own time: it passes as quickly as the machine is, and in the mean as real time from `first` to
    `last`. What takes a constant time there takes a longer one where the machine is slow."""

    def __init__(self, pace: Pace, first: float, last: float) -> None:
        """Beyond `REACH_S` before and after the pace is taken to stay what it was."""
        self._real = np.arange(first - REACH_S, last + REACH_S, GRID_S)
        found = pace.of(self._real.tolist())
        within = (self._real >= first) & (self._real <= last)
        self.mean = float(len(found[within]) / (1.0 / found[within]).sum())
        """Times the profile's, over that time: what is simulated in this clock is to be slower by so much."""
        passed = GRID_S * self.mean / found
        self._own = self._real[0] + np.concatenate([[0.0], np.cumsum(passed[:-1])])
        self._rate = float(passed[0] / GRID_S), float(passed[-1] / GRID_S)

    def own(self, real: float) -> float:
        """The machine's time at this real time."""
        return _mapped(real, self._real, self._own, self._rate)

    def real(self, own: float) -> float:
        """The real time at this time of the machine's."""
        return _mapped(own, self._own, self._real, (1.0 / self._rate[0], 1.0 / self._rate[1]))


def _mapped(x: float, xs: Floats, ys: Floats, rate: tuple[float, float]) -> float:
    """Linear between points, and at a constant rate before the first and after the last."""
    if x < xs[0]:
        return float(ys[0] + (x - xs[0]) * rate[0])
    if x > xs[-1]:
        return float(ys[-1] + (x - xs[-1]) * rate[1])
    return float(np.interp(x, xs, ys))


def pace(live: Live, ids: Sequence[str], profile: Profile) -> Pace:
    """What reading and writing took relative to the profile, for those of `ids` that found their model resident and met
    no other query."""
    ends = {i: at + live.latency[i] for i, at in live.at.items() if i in live.latency}
    found = Pace([], [])
    for i in ids:
        met = any(live.at[j] < ends[i] and end > live.at[i] for j, end in ends.items() if j != i)
        if met or loaded(live, i):
            continue
        answer = live.answer[i]
        t, usage = answer["timings"], answer["usage"]
        usual = alone_s(profile, answer["artifact"], read_tokens(answer), usage["tokens_out"])
        found.at.append((live.at[i] + ends[i]) / 2.0)
        found.seen.append((t["prefill_s"] + t["decode_s"]) / usual)
    return found


def fitting(gap_s: float, usual_s: Mapping[str, float], asked: Mapping[str, int]) -> str | None:
    """The artifact to ask in a gap: of those whose query fits, the one asked least so far."""
    fit = [name for name, seconds in usual_s.items() if MARGIN * seconds <= gap_s]
    return min(fit, key=lambda name: (asked.get(name, 0), name)) if fit else None


def _cards(asking: System) -> dict[str, m.Card]:
    """One card of each artifact."""
    return {card.artifact.name: card for card in asking.models.cards.values()}


async def lone_queries(asking: System, prompts: Iterator[str], each: int) -> list[str]:
    """Queries asked one at a time, `each` of every artifact, the largest first: small ones are resident at the end."""
    found = []
    for card in sorted(_cards(asking).values(), key=lambda card: -card.artifact.footprint_bytes):
        await asking.asker.alone(next(prompts), card.name)  # loads it where it must, and begins to use its pages
        found += [await asking.asker.alone(next(prompts), card.name) for _ in range(each)]
    return found


async def in_gap(
    asking: System, due: float, prompts: Iterator[str], profile: Profile, before: Sequence[str]
) -> list[str]:
    """Wait until `due`, asking resident artifacts meanwhile whenever nothing is under way and a query fits. `before`:
    those asked in earlier gaps."""
    live, found, cards = asking.asker.live, list[str](), _cards(asking)
    asked = Counter(live.answer[i]["artifact"] for i in before if i in live.answer)
    last = live.at[before[-1]] if before else -math.inf
    while (left := due - time.perf_counter()) > 0.0:
        name = None
        if asking.asker.idle and time.perf_counter() - last >= EVERY_S:
            held = {e.artifact for w in asking.fleet.workers() for e in w.engines if e.state == "ready"} & set(cards)
            usual = {name: alone_s(profile, name, USUAL_IN, asking.asker.max_tokens) for name in held}
            name = fitting(left, usual, asked)
        if name is not None:
            found.append(await asking.asker.ask(next(prompts), cards[name].name))
            asked[name], last = asked[name] + 1, live.at[found[-1]]
        await asyncio.sleep(min(left, PAUSE_S))
    return found
