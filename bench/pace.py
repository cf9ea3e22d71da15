"""How quick a machine is just now: queries asked one at a time, in what they take relative to what a profile says.

A machine that others use too is not as quick as it was when its profile was measured. Its pace during a trace is seen
in queries of known cost that are not judged: directly before the trace, in its quiet gaps, and directly after it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bench.live import Live, System, loaded, read_tokens
from services.simulator.profile import Profile
from shared import messages as m

MARGIN = 2.5
"""A gap is used that is so many times as long as the query takes by the profile: a slow machine shows there too."""
PAUSE_S = 0.25
"""Between looks at whether a gap can be used."""
USUAL_IN = 100
"""Tokens of a prompt, to see what fits into a gap."""


def alone_s(profile: Profile, artifact: str, read: int, written: int) -> float:
    """Seconds that reading and writing take a resident artifact that has the machine to itself, by the profile."""
    unit = profile.costs(artifact, parameters_b=1.0, active_b=1.0, memory_bytes=1, gpus=1, sequences=0)
    return read * unit.prefill_s + written * unit.tpot_s


def pace(live: Live, ids: Sequence[str], profile: Profile) -> tuple[float, int]:
    """(what was read and written took so many times what the profile says, queries), in the mean over those of `ids`
    that found their model resident and met no other query. (1, 0) without any."""
    ends = {i: at + live.latency[i] for i, at in live.at.items() if i in live.latency}
    found = []
    for i in ids:
        met = any(live.at[j] < ends[i] and end > live.at[i] for j, end in ends.items() if j != i)
        if met or loaded(live, i):
            continue
        answer = live.answer[i]
        t, usage = answer["timings"], answer["usage"]
        usual = alone_s(profile, answer["artifact"], read_tokens(answer), usage["tokens_out"])
        found.append((t["prefill_s"] + t["decode_s"]) / usual)
    return (float(np.mean(found)), len(found)) if found else (1.0, 0)


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
    asking: System, due: float, prompts: Iterator[str], profile: Profile, asked: dict[str, int]
) -> list[str]:
    """Wait until `due`, asking resident artifacts meanwhile whenever nothing is under way and a query fits. `asked`
    counts them by artifact."""
    found, cards = list[str](), _cards(asking)
    while (left := due - time.perf_counter()) > 0.0:
        name = None
        if asking.asker.idle:
            held = {e.artifact for w in asking.fleet.workers() for e in w.engines if e.state == "ready"} & set(cards)
            usual = {name: alone_s(profile, name, USUAL_IN, asking.asker.max_tokens) for name in held}
            name = fitting(left, usual, asked)
        if name is not None:
            asked[name] = asked.get(name, 0) + 1
            found.append(await asking.asker.ask(next(prompts), cards[name].name))
        await asyncio.sleep(min(left, PAUSE_S))
    return found
