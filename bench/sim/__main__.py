"""Simulates routing policies on recorded outcomes and arrivals, in virtual time.

    python -m bench.sim --learn DIR --judge DIR [--trace FILE] [--fleet FILE] [--policy NAME,...] [--seeds N]
                        [--reference MODEL] [--energy-budget RATIO,...] [--json FILE] [--plot FILE]

Quality and length are learned on `--learn` and judged on `--judge` (formats: bench/sim/data.py). Latency and energy are
modelled from output lengths and the fleet's hardware profile. Ratios are against the model given by `--reference`
running alone on its own pool under the same arrivals. `calm` uses small models only; `calm-escalate` may also use the
reference, within `--energy-budget` of its energy (several give the frontier) and `--latency-budget` of its latency.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import machine, write_json
from bench.sim import policies as named
from bench.sim import report
from bench.sim.data import Outcomes, load_outcomes, load_trace
from bench.sim.embed import embed
from bench.sim.learned import learn as learn_from
from bench.sim.learned import patience
from bench.sim.setting import Setting, run
from services.simulator import fleet as fleets
from shared.errors import CalmError, DataInvalid

DEFAULT = "calm,calm-escalate,calm-as-described,best-single,category-best,knn,ridge,semantic,random,round-robin,oracle"
REFERENCE_LOAD = 0.5
DEFAULT_LATENCY_BUDGET = 0.45
"""Of the reference's latency; not with an energy budget of one's own, which may leave no room for it."""
OVER = 1.02
"""A budget times this has not been kept."""


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.sim", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--learn", type=Path, required=True, metavar="DIR", help="outcomes to learn from")
    parser.add_argument("--judge", type=Path, required=True, metavar="DIR", help="outcomes to judge on")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="arrivals (Azure format); Poisson without it")
    parser.add_argument("--trace-tokens", action="store_true", help="take token counts from the trace, too")
    parser.add_argument("--fleet", default="mmlu_pro", metavar="FILE")
    parser.add_argument("--policy", default=DEFAULT, metavar="NAME,...")
    parser.add_argument("--reference", metavar="MODEL", help="the largest model of the fleet when left out")
    parser.add_argument("--energy-budget", metavar="RATIO,...", help="of the reference's, for calm-escalate (0.19)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    parser.add_argument("--queries", type=int, metavar="N", help="queries in each run; each judged one once by default")
    parser.add_argument(
        "--load", type=float, default=REFERENCE_LOAD, help="arrivals, as a share of the reference's capacity"
    )
    parser.add_argument("--rate", type=float, metavar="Q/S", help="arrivals per second, instead of --load")
    parser.add_argument("--slo", type=float, default=5.0, metavar="S", help="objective for a query's latency")
    parser.add_argument("--latency-budget", type=float, metavar="RATIO", help="of the reference's, for calm-escalate")
    parser.add_argument(
        "--w-latency", type=float, help="weight of latency in the utility; each policy's own by default"
    )
    parser.add_argument(
        "--ablate", default="", metavar="NAME,...", help="switch off: retry, compare, vote, patience, crowding"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG")
    return parser.parse_args(argv)


def setting_of(arguments: argparse.Namespace) -> Setting:
    """Read and learn.

    Raises:
        CalmError: a file cannot be used, or the reference is not in the outcomes.
    """
    judge = load_outcomes(arguments.judge)
    learn = load_outcomes(arguments.learn).only(judge.models)
    file, profile = fleets.load_fleet(arguments.fleet)
    known = {model.name: model for model in file.models}
    built = fleets.build(file, profile, judge.models)  # raises for models that the file lacks
    reference = arguments.reference or max(judge.models, key=lambda name: known[name].parameters_b)
    if reference not in judge.models:
        raise DataInvalid(f"The outcomes have no model {reference!r}.", f"They have: {', '.join(judge.models)}.")
    small = tuple(name for name in judge.models if known[name].small)
    if not small:
        raise DataInvalid("The fleet has no small model.", "Set `small = true` for some of the fleet file's models.")
    embeddings_learn, embeddings_judge = embed(learn.prompts), embed(judge.prompts)
    rate = arguments.rate or arguments.load * capacity_per_s(built, judge, reference)
    setting = Setting(
        learn=learn, judge=judge, embeddings_learn=embeddings_learn, embeddings_judge=embeddings_judge,
        learned=learn_from(learn, judge, embeddings_learn, embeddings_judge),
        embed=embed, file=file, profile=profile,
        reference=reference, small=small, rate_per_s=rate, count=arguments.queries or len(judge),
        slo_s=arguments.slo,
        w_latency=arguments.w_latency,
        latency_budget=arguments.latency_budget, trace=load_trace(arguments.trace) if arguments.trace else None,
        trace_tokens=arguments.trace_tokens, off=frozenset(filter(None, arguments.ablate.split(","))),
    )  # fmt: skip
    cascades = learn.answer is not None and judge.answer is not None and not setting.off & {"cascade", "retry"}
    if arguments.trace_tokens or not cascades or "patience" in setting.off:
        return setting
    return replace(setting, patient=patient(setting))


def patient(setting: Setting) -> Setting:
    """The same setting where answers that ramble are cut off, learned anew."""
    token_j = setting.token_j(setting.judge.models)
    limits = patience(
        setting.learned, setting.columns(setting.small), token_j, setting.judge.models.index(setting.reference)
    )
    learn, judge = setting.learn.cut_off(limits), setting.judge.cut_off(limits)
    found = learn_from(learn, judge, setting.embeddings_learn, setting.embeddings_judge)
    return replace(setting, learn=learn, judge=judge, learned=found, limits=limits)


def capacity_per_s(fleet: fleets.SimFleet, outcomes: Outcomes, model: str) -> float:
    """Queries per second that a model's pool can serve with all slots in use."""
    index = fleet.names.index(model)
    worker = int(np.argmax(fleet.fits[index]))
    unit, slots = fleet.unit[index][worker], fleet.models[index].slots
    tokens = float(np.nanmean(outcomes.tokens_out[:, outcomes.models.index(model)]))
    service = unit.prefill_s * float(outcomes.tokens_in.mean()) * slots + unit.step_s(slots) * tokens
    return slots / service * float(fleet.fits[index].sum())


def simulate(setting: Setting, names: list[str], seeds: int) -> dict[str, dict[str, Any]]:
    """Run every policy and the reference on every seed; figures by policy, ratios included."""
    result: dict[str, dict[str, Any]] = {}
    alone = f"single:{setting.reference}"
    base: list[dict[str, float]] = []
    for name in [alone, *(n for n in names if n != alone)]:
        plan = named.make(setting, name)
        runs = []
        for seed in range(seeds):
            print(f"\r{name}: seed {seed + 1} of {seeds}   ", end="", file=sys.stderr, flush=True)
            outcome, work = run(setting, plan, seed)
            best = np.nanmax(setting.judge.score[work.row][:, setting.columns(plan.models)], axis=1)
            found = report.figures(outcome, best, setting.slo_s)
            if name == alone:
                base.append(found)
            found["energy_ratio"] = found["energy_j_mean"] / base[seed]["energy_j_mean"]
            found["latency_ratio"] = found["latency_s_mean"] / base[seed]["latency_s_mean"]
            runs.append(found)
        result[name] = {**report.over_seeds(runs), **plan.notes}
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    return result


def unkept(result: dict[str, dict[str, Any]]) -> list[str]:
    """What is to be said of energy budgets that were not kept."""
    lines = []
    for name, found in result.items():
        budget = found.get("energy_budget", math.inf)
        if found.get("aimed_at", budget) > budget:
            lines.append(
                f"{name}: no choice of models keeps {budget:.2f} of the reference's energy; {found['aimed_at']:.2f}, "
                "about the least, was aimed at."
            )
        elif found["energy_ratio"] > budget * OVER:
            lines.append(
                f"{name}: {found['energy_ratio']:.2f} of the reference's energy is above its budget of {budget:.2f}: "
                "the fleet does not keep it at this load (the fewer sequences at once, the more joules a token)."
            )
    return lines


def main(argv: list[str] | None = None) -> None:
    arguments = arguments_of(argv)
    try:
        setting = setting_of(arguments)
        names = [name.strip() for name in arguments.policy.split(",") if name.strip()]
        budgets = [b for b in (arguments.energy_budget or "").split(",") if b]
        if budgets and "calm-escalate" in names:
            at = names.index("calm-escalate")
            names[at : at + 1] = ["calm-escalate", *(f"calm-escalate@{b}" for b in budgets)]
            if len(budgets) == 1:
                names.remove(f"calm-escalate@{budgets[0]}")
                setting = replace(setting, budget=named.share(budgets[0]))
        if not budgets and setting.latency_budget is None:
            setting = replace(setting, latency_budget=DEFAULT_LATENCY_BUDGET)
        result = simulate(setting, names, arguments.seeds)
    except CalmError as error:
        print(f"bench.sim: {error}", file=sys.stderr)
        sys.exit(2)
    report.show(result, f"{setting.count} queries at {setting.rate_per_s:.2f}/s, reference {setting.reference}")
    for line in unkept(result):
        print(line)
    print("Latency and energy are modelled from output lengths and the profile; accuracy is recorded.")
    if arguments.json:
        write_json(arguments.json, {
            "benchmark": "sim", "machine": machine(), "reference": setting.reference, "rate_per_s": setting.rate_per_s,
            "queries": setting.count, "seeds": arguments.seeds, "fleet": setting.file.fleet.name, "policies": result,
        })  # fmt: skip
    if arguments.plot:
        report.plot(arguments.plot, result, f"reference {setting.reference}")


if __name__ == "__main__":
    main()
