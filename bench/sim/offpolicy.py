"""Estimates a changed policy from logged decisions, against its simulated truth.

    python -m bench.sim.offpolicy --learn DIR --judge DIR [--queries 3000] [--seeds 10] [--json FILE]

The logging policy is Thompson sampling, with a floor under every model's chance, on what was learned from 600 outcomes
of its own choices; every decision is logged with its propensity. Two candidates are estimated: the same knowledge with
another objective (energy weighs in), and another router altogether (the one that learned offline from all of
`--learn`). The latter is estimated once more from a log in which it serves half of the queries itself, as when a
candidate is tried on a part of the traffic. Their truth is what they would earn on the very queries logged. The
predictions that doubly robust estimates use are made from the log alone, each by a fit that has not seen the query.
Those called `recorded` know the outcomes of `--learn` as well, as where a candidate was learned from recorded outcomes:
`pooled` learns from both together, `recorded` is the mean of what the log says and what the model learned offline says
(the latter alone is too hopeful of a candidate that was chosen by it), and `imputed` takes from the recorded outcomes
how much a model's reward on a query says of the other models' rewards there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
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
from shared.learn.topics import Topics

Array = NDArray[Any]
FLOOR = 0.02
"""Of the candidates, and of the logging policy unless another is given."""
OUTCOMES = 600
W_ENERGY = 0.05
"""Of the changed objective: score given up for the energy of a mean answer."""
FOLDS = 5
CANDIDATES = ("changed objective", "another router", "another router, tried on half")


def taught(models: Sequence[str], x: Array, score: Array, rng: np.random.Generator) -> QualityModel:
    """What is known after `OUTCOMES` outcomes of its own choices."""
    model = QualityModel.start(models, x)
    for row in rng.permutation(len(x))[:OUTCOMES].tolist():
        choice = bandit.choose(distributions(model, x[row][None], rng)[0], rng.random())
        model.update(x[row], choice.model, float(score[row, choice.model]))
    return model


def distributions(
    model: QualityModel, x: Array, rng: np.random.Generator, floor: float = 0.0, cost: Array | float = 0.0
) -> Array:
    """[n, k] chances with which each model is chosen."""
    found = []
    for row in x:
        spread = model.spread(row)
        normal = rng.standard_normal(spread.shape(bandit.DRAWS))
        found.append(bandit.distribution(model.expected_one(row) - cost, spread, normal, floor=floor))
    return np.stack(found)


def serve(present: Array, score: Array, rng: np.random.Generator) -> offpolicy.Logged:
    """Choose by these chances [n, k] and log."""
    chosen = [bandit.choose(row, rng.random()) for row in present]
    models = np.array([c.model for c in chosen])
    return offpolicy.Logged(models, np.array([c.propensity for c in chosen]), score[np.arange(len(score)), models])


def predicted(
    topics: Topics, k: int, x: Array, logged: offpolicy.Logged, recorded: tuple[Array, Array] | None = None
) -> Array:
    """[n, k] expected rewards, learned from the log in folds, by these topics; with `recorded` features and scores
    of other queries as well."""
    z = topics.encode(x)
    seen = np.full((len(x), k), np.nan)
    seen[np.arange(len(x)), logged.chosen] = logged.reward
    result = np.zeros((len(x), k))
    fold = np.arange(len(x)) % FOLDS
    for f in range(FOLDS):
        sums = hierarchy.Sums.empty(k, z.shape[1])
        sums.add_all(z[fold != f], seen[fold != f])
        if recorded is not None:
            sums.add_all(topics.encode(recorded[0]), recorded[1])
        result[fold == f] = hierarchy.solve(sums, hierarchy.Prior()).predict(z[fold == f])[0]
    return result


def compare(learn: Outcomes, judge: Outcomes, joules: Array, queries: int, seeds: int, floor: float) -> dict[str, Any]:
    """Estimates and truth over seeds; `joules` [k] are those of a mean answer."""
    x = learned.features(embed(learn.prompts), learn, learn)
    served = learned.features(embed(judge.prompts), judge, learn)
    offline, own = QualityModel.fit(learn.models, x, learn.score.astype(np.float64), learn.categories)
    known, score = np.nan_to_num(learn.score).astype(float), np.nan_to_num(judge.score).astype(float)
    k = score.shape[1]
    said = offline.predict(served).mean
    best, kin = said.argmax(1), offpolicy.kinship(learn.score.astype(np.float64) - own)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CANDIDATES}
    for seed in range(seeds):
        print(f"\rseed {seed + 1} of {seeds}   ", end="", file=sys.stderr, flush=True)
        rng = np.random.default_rng(seed)
        rows = np.concatenate([rng.permutation(len(judge)) for _ in range(-(-queries // len(judge)))])[:queries]
        model = taught(learn.models, x, known, rng)
        present = distributions(model, served[rows], rng, floor)
        other = 0.05 / k + 0.95 * np.eye(k)[best[rows]]
        changed = distributions(model, served[rows], rng, FLOOR, W_ENERGY * joules / joules.mean())
        policies = ((present, changed), (present, other), ((present + other) / 2.0, other))
        for name, (serving, candidate) in zip(CANDIDATES, policies, strict=True):
            logged = serve(serving, score[rows], rng)
            # The topics of what was learned offline: the categories are known, the rewards are the log's alone.
            guess = predicted(offline.topics, k, served[rows], logged)
            pooled = predicted(offline.topics, k, served[rows], logged, (x, learn.score.astype(np.float64)))
            informed = (guess + said[rows]) / 2.0
            truth = float((candidate * score[rows]).sum(1).mean())
            found = {
                "ips": offpolicy.ips(logged, candidate),
                "snips": offpolicy.snips(logged, candidate),
                "doubly robust": offpolicy.doubly_robust(logged, candidate, guess),
                "shrunk": offpolicy.shrunk(logged, candidate, guess),
                "shrunk, pooled": offpolicy.shrunk(logged, candidate, pooled),
                "shrunk, recorded": offpolicy.shrunk(logged, candidate, informed),
                "imputed, recorded": offpolicy.imputed(logged, candidate, informed, kin),
            }
            verdict = offpolicy.judge(logged, candidate, serving, guess)
            runs[name].append({
                "seed": seed, "truth": truth, "logging": float((serving * score[rows]).sum(1).mean()),
                "error": {n: abs(e.value / truth - 1.0) for n, e in found.items()},
                "held": {n: bool(e.low <= truth <= e.high) for n, e in found.items()},
                "effective": verdict.gain.effective, "promoted": verdict.promote,
            })  # fmt: skip
    print("\r" + " " * 30 + "\r", end="", file=sys.stderr)
    return {"benchmark": "offpolicy", "queries": queries, "floor": floor, "candidates": runs}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sim.offpolicy", description=__doc__)
    parser.add_argument("--learn", type=Path, required=True, metavar="DIR")
    parser.add_argument("--judge", type=Path, required=True, metavar="DIR")
    parser.add_argument("--fleet", default="mmlu_pro", metavar="FILE", help="says which models are small")
    parser.add_argument("--queries", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--floor", type=float, default=FLOOR, help="least chance of any model in the logging policy")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    try:
        judge = load_outcomes(arguments.judge)
        small = {model.name for model in fleets.load_fleet(arguments.fleet)[0].models if model.small}
        judge = judge.only([m for m in judge.models if m in small])
        learn = load_outcomes(arguments.learn).only(judge.models)
        built = fleets.build(*fleets.load_fleet(arguments.fleet), judge.models)
        token_j = np.array([built.unit[i][int(np.argmax(f))].decode_j for i, f in enumerate(built.fits)])
        joules = np.nanmean(learn.tokens_out, axis=0) * token_j
        result = compare(learn, judge, joules, arguments.queries, arguments.seeds, arguments.floor)
    except CalmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, runs in result["candidates"].items():
        rows = []
        for how in runs[0]["error"]:
            errors = [run["error"][how] for run in runs]
            within = float(np.mean([error <= 0.03 for error in errors]))
            held = float(np.mean([run["held"][how] for run in runs]))
            rows.append((how, float(np.mean(errors)), max(errors), within, held))
        print_table(
            f"{name}: {arguments.queries} logged queries, {arguments.seeds} seeds",
            ("", "mean relative error", "largest", "within 3 %", "truth in interval"), rows,
        )  # fmt: skip
        better = [run["truth"] > run["logging"] for run in runs]
        promoted = [run["promoted"] for run in runs]
        print(f"better than the logging policy in {sum(better)} seeds, promoted in {sum(promoted)}")
    if arguments.json:
        write_json(arguments.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
