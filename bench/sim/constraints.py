"""Whether stated objectives hold: the dual controller against fixed weights, before and after the load doubles.

    python -m bench.sim.constraints --learn DIR --judge DIR --trace FILE [--fleet FILE] [--load 0.7]
                                    [--queries N] [--seeds N] [--p95 S] [--energy J] [--json FILE]

Each run serves N queries at `--load` and N at twice that load without a pause. Load is relative to what the small
models' workers serve with the best single small model in full batches. Objectives are "95 % of queries within S
seconds" and "at most J joules a query on average". When they are not given they are chosen from what fixed weights
reach at both loads (a grid, run first): S is `SLACK` times the least 95th percentile that any of them has at the worse
of the loads; J is `SHARE` of what the best in quality of those that hold S spends at the worse of the loads, but no
less than the most frugal needs. So both can be held at both loads, and both bind. An objective *holds* in a window of
500 queries within 5 %. Fixed weights are chosen with hindsight on the first seed's queries, and judged on all seeds'.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.report import machine, write_json
from bench.sim import arrivals
from bench.sim import policies as named
from bench.sim.__main__ import arguments_of, capacity_per_s, setting_of
from bench.sim.setting import Setting
from services.planner.decide import dual
from services.simulator.controlled import Controlled
from services.simulator.engine import Result, Router, Simulation, Workload
from services.simulator.routers import Scored
from shared import messages as m
from shared.errors import CalmError

Array = NDArray[Any]
WINDOW = dual.WINDOW
TOLERANCE = 1.05
SLACK = 2.0
SHARE = 0.85
GRID_LATENCY = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
GRID_ENERGY = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Phase:
    """What a run gave over queries begin..end (in order of arrival)."""

    p95_s: float
    energy_j: float
    accuracy: float


@dataclass(frozen=True)
class Stage:
    """What all runs share."""

    setting: Setting
    models: tuple[str, ...]
    columns: list[int]
    rate_per_s: float

    def work(self, seed: int) -> Workload:
        """N queries at the rate, N at twice the rate."""
        setting, rng = self.setting, np.random.default_rng(seed)
        n, trace = setting.count, setting.trace
        parts = []
        for rate in (self.rate_per_s, 2.0 * self.rate_per_s):
            parts.append(arrivals.poisson(n, rate, rng) if trace is None else arrivals.like_trace(trace, n, rate, rng))
        at = np.concatenate([parts[0], parts[0][-1] + parts[1]])
        rows = np.concatenate([arrivals.in_any_order(setting.judge, n, rng) for _ in parts])
        return arrivals.workload(setting.judge, at, rows, self.columns)

    def run(self, work: Workload, router: Router) -> Result:
        built = self.setting.fleet(self.models)
        return Simulation(built, work, router, named.fixed(work, built, 0)).run()

    def predicted(self, work: Workload) -> tuple[Array, Array]:
        p = self.setting.predictions
        quality = p.quality[work.row][:, self.columns]
        return quality, np.maximum(p.tokens_out[work.row][:, self.columns], 1.0)

    def fixed(self, work: Workload, policy: m.Policy) -> Result:
        quality, tokens = self.predicted(work)
        return self.run(work, Scored(quality, work.tokens_in, tokens, policy))


def phase(result: Result, begin: int, end: int) -> Phase:
    """Figures of the queries begin..end."""
    latency = np.sort(result.latency_s[begin:end])
    return Phase(
        p95_s=float(latency[math.ceil(0.95 * len(latency)) - 1]),
        energy_j=float(result.energy_j[begin:end].mean()),
        accuracy=float(result.score[begin:end].mean()),
    )


def holds(found: Phase, objectives: m.Objectives) -> bool:
    assert objectives.latency_p95_s is not None
    assert objectives.energy_j_per_query is not None
    return (
        found.p95_s <= TOLERANCE * objectives.latency_p95_s
        and found.energy_j <= TOLERANCE * objectives.energy_j_per_query
    )


def phases(count: int) -> dict[str, tuple[int, int]]:
    """Queries that count, by phase: the first 500 after a change of load do not."""
    return {"load": (WINDOW, count), "doubled": (count + WINDOW, 2 * count)}


def windows(count: int) -> list[tuple[str, int, int]]:
    """(phase, begin, end) of each window."""
    return [
        (name, begin, begin + WINDOW)
        for name, offset in (("load", 0), ("doubled", count))
        for begin in range(offset, offset + count - WINDOW + 1, WINDOW)
    ]


def grid(stage: Stage, work: Workload, base: m.Policy) -> list[dict[str, Any]]:
    """Fixed weights: every pair of the grid, in both phases."""
    found = []
    pairs = list(itertools.product(GRID_LATENCY, GRID_ENERGY))
    for index, (w_l, w_e) in enumerate(pairs):
        print(f"\rfixed weights {index + 1} of {len(pairs)}   ", end="", file=sys.stderr, flush=True)
        policy = msgspec.structs.replace(base, w_latency=w_l, w_energy=w_e)
        result = stage.fixed(work, policy)
        found.append(
            {
                "w_latency": w_l, "w_energy": w_e,
                **{name: phase(result, *span) for name, span in phases(stage.setting.count).items()},
                "windows": [phase(result, begin, end) for _, begin, end in windows(stage.setting.count)],
            }
        )  # fmt: skip
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    return found


def choose(found: list[dict[str, Any]], p95_s: float | None, energy_j: float | None) -> tuple[m.Objectives, str]:
    """Objectives that can be held at both loads, and how they were chosen."""
    least = min(max(f["load"].p95_s, f["doubled"].p95_s) for f in found)
    seconds = p95_s or SLACK * least
    able = [f for f in found if max(f["load"].p95_s, f["doubled"].p95_s) <= seconds] or found
    best = max(able, key=lambda f: f["load"].accuracy + f["doubled"].accuracy)
    spent = max(best["load"].energy_j, best["doubled"].energy_j)
    frugal = 1.1 * min(max(f["load"].energy_j, f["doubled"].energy_j) for f in able)
    joules = energy_j or max(SHARE * spent, frugal)
    how = (
        f"S = {seconds:.2f} s ({'given' if p95_s else f'{SLACK:g} x {least:.2f}, the least at both loads'}),"
        f" J = {joules:.1f} J"
        f" ({'given' if energy_j else f'{SHARE:g} x {spent:.1f} of the best that holds S, {frugal:.1f} at least'})"
    )
    return m.Objectives(latency_p95_s=seconds, energy_j_per_query=joules), how


def controlled(stage: Stage, work: Workload, base: m.Policy, objectives: m.Objectives) -> tuple[Result, list[m.Policy]]:
    """One run under the controller; the policy that routed each query."""
    quality, tokens = stage.predicted(work)
    used: list[m.Policy] = []
    router = Controlled(
        quality, work.tokens_in, tokens, base, objectives, on_move=lambda _i, policy: used.append(policy)
    )
    return stage.run(work, router), used


def judge(stage: Stage, seeds: int, p95_s: float | None, energy_j: float | None) -> dict[str, Any]:
    """Everything, as plain data."""
    base = stage.setting.policy(w_quality=1.0, w_latency=named.W_LATENCY, w_energy=0.0, energy_ref_j=100.0)
    work = stage.work(0)
    found = grid(stage, work, base)
    objectives, how = choose(found, p95_s, energy_j)
    scaled = msgspec.structs.replace(
        base, latency_slo_s=objectives.latency_p95_s, energy_ref_j=objectives.energy_j_per_query
    )
    found = grid(stage, work, scaled)
    holding = {name: [f for f in found if holds(f[name], objectives)] for name in phases(stage.setting.count)}
    both = [f for f in found if all(holds(f[name], objectives) for name in holding)]

    def fixed(best: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """What these weights, chosen on the first seed, give over all: other arrivals of other queries."""
        policy = msgspec.structs.replace(scaled, w_latency=best["w_latency"], w_energy=best["w_energy"])
        results = [stage.fixed(stage.work(seed), policy) for seed in range(seeds)]
        return {name: _fixed(results, name, stage.setting.count, objectives, policy) for name in names}

    print("\rfixed weights on all seeds   ", end="", file=sys.stderr, flush=True)
    alone = {
        name: None if not rows else fixed(max(rows, key=lambda f: f[name].accuracy), [name])[name]
        for name, rows in holding.items()
    }
    together = (
        fixed(max(both, key=lambda f: f["load"].accuracy + f["doubled"].accuracy), list(holding)) if both else None
    )
    runs = []
    for seed in range(seeds):
        print(f"\rcalm: seed {seed + 1} of {seeds}          ", end="", file=sys.stderr, flush=True)
        work = stage.work(seed)
        result, used = controlled(stage, work, base, objectives)
        runs.append(
            {
                "seed": seed,
                "phases": {
                    name: _row(phase(result, *span), objectives) for name, span in phases(stage.setting.count).items()
                },
                "windows": [
                    {
                        "phase": name, "begin": begin, **_row(phase(result, begin, end), objectives),
                        "w_latency": used[end - 1].w_latency, "w_energy": used[end - 1].w_energy,
                    }
                    for name, begin, end in windows(stage.setting.count)
                ],
            }
        )  # fmt: skip
    return {
        "objectives": {"p95_s": objectives.latency_p95_s, "energy_j": objectives.energy_j_per_query, "chosen": how},
        "rate_per_s": stage.rate_per_s,
        "fixed": {
            "runs": len(found),
            "best_at": alone,
            "best_at_both": together,
        },
        "calm": runs,
    }


def _row(found: Phase, objectives: m.Objectives) -> dict[str, Any]:
    return {
        "p95_s": found.p95_s, "energy_j": found.energy_j, "accuracy": found.accuracy, "held": holds(found, objectives)
    }  # fmt: skip


def _fixed(
    results: Sequence[Result], name: str, count: int, objectives: m.Objectives, policy: m.Policy
) -> dict[str, Any]:
    """Means over seeds in this phase; `held` of runs, `windows_held` of windows of all phases."""
    rows = [_row(phase(result, *phases(count)[name]), objectives) for result in results]
    held = [holds(phase(result, begin, end), objectives) for result in results for _, begin, end in windows(count)]
    return {
        **{key: float(np.mean([row[key] for row in rows])) for key in ("p95_s", "energy_j", "accuracy")},
        "held": sum(row["held"] for row in rows), "runs": len(rows),
        "w_latency": policy.w_latency, "w_energy": policy.w_energy,
        "windows_held": sum(held), "windows": len(held),
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """Print."""
    goal = result["objectives"]
    print(f"objectives: {goal['chosen']}; {result['rate_per_s']:.2f} queries/s, then twice that")
    for run in result["calm"]:
        print(f"\ncalm, seed {run['seed']}")
        print(
            f"  {'phase':9}{'queries':>13}{'p95':>9}{'of S':>7}{'energy':>10}{'of J':>7}"
            f"{'accuracy':>10}{'w_l':>8}{'w_e':>8}"
        )
        for w in run["windows"]:
            verdict = "held" if w["held"] else "settling" if w["begin"] % result["queries"] == 0 else "NOT HELD"
            print(
                f"  {w['phase']:9}{w['begin']:6}-{w['begin'] + WINDOW:<6}"
                f"{w['p95_s']:7.2f} s{w['p95_s'] / goal['p95_s']:7.2f}"
                f"{w['energy_j']:8.1f} J{w['energy_j'] / goal['energy_j']:7.2f}{w['accuracy']:10.3f}"
                f"{w['w_latency']:8.3f}{w['w_energy']:8.3f}  {verdict}"
            )
    print("\nafter 500 queries of each phase, mean over seeds")
    print(f"  {'':42}{'p95':>9}{'energy':>10}{'accuracy':>10}  held")
    for name in ("load", "doubled"):
        rows = [run["phases"][name] for run in result["calm"]]
        mean = {key: float(np.mean([row[key] for row in rows])) for key in ("p95_s", "energy_j", "accuracy")}
        count = f"{sum(row['held'] for row in rows)} of {len(rows)} runs"
        _line(f"calm, {name}", mean, count)
        if best := result["fixed"]["best_at"][name]:
            _line(f"best fixed weights for {name} alone", best, _weights(best))
        if both := result["fixed"]["best_at_both"]:
            _line(f"best fixed weights for both, {name}", both[name], _weights(both[name]))
    settled = [w for run in result["calm"] for w in run["windows"] if w["begin"] % result["queries"]]
    print(f"windows after the first of each phase: {sum(w['held'] for w in settled)} of {len(settled)} held")


def _weights(row: dict[str, Any]) -> str:
    return (
        f"{row['held']} of {row['runs']} runs; w_l {row['w_latency']:g}, w_e {row['w_energy']:g}; "
        f"{row['windows_held']} of {row['windows']} windows"
    )


def _line(name: str, row: dict[str, Any], text: str) -> None:
    print(f"  {name:42}{row['p95_s']:7.2f} s{row['energy_j']:8.1f} J{row['accuracy']:10.3f}  {text}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.sim.constraints", description=__doc__)
    parser.add_argument("--learn", type=Path, required=True, metavar="DIR")
    parser.add_argument("--judge", type=Path, required=True, metavar="DIR")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="arrivals (Azure format); Poisson without it")
    parser.add_argument("--fleet", default="mmlu_pro", metavar="FILE")
    parser.add_argument("--reference", metavar="MODEL", help="the large model; the fleet's largest when left out")
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--queries", type=int, default=4000, help="in each phase")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--p95", type=float, metavar="S")
    parser.add_argument("--energy", type=float, metavar="J")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    try:
        known = arguments_of(["--learn", str(arguments.learn), "--judge", str(arguments.judge)])
        setting = setting_of(argparse.Namespace(**{**vars(known), **vars(arguments)}))
    except CalmError as error:
        print(f"bench.sim.constraints: {error}", file=sys.stderr)
        sys.exit(2)
    models = (*setting.small, *(() if setting.reference in setting.small else (setting.reference,)))
    columns = setting.columns(models)
    single = max(setting.small, key=lambda name: np.nanmean(setting.learn.score[:, setting.columns([name])]))
    capacity = capacity_per_s(setting.fleet(models), setting.judge, single)
    stage = Stage(setting, models, columns, arguments.load * capacity)
    result = judge(stage, arguments.seeds, arguments.p95, arguments.energy)
    result = {
        "benchmark": "constraints", "machine": machine(), "queries": setting.count, "load": arguments.load,
        "capacity_per_s": capacity, "capacity_of": single, "models": models, **result,
    }  # fmt: skip
    show(result)
    print("Latency and energy are modelled from output lengths and the profile; accuracy is recorded.")
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
