"""Measures what the models of a running system cost on this machine: queries to ask, and what their answers say."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np

from bench.live import Live, System, beside, loaded, read_tokens
from services.planner.decide import cost
from services.simulator.engine import Simulation, Workload
from services.simulator.fleet import SimFleet, SimModel
from services.simulator.profile import UnitCosts
from services.simulator.residency import Fixed
from services.simulator.routers import Fixed as Always
from shared import messages as m

BURST = 6
"""Queries at once, to see what a batch costs."""
PAIRS = 4
"""Times that two engines are asked at once."""
BESIDE = 2
"""Loads while another engine writes."""
MOST_BESIDE = 4.0
LOW = 0.1
"""Quantile: what a machine takes by itself, for others at work only ever add to it."""


@dataclass(frozen=True)
class Calibration:
    """Ids of the queries asked, by artifact where it matters."""

    single: dict[str, list[str]]
    """One at a time, of a resident model."""
    bursts: dict[str, list[list[str]]]
    """`BURST` at once."""
    cold: dict[str, list[str]]
    """Waited for a load."""
    pairs: list[list[str]]
    """Two engines asked at once; none where no two artifacts are resident together."""
    beside_writing: list[str]
    """Waited for a load while another engine wrote all along."""
    learned: dict[str, cost.UnitCosts]
    """What the system believed at the end: joules, and loads of what was never loaded."""


@dataclass(frozen=True)
class Measured:
    """What an artifact took alone, and in a batch."""

    unit: UnitCosts
    burst_s: float
    """Mean latency of `BURST` queries at once."""


@dataclass(frozen=True)
class Costs:
    """What a machine's models cost."""

    artifacts: dict[str, Measured]
    turn_cost: float
    load_beside: float
    """What sharing the device's cores takes: `services.simulator.profile`."""
    overhead_s: float


async def calibrate(asking: System, prompts: Iterator[str], alone: int, loads: int) -> Calibration:
    """Ask what it takes to know the unit costs of each artifact on this machine, and what sharing its cores costs.

    Each artifact is asked `alone` questions one at a time and `BURST` at once, twice. Then whatever is not resident is
    asked for, what was loaded least first, until each has been loaded `loads` times: in memory that does not hold
    all, most loads make room as they do in use. At last two engines that are resident together are asked at once, and
    one is loaded while the other writes. No prompt is asked twice: its beginning would lie in the cache.
    """
    asker, live = asking.asker, asking.asker.live
    cards = {card.artifact.name: card for card in asking.models.cards.values()}
    single: dict[str, list[str]] = {name: [] for name in cards}
    bursts: dict[str, list[list[str]]] = {name: [] for name in cards}
    cold: dict[str, list[str]] = {name: [] for name in cards}
    for again in range(2):
        for name, card in sorted(cards.items()):
            first = await asker.alone(next(prompts), card.name)
            if again and loaded(live, first):  # the first load of all reads from a cold disk
                cold[name].append(first)
            single[name] += [await asker.alone(next(prompts), card.name) for _ in range(alone)]
            bursts[name].append(await asker.together([next(prompts) for _ in range(BURST)], card.name))
    while absent := [n for n in asking.absent(cards) if len(cold[n]) < loads]:
        await asyncio.sleep(asking.residence_s)
        name = min(absent, key=lambda n: (len(cold[n]), n))
        cold[name].append(await asker.alone(next(prompts), cards[name].name))
    pairs = await _asked_together(asking, prompts, cards)
    beside_writing = await _loaded_beside(asking, prompts, cards)
    await asyncio.sleep(2.0)
    qos = {a.artifact: a for a in (await asking.qos()).artifacts}
    device = asking.fleet.workers()[0].device
    learned = {name: cost.unit_costs(card.artifact, device, qos.get(name)) for name, card in cards.items()}
    return Calibration(single, bursts, cold, pairs, beside_writing, learned)


async def _asked_together(asking: System, fresh: Iterator[str], cards: Mapping[str, m.Card]) -> list[list[str]]:
    """Answers of two engines that were asked at once; none where no two artifacts are resident."""
    asker = asking.asker
    held = sorted(set(cards) - set(asking.absent(cards)), key=lambda name: cards[name].artifact.footprint_bytes)
    pairs = []
    for _ in range(PAIRS if len(held) > 1 else 0):
        ids = [await asker.ask(next(fresh), cards[name].name) for name in held[:2]]
        await asyncio.gather(*(asker.ended(i) for i in ids))
        pairs.append(ids)
    return pairs


async def _loaded_beside(asking: System, fresh: Iterator[str], cards: Mapping[str, m.Card]) -> list[str]:
    """Answers that waited for a load while another engine wrote all along; none where no two fit together."""
    asker, found = asking.asker, list[str]()
    size = {name: card.artifact.footprint_bytes for name, card in cards.items()}
    budget = max(w.budget_bytes for w in asking.fleet.workers())
    for _ in range(3 * BESIDE):
        await asyncio.sleep(asking.residence_s)
        absent = asking.absent(cards)
        both = [(a, h) for a in absent for h in cards if h not in absent and size[a] + size[h] <= budget]
        if both and len(found) < BESIDE:
            coming, writing = min(both, key=lambda one: (size[one[0]] + size[one[1]], one))
            found.append(await asker.ask(next(fresh), cards[coming].name))
            waited = asyncio.create_task(asker.ended(found[-1]))
            while not waited.done():
                await asker.alone(next(fresh), cards[writing].name)
            await waited
        elif absent:
            await asker.alone(next(fresh), cards[max(absent, key=lambda name: size[name])].name)
    return found


def costs(live: Live, asked: Calibration, cards: Mapping[str, m.Card]) -> Costs:
    """What the answers of a calibration say."""
    overhead_s = statistics.median(beside(live, i) for ids in asked.single.values() for i in ids)
    found = {
        name: _measured(
            live, card.artifact, asked.learned[name], asked.single[name], asked.bursts[name], asked.cold[name],
            overhead_s,
        )
        for name, card in {card.artifact.name: card for card in cards.values()}.items()
    }  # fmt: skip
    turn_cost, load_beside = _turn_cost(live, found, asked.pairs), _load_beside(live, asked.cold, asked.beside_writing)
    return Costs(found, turn_cost, load_beside, overhead_s)


def as_toml(found: Costs, name: str, description: str) -> str:
    """A measured profile."""
    lines = [
        f"# Measured by `python -m bench.fidelity measure` on {datetime.now().astimezone():%Y-%m-%d}: {description}.",
        "# Each artifact alone; a load is all that waiting for it adds to an answer, with weights in the page cache.",
        "# Joules are of stated powers.",
        f'name = "{name}"', f'description = "{description}, embedded fleet"', "shared = true", "turns = true",
        f"turn_cost = {found.turn_cost:.4g}", f"load_beside = {found.load_beside:.4g}",
        f"overhead_s = {found.overhead_s:.4g}", "",
    ]  # fmt: skip
    for artifact, one in sorted(found.artifacts.items()):
        figures = {
            key: getattr(one.unit, key)
            for key in ("prefill_s", "beside", "tpot_s", "slope", "load_s", "prefill_j", "decode_j", "load_j")
        }
        lines += [f'[artifacts."{artifact}"]', *(f"{key} = {value:.5g}" for key, value in figures.items()), ""]
    return "\n".join(lines)


def _turn_cost(live: Live, found: Mapping[str, Measured], pairs: Sequence[Sequence[str]]) -> float:
    grown = []
    for ids in pairs:
        steps = sum(found[live.answer[i]["artifact"]].unit.tpot_s for i in ids)
        # The one that began to write last was not held up by the other's prompt.
        last = max(ids, key=lambda i: live.at[i] + _began(live.answer[i]))
        grown.append(_token_s(live.answer[last]) / steps)
    return max(_low(grown), 1.0) if grown else 1.0


def _load_beside(live: Live, cold: Mapping[str, Sequence[str]], beside_writing: Sequence[str]) -> float:
    def load_s(query_id: str) -> float:
        return float(live.answer[query_id]["timings"]["load_s"])

    usual = {name: _low(map(load_s, ids)) for name, ids in cold.items() if ids}
    grown = [load_s(i) / usual[a] for i in beside_writing if (a := live.answer[i]["artifact"]) in usual]
    return max(_low(grown) - 1.0, 0.0) if grown else 0.0


def _measured(
    live: Live,
    spec: m.ArtifactSpec,
    learned: cost.UnitCosts,
    single: list[str],
    bursts: list[list[str]],
    cold: list[str],
    overhead_s: float,
) -> Measured:
    answers = [a for i in single if (a := live.answer[i])["usage"]["tokens_out"] > 1]
    token_s = _low(map(_token_s, answers))
    # The first token comes out of reading: its step is counted with the others.
    prefill_s = _low((a["timings"]["prefill_s"] - _token_s(a)) / read_tokens(a) for a in answers)
    alone = UnitCosts(
        prefill_s=max(prefill_s, 1e-6), tpot_s=token_s, slope=0.0, load_s=learned.load_s,
        prefill_j=learned.prefill_j, decode_j=learned.decode_j, load_j=learned.load_j, token_j=(0.0, learned.decode_j),
    )  # fmt: skip
    # All that a load adds to an answer: orders and evictions before it, pages not touched yet after it.
    waits = [live.latency[i] - _alone_s(live.answer[i], alone) - overhead_s for i in cold]
    if waits:
        load_s = max(_low(waits), 1e-3)
        alone = replace(alone, load_s=load_s, load_j=learned.load_j * load_s / learned.load_s)
    # Whoever began to write last wrote while nobody's prompt was read: that is what a batch costs.
    burst = min(bursts, key=lambda ids: statistics.mean(live.latency[i] for i in ids))
    last = max((live.answer[i] for i in burst), key=_began)
    batch = _beside_last(live, burst)
    slope = max(_token_s(last) / alone.tpot_s - 1.0, 0.0) / max(batch - 1.0, 1.0)
    burst_s = statistics.mean(live.latency[i] for i in burst)
    low, high = 1.0, MOST_BESIDE
    for _ in range(20):  # and what is left of the time is what reading costs beside others
        middle = (low + high) / 2.0
        tried = replace(alone, slope=slope, beside=middle)
        took = _simulated_burst(live, burst, spec, tried, overhead_s)
        low, high = (middle, high) if took < burst_s else (low, middle)
    return Measured(replace(alone, slope=slope, beside=(low + high) / 2.0), burst_s)


def _low(figures: Iterable[float]) -> float:
    return float(np.quantile(list(figures), LOW))


def _alone_s(answer: dict[str, Any], unit: UnitCosts) -> float:
    return float(read_tokens(answer) * unit.prefill_s + answer["usage"]["tokens_out"] * unit.tpot_s)


def _token_s(answer: dict[str, Any]) -> float:
    return float(answer["timings"]["decode_s"] / max(answer["usage"]["tokens_out"] - 1, 1))


def _began(answer: dict[str, Any]) -> float:
    t = answer["timings"]
    return float(t["total_s"] - t["decode_s"])


def _beside_last(live: Live, burst: list[str]) -> float:
    """Sequences running while the last one wrote, on average, itself included: how far their ends overlap with it."""
    spans = []
    for i in burst:
        t, at = live.answer[i]["timings"], live.at[i] - live.at[burst[0]]
        spans.append((at + t["total_s"] - t["decode_s"], at + t["total_s"]))
    begin, end = max(spans)
    return float(sum(max(min(end, e) - max(begin, b), 0.0) for b, e in spans) / max(end - begin, 1e-9))


def _simulated_burst(live: Live, ids: list[str], spec: m.ArtifactSpec, unit: UnitCosts, overhead_s: float) -> float:
    """Mean latency of queries asked when these were, of this artifact alone: the slope is what makes it right."""
    fleet = SimFleet(
        "burst", (SimModel(name=spec.name, parameters_b=1.0, memory=1, slots=spec.slots),), ("worker",), (1,), (1,),
        ((unit,),), np.ones((1, 1), bool), shared=True, overhead_s=overhead_s,
    )  # fmt: skip
    answers = [live.answer[i] for i in ids]
    work = Workload(
        np.array([live.at[i] - live.at[ids[0]] for i in ids]), np.arange(len(ids)),
        np.array([float(read_tokens(a)) for a in answers]),
        np.array([[float(a["usage"]["tokens_out"])] for a in answers]), np.zeros((len(ids), 1)),
    )  # fmt: skip
    return float(Simulation(fleet, work, Always(np.zeros(len(ids), int)), Fixed()).run().latency_s.mean())
