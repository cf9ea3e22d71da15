"""Estimates a changed policy from logged decisions, against its simulated truth.

    python -m bench.sim.offpolicy --learn DIR --judge DIR [--queries 3000] [--seeds 10] [--json FILE]

The logging policy explores (Thompson sampling with a floor under every model's chance) while it learns from what it
sees; every decision is logged with its propensity. The candidate is the router that learned offline from `--learn`,
with a little exploration of its own; its truth is what it really earns on the very queries logged. The predictions that
the doubly robust estimate uses are made from the log alone, each by a fit that has not seen the query.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.report import print_table, write_json
from bench.sim import learned
from bench.sim.data import Outcomes, load_outcomes
from bench.sim.embed import embed
from services.simulator import fleet as fleets
from shared.errors import CalmError
from shared.learn import bandit, hierarchy, offpolicy
from shared.learn.quality import QualityModel

Array = NDArray[Any]
FLOOR = 0.02
FOLDS = 5


def log(
    model: QualityModel, x: Array, score: Array, rows: Array, rng: np.random.Generator
) -> tuple[offpolicy.Logged, Array]:
    """Serve the queries at `rows`, learning from every outcome; the log, and the distributions [n, k] chosen from."""
    chosen, propensity, reward, distributions = [], [], [], []
    for row in rows.tolist():
        probabilities = bandit.distribution(model, x[row], rng.standard_normal(bandit.shape_of(model)), floor=FLOOR)
        choice = bandit.choose(probabilities, rng.random())
        model.update(x[row], choice.model, float(score[row, choice.model]))
        chosen.append(choice.model)
        propensity.append(choice.propensity)
        reward.append(float(score[row, choice.model]))
        distributions.append(choice.distribution)
    return offpolicy.Logged(np.array(chosen), np.array(propensity), np.array(reward)), np.stack(distributions)


def predicted(model: QualityModel, x: Array, logged: offpolicy.Logged) -> Array:
    """[n, k] expected rewards, learned from the log in folds."""
    z = model.topics.encode(x)
    k = len(model.models)
    seen = np.full((len(x), k), np.nan)
    seen[np.arange(len(x)), logged.chosen] = logged.reward
    result = np.zeros((len(x), k))
    fold = np.arange(len(x)) % FOLDS
    for f in range(FOLDS):
        sums = hierarchy.Sums.empty(k, z.shape[1])
        sums.add_all(z[fold != f], seen[fold != f])
        result[fold == f] = hierarchy.solve(sums, hierarchy.Prior()).predict(z[fold == f])[0]
    return result


def compare(learn: Outcomes, judge: Outcomes, queries: int, seeds: int) -> dict[str, Any]:
    """Estimates and truth over seeds, and how often a better policy is promoted and a worse one is not."""
    x = learned.features(embed(learn.prompts), learn, learn)
    served = learned.features(embed(judge.prompts), judge, learn)
    offline, _ = QualityModel.fit(learn.models, x, learn.score.astype(np.float64), learn.categories)
    score = np.nan_to_num(judge.score).astype(float)
    k = score.shape[1]
    best = offline.predict(served).mean.argmax(1)
    rows_of: list[dict[str, Any]] = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        rows = np.concatenate([rng.permutation(len(judge)) for _ in range(-(-queries // len(judge)))])[:queries]
        model = QualityModel.start(learn.models, x)
        logged, present = log(model, served, score, rows, rng)
        candidate = 0.05 / k + 0.95 * np.eye(k)[best[rows]]
        guess = predicted(model, served[rows], logged)
        truth = float((candidate * score[rows]).sum(1).mean())
        found = {
            "ips": offpolicy.ips(logged, candidate),
            "snips": offpolicy.snips(logged, candidate),
            "doubly robust": offpolicy.doubly_robust(logged, candidate, guess),
        }
        worse = np.full((len(rows), k), 1.0 / k)
        rows_of.append({
            "seed": seed, "truth": truth, "logging": float(logged.reward.mean()),
            **{name: e.value for name, e in found.items()},
            "covered": {name: bool(e.low <= truth <= e.high) for name, e in found.items()},
            "promoted": offpolicy.judge(logged, candidate, present, guess).promote,
            "worse_promoted": offpolicy.judge(logged, worse, present, guess).promote,
        })  # fmt: skip
    names = ("ips", "snips", "doubly robust")
    errors = {name: [abs(r[name] / r["truth"] - 1.0) for r in rows_of] for name in names}
    return {
        "benchmark": "offpolicy", "queries": queries, "seeds": rows_of,
        "relative_error": {name: {"mean": float(np.mean(e)), "max": float(np.max(e))} for name, e in errors.items()},
        "coverage": {name: float(np.mean([r["covered"][name] for r in rows_of])) for name in names},
        "promoted": float(np.mean([r["promoted"] for r in rows_of])),
        "worse_promoted": float(np.mean([r["worse_promoted"] for r in rows_of])),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sim.offpolicy", description=__doc__)
    parser.add_argument("--learn", type=Path, required=True, metavar="DIR")
    parser.add_argument("--judge", type=Path, required=True, metavar="DIR")
    parser.add_argument("--fleet", default="mmlu_pro", metavar="FILE", help="says which models are small")
    parser.add_argument("--queries", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    try:
        judge = load_outcomes(arguments.judge)
        small = {model.name for model in fleets.load_fleet(arguments.fleet)[0].models if model.small}
        judge = judge.only([m for m in judge.models if m in small])
        result = compare(load_outcomes(arguments.learn).only(judge.models), judge, arguments.queries, arguments.seeds)
    except CalmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(
        f"A changed policy from {arguments.queries} logged queries, {arguments.seeds} seeds",
        ("", "mean relative error", "largest", "truth in interval"),
        [(n, e["mean"], e["max"], result["coverage"][n]) for n, e in result["relative_error"].items()],
    )
    print(f"promoted {result['promoted']:.0%}; a random policy promoted {result['worse_promoted']:.0%}")
    if arguments.json:
        write_json(arguments.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
