"""Is the simulator faithful? One trace, live on an embedded fleet and simulated with that machine's own profile.

    python -m bench.fidelity measure --queries FILE --write profiles/cpu.toml
    python -m bench.fidelity run --queries FILE [--profile cpu] [--count 60] [--rate 0.8] [--workers 1] [--save FILE]
    python -m bench.fidelity again --saved FILE [--profile cpu]

`measure` starts the system and writes a profile of what its models cost alone: loading, reading, writing, and how much
slower a batch writes. `run` starts it anew (without `--profile` it measures first) and plays a trace: Poisson arrivals
from three kinds of clients (the fleet's own weights; quality first; latency first) whose shares change twice, so that
several models are wanted and, in the embedded fleet's memory, must be loaded and evicted. The same arrivals, with the
qualities that the live planner predicted and the lengths that were really written, are then simulated from the same
resident models; residency and routing are the planner's own code in both. `again` simulates a saved run once more.

Mean latency, residency hits and the models' shares are to agree within 15 %. A machine that others use too is not as
quick as when its profile was taken: so the profile's times are multiplied by the machine's pace (`bench.pace`), which
is seen in other queries, asked alone directly before the trace, in its quiet gaps, and directly after it. Those in gaps
are simulated with the trace, and not judged. The first table is without any pace; a third has the models chosen that
answered live, for where two are worth the same to a query, a load and all that waits for it hang on a coin.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench.calibrate import Calibration, as_toml, calibrate, costs
from bench.e2e import read_prompts
from bench.live import Live, beside, loaded, read_tokens, system
from bench.others import used
from bench.pace import Clock, in_gap, lone_queries, pace
from bench.report import machine, print_machine, print_table, write_json
from services.simulator import recorded
from services.simulator.profile import Profile, load_profile, parse_profile
from shared import messages as m

WITHIN = 0.15
PHASES = ("before", "trace", "after")
SETTLE_S = 2.0
"""After the last answer: the figures of the last answers are learned by then."""
CLIENTS = (
    m.Preference(),
    m.Preference(quality=12.0, latency=0.1, energy=0.0),
    m.Preference(quality=0.3, latency=4.0, energy=0.1),
)
SHARES = ((0.6, 0.1, 0.3), (0.25, 0.65, 0.1), (0.6, 0.1, 0.3))
"""Of the kinds of clients, in each third of the trace."""


@dataclass(frozen=True)
class Known:
    """What the live system knows of itself."""

    cards: dict[str, m.Card]
    policy: m.Policy
    workers: list[m.WorkerState]
    """As they stood when the trace began."""
    qos: m.Qos
    """As learned when the trace began."""


@dataclass(frozen=True)
class Saved:
    """A live run: enough to simulate it again."""

    live: Live
    asked: list[str]
    known: Known
    calibration: Calibration | None
    """Made before the trace, where no profile was given."""
    lone: list[str]
    """Queries asked alone, for the machine's pace: before the trace, in its gaps, after it."""
    others: dict[str, float]
    """Share of the cores that other processes took: while calibrating, during the trace, while calibrating again."""


def clients(count: int, rng: np.random.Generator) -> list[m.Preference]:
    """Whose query each is."""
    thirds = [SHARES[min(i * len(SHARES) // count, len(SHARES) - 1)] for i in range(count)]
    return [CLIENTS[rng.choice(len(CLIENTS), p=share)] for share in thirds]


async def record(arguments: argparse.Namespace, prompts: list[str]) -> Saved:
    """Play the trace."""
    rng = np.random.default_rng(arguments.seed)
    rng.shuffle(prompts)
    warm, others, prompts = prompts[:8], iter(prompts[8 + arguments.count :]), prompts[8 : 8 + arguments.count]
    at = np.cumsum(rng.exponential(1.0 / arguments.rate, len(prompts))).tolist()
    wants = clients(len(prompts), rng)
    async with system(arguments.workers, arguments.fleet, arguments.memory, arguments.max_tokens) as asking:
        asker = asking.asker
        for prompt, card in zip(warm, asking.models.cards, strict=False):  # the first queries of a system are slower
            await asker.alone(prompt, card)
        marks, calibration = [used()], None
        if not arguments.profile:
            calibration = await calibrate(asking, others, arguments.alone, arguments.loads)
        profile = profile_of(arguments.profile, calibration, asker.live, asking.models.cards)
        lone = await lone_queries(asking, others, arguments.alone)
        await asyncio.sleep(SETTLE_S)
        marks.append(used())
        state, qos = asking.fleet.workers(), await asking.qos()
        asked, in_gaps = list[str](), list[str]()
        start = time.perf_counter()
        for prompt, due, preference in zip(prompts, at, wants, strict=True):
            in_gaps += await in_gap(asking, start + due, others, profile, in_gaps)
            asked.append(await asker.ask(prompt, preference=preference))
            print(f"\r{len(asked)} of {len(prompts)} asked", end="", file=sys.stderr, flush=True)
        await asyncio.gather(*(asker.ended(query_id) for query_id in asked))
        marks.append(used())
        await asyncio.sleep(SETTLE_S)
        print(file=sys.stderr)
        assert asking.models.policy is not None
        known = Known(dict(asking.models.cards), asking.models.policy, state, qos)
        lone += in_gaps + await lone_queries(asking, others, arguments.alone)
        marks.append(used())
        shares = [now.others(before) for before, now in itertools.pairwise(marks)]
        return Saved(asker.live, asked, known, calibration, lone, dict(zip(PHASES, shares, strict=True)))


def profile_of(name: str, calibration: Calibration | None, live: Live, cards: dict[str, m.Card]) -> Profile:
    """The profile named, else that of the calibration."""
    if name or calibration is None:
        return load_profile(name or "cpu")
    return parse_profile(as_toml(costs(live, calibration, cards), "calibrated", "as calibrated"))


@dataclass(frozen=True)
class Simulated:
    """What became of the judged queries in virtual time, [n] each."""

    latency_s: list[float]
    hit: list[bool]
    artifact: list[str]
    energy_j: list[float]
    loads: int


def simulate(saved: Saved, profile: Profile, clock: Clock | None = None, chosen: bool = False) -> Simulated:
    """The same queries in virtual time, those in gaps among them; in the machine's own time with a clock. `chosen`:
    each by the artifact that answered it live."""
    own, real = (clock.own, clock.real) if clock else (float, float)
    live, known = saved.live, saved.known
    first, last = live.at[saved.asked[0]], live.at[saved.asked[-1]]
    played = sorted({*saved.asked, *(i for i in saved.lone if first <= live.at[i] <= last)}, key=live.at.__getitem__)
    answered = [
        recorded.Answered(
            own(live.at[i]), live.route[i], read_tokens(live.answer[i]), live.answer[i]["usage"]["tokens_out"],
            live.preference.get(i, m.Preference()),
        )
        for i in played
    ]  # fmt: skip
    earlier = sorted((i for i, at in live.at.items() if at < first and i in live.route), key=live.at.__getitem__)
    built = recorded.build(
        answered, known.cards, known.workers, known.qos, known.policy, profile.overhead_s, profile,
        [(own(live.at[i]), live.route[i]) for i in earlier],
    )  # fmt: skip
    names = list(built.fleet.names)
    choices = [names.index(live.answer[i]["artifact"]) for i in played] if chosen else None
    result = recorded.simulate(built, choices=choices)
    rows = [played.index(i) for i in saved.asked]
    latency = [
        real(own(live.at[i]) + float(result.latency_s[k])) - live.at[i] for i, k in zip(saved.asked, rows, strict=True)
    ]
    artifact, joules = [names[result.model[k]] for k in rows], result.energy_j[rows].tolist()
    return Simulated(latency, result.hit[rows].tolist(), artifact, joules, result.loads)


def compare(live: Live, asked: list[str], found: Simulated) -> list[tuple[str, float, float, float]]:
    """(what, live, simulated, difference): relative for latency, absolute for shares."""
    latency, simulated = float(np.mean([live.latency[i] for i in asked])), float(np.mean(found.latency_s))
    hits, hit = float(np.mean([not loaded(live, i) for i in asked])), float(np.mean(found.hit))
    rows = [
        ("mean latency, s", latency, simulated, simulated / latency - 1.0),
        ("residency hits", hits, hit, hit - hits),
    ]
    answered = [live.answer[i]["artifact"] for i in asked]
    for name in sorted({*answered, *found.artifact}):
        share, mine = answered.count(name) / len(asked), found.artifact.count(name) / len(asked)
        rows.append((f"share of {name}", share, mine, mine - share))
    return rows


def beside_the_point(live: Live, asked: list[str], found: Simulated) -> list[list[Any]]:
    """Figures that no bound is set for."""
    p95 = float(np.quantile([live.latency[i] for i in asked], 0.95))
    joules = float(np.mean([live.answer[i]["energy"]["joules"] for i in asked]))
    return [
        ["p95 latency, s", p95, float(np.quantile(found.latency_s, 0.95))],
        ["joules a query", joules, float(np.mean(found.energy_j))],
    ]


def parts(live: Live, asked: list[str]) -> list[list[Any]]:
    """Where the live time went, on average."""
    keys = ("queue_s", "load_s", "prefill_s", "decode_s")
    rows = [[key, float(np.mean([live.answer[i]["timings"][key] for i in asked]))] for key in keys]
    return [*rows, ["beside", float(np.mean([beside(live, i) for i in asked]))]]


async def make_profile(arguments: argparse.Namespace, prompts: list[str]) -> None:
    """The command `measure`."""
    np.random.default_rng(arguments.seed + 1).shuffle(prompts)
    async with system(arguments.workers, arguments.fleet, arguments.memory, arguments.max_tokens) as asking:
        began = used()
        asked = await calibrate(asking, iter(prompts), arguments.alone, arguments.loads)
        others = used().others(began)
        found = costs(asking.asker.live, asked, asking.models.cards)
        device = asking.fleet.workers()[0].device
    text = as_toml(found, arguments.write.stem, f"{device.name}, {device.threads} threads an engine")
    arguments.write.write_text(text, encoding="utf-8")
    rows = [
        [name, 1e3 * x.unit.prefill_s, x.unit.beside, 1e3 * x.unit.tpot_s, x.unit.slope, x.unit.load_s, x.burst_s]
        for name, x in found.artifacts.items()
    ]
    titles = ("artifact", "prompt token, ms", "beside", "token, ms", "slope", "load, s", "burst, s")
    print_table(
        f"overhead {1e3 * found.overhead_s:.1f} ms, taking turns {found.turn_cost:.2f}, loads beside others"
        f" {found.load_beside:+.2f}; others took {100 * others:.0f} % of the cores", titles, rows,
    )  # fmt: skip


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    live = argparse.ArgumentParser(add_help=False)
    live.add_argument("--queries", type=Path, required=True, help="JSON lines with `prompt` or `question`; .gz too")
    live.add_argument("--workers", type=int, default=1)
    live.add_argument("--max-tokens", type=int, default=48)
    live.add_argument("--fleet", default="embedded")
    live.add_argument("--memory", default="", help="budget of each worker")
    live.add_argument("--seed", type=int, default=0)
    live.add_argument("--alone", type=int, default=3, help="calibrating: questions one at a time, each model and load")
    live.add_argument("--loads", type=int, default=3, help="calibrating: loads of each model, where they make room")
    one = commands.add_parser("measure", parents=[live], help="write this machine's profile")
    one.add_argument("--write", type=Path, required=True)
    two = commands.add_parser("run", parents=[live], help="a trace, live and simulated")
    two.add_argument("--count", type=int, default=60)
    two.add_argument("--rate", type=float, default=0.8, help="arrivals per second")
    two.add_argument("--save", type=Path, help="keep what came of it, for `again`")
    three = commands.add_parser("again", help="simulate a saved run")
    three.add_argument("--saved", type=Path, required=True)
    for command in (two, three):
        command.add_argument("--profile", default="", help="name or file")
        command.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = arguments_of()
    if arguments.command == "again":
        saved = msgspec.msgpack.decode(arguments.saved.read_bytes(), type=Saved)
    else:
        prompts = read_prompts(arguments.queries, 2000)
        if arguments.command == "measure":
            asyncio.run(make_profile(arguments, prompts))
            return
        saved = asyncio.run(record(arguments, prompts))
        if arguments.save:
            arguments.save.write_bytes(msgspec.msgpack.encode(saved))
    live, asked, known = saved.live, saved.asked, saved.known
    lost = [i for i in (*asked, *saved.lone) if i not in live.answer or i not in live.route]
    if lost:
        print(f"{len(lost)} queries were not answered", file=sys.stderr)
        sys.exit(1)
    profile = profile_of(arguments.profile, saved.calibration, live, known.cards)
    print_machine(machine())
    columns = ("figure", "live", "simulated", "difference")
    print_table("as the profile is", columns, compare(live, asked, simulate(saved, profile)))
    seen = pace(live, saved.lone, profile)
    clock = Clock(seen, live.at[asked[0]], live.at[asked[-1]])
    found = simulate(saved, profile.paced(clock.mean), clock)
    rows = compare(live, asked, found)
    print_table(
        f"at the machine's pace: {clock.mean:.2f} times the profile's, by {len(seen.seen)} queries alone", columns, rows
    )
    same = compare(live, asked, simulate(saved, profile.paced(clock.mean), clock, chosen=True))
    print_table("the same with the live choices of models", columns, same[:2])
    print_table("cores' time taken by others", ("when", "share"), list(saved.others.items()))
    print_table("beside", columns[:3], beside_the_point(live, asked, found))
    print_table("live seconds, on average", ("part", "s"), parts(live, asked))
    print(f"loads in the simulation: {found.loads}")
    if arguments.json:
        write_json(arguments.json, {"benchmark": "fidelity", "machine": machine(), "rows": rows})
    sys.exit(0 if all(abs(row[3]) <= WITHIN for row in rows) else 1)


if __name__ == "__main__":
    main()
