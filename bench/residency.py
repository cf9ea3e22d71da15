"""Residency under memory pressure: routing and residency varied independently, on a mix of domains that shifts.

`python -m bench.residency --learn DIR --judge DIR [--scenario specialists|outcomes] [--seeds N] [--json FILE]`

One worker has memory for 3 of the fleet's small models; every `--shift` seconds the mix of categories changes. Routers:
*blind* takes the model with the best utility as if all were resident; *joint* knows residency, queues, loads and what
a load costs others. Residency: LRU, LFU, GreedyDual-Size-Frequency (on demand), the planner's own, and the planner's
own with foresight: it is given the queries of the next minute in place of its forecast (the best of `FORESIGHT` such
planners, chosen afterwards on each seed). Behind the blind router, whose queries do not depend on what is resident,
there are rollouts besides: with the arrivals known beforehand (the offline bound, at several prices of a swap), and
with the forecast. All see the same queries at the same times.

Joint and separate are compared at the same weights and at equal quality: the joint router's weight of latency is
lowered (`LIGHTER`) until it is as accurate as the separate one.

Scenario `outcomes` takes the recorded outcomes and learned predictions as they are; with models as unequal as those, a
good router wants hardly more than three, and memory for three is no pressure. Scenario `specialists` keeps the
recorded categories and lengths and makes each model the specialist of every seventh category (answers right with
probability 0.486 there and 0.45 elsewhere, predicted with noise): as many models are wanted as there are. The best two
small models of a category are about that far apart in the recorded outcomes (3.6 points on average).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.report import machine, print_table, write_json
from bench.residency_claims import claims
from bench.sim import arrivals, report
from bench.sim.__main__ import setting_of
from bench.sim.setting import Setting
from services.planner.decide.scoring import slope_of_penalty
from services.simulator import routers
from services.simulator.engine import Result, Simulation, Workload
from services.simulator.fleet import SimFleet, build
from services.simulator.planned import Options, Planned, warm_utilities
from services.simulator.residency import ON_DEMAND
from services.simulator.rollout import Rollout
from shared import messages as m
from shared.errors import CalmError

Array = NDArray[Any]
FORESIGHT = tuple(Options(foresight_s=f, patience=p) for f in (60.0, 120.0) for p in (0.3, 1.0))
ABLATIONS = {
    "no prefetch": Options(prefetch=False),
    "no grouping": Options(patience=0.0),
    "no burden": Options(burden=False),
    "noise margin": Options(noise_z=0.5),
}
LIGHTER = (0.5, 0.25, 0.1, 0.05, 0.025)
"""Of the weight of latency, for the joint router."""
ROLLOUTS = ((60.0, 0.0), (100.0, 100.0), (400.0, 250.0))
"""(seconds of waiting that the rule that goes on makes a swap for, price of a swap in the same)."""
RIGHT, OTHERWISE, NOISE = 0.486, 0.45, 0.01
SEPARATE = Options(patience=2.0, min_residence_s=5.0)
"""Of the planned residency behind a blind router, which weighs nothing itself and has to be more patient. Chosen on
`tune1` of patience 0.5 to 9, residence of 0 to 10 s, with and without prefetch (8.7 s at 150 swaps, was 9.3 at 161)."""
PATIENT = Options(patience=4.5, min_residence_s=5.0, max_wait_s=120.0, prefetch=False)
"""The same, to swap less than once in 20 queries; chosen in the same way."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One seed's fleet, queries and predictions."""

    fleet: SimFleet
    work: Workload
    quality: Array
    tokens_out: Array
    policy: m.Policy
    order: list[int]


def case(setting: Setting, arguments: argparse.Namespace, seed: int) -> Case:
    """The queries of a seed."""
    rng = np.random.default_rng(seed)
    fleet = build(setting.file, setting.profile, setting.small, memory_for=arguments.memory_for, workers=1)
    at = arrivals.poisson(arguments.queries, arguments.rate, rng)
    rows, _ = arrivals.shifting(setting.judge, at, rng, every_s=arguments.shift)
    columns = setting.columns(setting.small)
    work = arrivals.workload(setting.judge, at, rows, columns)
    quality = setting.learned.judge.quality[rows][:, columns]
    if arguments.scenario == "specialists":
        assert work.group is not None
        share = np.full((len(rows), len(columns)), OTHERWISE)
        share[np.arange(len(rows)), work.group % len(columns)] = RIGHT
        score = (rng.random((len(rows), 1)) < share).astype(float)
        work = dataclasses.replace(work, score=score)
        quality = share + rng.normal(0.0, NOISE, share.shape)
    policy = m.Policy(
        fleet="bench", w_latency=arguments.w_latency, w_energy=0.0, latency_slo_s=arguments.slo, energy_ref_j=20.0
    )
    tokens = np.maximum(setting.learned.judge.tokens_out[rows][:, columns], 1.0)
    learned = np.nanmean(setting.learn.score[:, columns], axis=0)
    return Case(fleet, work, quality, tokens, policy, [int(i) for i in np.argsort(-learned)])


def simulate(c: Case, router: str, residency: str, options: Options | None = None, *, crowding: bool = True) -> Result:
    """One run of a router with a residency policy."""
    joint = router == "joint"
    warm = warm_utilities(c.fleet, c.quality, c.work.tokens_in, c.tokens_out, c.policy)
    choices = warm.argmax(axis=1)
    chosen: Any = routers.Fixed(choices)
    if joint:
        chosen = routers.Scored(c.quality, c.work.tokens_in, c.tokens_out, c.policy)
    if residency in ON_DEMAND:
        keeper: Any = ON_DEMAND[residency](c.order, 0)
    else:
        missed = np.eye(len(c.fleet.models)) - 1.0
        cost = c.policy.w_latency * slope_of_penalty(c.policy.latency_slo_s) if joint else 0.0
        keeper = Planned(
            (lambda i, _model: warm[i]) if joint else (lambda _i, model: missed[model]),
            [0.0] * len(c.fleet.models), c.work.arrival_s, order=c.order, choices=None if joint else choices,
            second_cost=cost, options=options or (None if joint else SEPARATE),
        )  # fmt: skip
    return Simulation(c.fleet, c.work, chosen, keeper, joint=joint, crowding=crowding).run()


def roll(c: Case, worth_s: float, price_s: float, *, known: bool) -> Result:
    """One run of the blind router with residency by rollout."""
    choices = warm_utilities(c.fleet, c.quality, c.work.tokens_in, c.tokens_out, c.policy).argmax(axis=1)
    keeper = Rollout(
        c.order, worth_s=worth_s, swap_price_s=price_s, future=(c.work.arrival_s, choices) if known else None
    )
    return Simulation(c.fleet, c.work, routers.Fixed(choices), keeper, joint=False).run()


def lighter(c: Case, share: float) -> Case:
    """The same with this share of the weight of latency."""
    return dataclasses.replace(c, policy=msgspec.structs.replace(c.policy, w_latency=share * c.policy.w_latency))


def compare(setting: Setting, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Figures of every combination, over seeds."""
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in range(arguments.seeds):
        print(f"\rseed {seed + 1} of {arguments.seeds} ", end="", file=sys.stderr, flush=True)
        c = case(setting, arguments, seed)
        best = np.nanmax(c.work.score, axis=1)

        def note(name: str, result: Result, oracle: Array = best) -> None:
            runs.setdefault(name, []).append(report.figures(result, oracle, arguments.slo))

        for router in ("blind", "joint"):
            for residency in (*ON_DEMAND, "planned"):
                note(f"{router} + {residency}", simulate(c, router, residency))
            bounds = [simulate(c, router, "foresight", options) for options in FORESIGHT]
            note(f"{router} + foresight", min(bounds, key=lambda r: float(r.latency_s.mean())))
        for worth_s, price_s in ROLLOUTS:
            note(f"blind + offline rollout, price {price_s:g} s", roll(c, worth_s, price_s, known=True))
        note("blind + online rollout", roll(c, *ROLLOUTS[0], known=False))
        for share in LIGHTER:
            note(f"joint + planned, latency x {share:g}", simulate(lighter(c, share), "joint", "planned"))
        note("blind + planned, patient", simulate(c, "blind", "planned", PATIENT))
        for name, options in ABLATIONS.items():
            note(f"joint + planned, {name}", simulate(c, "joint", "planned", options))
        note("joint + planned, no crowding", simulate(c, "joint", "planned", crowding=False))
    print("\r" + " " * 30 + "\r", end="", file=sys.stderr)
    return {name: report.over_seeds(found) for name, found in runs.items()}


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.residency", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--learn", type=Path, required=True, metavar="DIR")
    parser.add_argument("--judge", type=Path, required=True, metavar="DIR")
    parser.add_argument("--fleet", default="mmlu_pro", metavar="FILE")
    parser.add_argument("--scenario", choices=("specialists", "outcomes"), default="specialists")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--queries", type=int, default=3600)
    parser.add_argument("--rate", type=float, default=1.0, help="arrivals per second")
    parser.add_argument("--shift", type=float, default=600.0, help="seconds between two changes of the mix")
    parser.add_argument("--memory-for", type=int, default=3, help="models that the worker's memory holds")
    parser.add_argument("--w-latency", type=float, default=0.1)
    parser.add_argument("--slo", type=float, default=5.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    arguments.reference = arguments.trace = arguments.latency_budget = None
    arguments.load, arguments.trace_tokens, arguments.ablate = 0.5, False, ""
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = arguments_of(argv)
    try:
        setting = setting_of(arguments)
    except CalmError as error:
        print(f"bench.residency: {error}", file=sys.stderr)
        sys.exit(2)
    result = compare(setting, arguments)
    report.show(
        result, f"{arguments.scenario}: memory for {arguments.memory_for}, {arguments.rate}/s, {arguments.seeds} seeds"
    )
    rows = claims(result, LIGHTER)
    print_table("what is to hold", ("claim", "measured", "bound"), [[c, f"{v:.3f}", b] for c, v, b in rows])
    if arguments.json:
        write_json(arguments.json, {"benchmark": "residency", "machine": machine(), "runs": result,
                                    "claims": {c: {"measured": v, "bound": b} for c, v, b in rows}})  # fmt: skip


if __name__ == "__main__":
    main()
