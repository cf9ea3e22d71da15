"""Accuracy against energy: ours, kNN, ridge and win-rate with escalation, and the single models.

    python -m bench.sim.frontier --learn DIR --judge DIR [--reference MODEL] [--fleet FILE] [--json FILE]

No queues here: energy is output tokens times joules per token, latency output tokens times seconds per token, both at
32 sequences from the fleet's profile and relative to always asking the reference. Every attempt counts, one after the
other. Prices are set on the folder learned from, to spend the stated share of the reference's energy there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.report import print_table, write_json
from bench.sim import learned, routers
from bench.sim.data import Outcomes, load_outcomes
from bench.sim.embed import embed
from services.simulator import fleet as fleets
from shared.errors import CalmError, DataInvalid
from shared.learn.cascade import play

Array = NDArray[Any]

BUDGETS = (0.06, 0.08, 0.1, 0.12, 0.15, 0.19, 0.23, 0.27, 0.35, 0.47, 0.6, 0.8, 1.0)
AIM = 0.97
"""Aimed at this share of the budget: prices are learned on other queries than they are judged on."""
SEQUENCES = 32
RETRY_PRICE = 0.02
"""What `calm` pays in score for the reference's whole energy: next to nothing, but not nothing."""


@dataclass(frozen=True)
class Point:
    """What a policy came to, energy and latency relative to the reference alone."""

    accuracy: float
    energy: float
    latency: float
    attempts: float = 1.0


@dataclass(frozen=True)
class Bench:
    """Two folders with the same models, unit costs, and what was learned."""

    learn: Outcomes
    judge: Outcomes
    x_learn: Array
    x_judge: Array
    learned: learned.Learned
    token_j: Array
    """[k] joules per output token."""
    token_s: Array
    small: list[int]
    reference: int
    patient: Bench | None = None
    """The same with answers cut off that ramble, in which our cascades run; None where answers cannot be read."""

    def cost(self, tokens: Array, columns: Sequence[int]) -> Array:
        """[n, len(columns)] energy of these predicted tokens, relative to the reference's mean."""
        return tokens[:, list(columns)] * self.token_j[list(columns)] / self._mean(self.learn, self.token_j)

    def point(
        self, outcomes: Outcomes, asked: Array, final: Array, columns: Sequence[int], whole: Outcomes | None = None
    ) -> Point:
        """`asked` [n, c] and `final` [n] index into `columns`; `whole` where `outcomes` have been cut off."""
        whole = whole or outcomes
        c = list(columns)
        tokens = np.nan_to_num(outcomes.tokens_out[:, c])
        rows = np.arange(len(outcomes))
        energy = (asked * tokens * self.token_j[c]).sum(1).mean() / self._mean(whole, self.token_j)
        latency = (asked * tokens * self.token_s[c]).sum(1).mean() / self._mean(whole, self.token_s)
        accuracy = float(np.nanmean(outcomes.score[:, c][rows, final]))
        return Point(accuracy, float(energy), float(latency), float(asked.sum(1).mean()))

    def _mean(self, outcomes: Outcomes, unit: Array) -> float:
        return float(np.nanmean(outcomes.tokens_out[:, self.reference]) * unit[self.reference])


def load(learn_dir: Path, judge_dir: Path, fleet: str, reference: str | None) -> Bench:
    """Read, embed and learn. Raises CalmError when something cannot be used."""
    judge = load_outcomes(judge_dir)
    learn = load_outcomes(learn_dir).only(judge.models)
    file, profile = fleets.load_fleet(fleet)
    built = fleets.build(file, profile, judge.models)
    known = {model.name: model for model in file.models}
    name = reference or max(judge.models, key=lambda m: known[m].parameters_b)
    if name not in judge.models:
        raise DataInvalid(f"The outcomes have no model {name!r}.", f"They have: {', '.join(judge.models)}.")
    units = [built.unit[i][int(np.argmax(built.fits[i]))] for i in range(len(judge.models))]
    small = [i for i, m in enumerate(judge.models) if known[m].small]
    x_learn, x_judge = embed(learn.prompts), embed(judge.prompts)
    bench = Bench(
        learn, judge, x_learn, x_judge, learned.learn(learn, judge, x_learn, x_judge),
        np.array([u.decode_j for u in units]), np.array([u.step_s(SEQUENCES) for u in units]),
        small, judge.models.index(name),
    )  # fmt: skip
    if learn.answer is None or judge.answer is None:
        return bench
    limits = learned.patience(bench.learned, small, bench.token_j, bench.reference)
    learn, judge = learn.cut_off(limits), judge.cut_off(limits)
    found = learned.learn(learn, judge, x_learn, x_judge)
    return replace(bench, patient=replace(bench, learn=learn, judge=judge, learned=found))


Policy = Callable[[float, bool], tuple[Array, Array]]
"""(price of the reference's energy in score, judge or learn side) -> asked [n, c], final [n]."""


def at_budget(
    bench: Bench, policy: Policy, columns: Sequence[int], budget: float, played: Bench | None = None
) -> Point:
    """The policy at the price with which it spends `budget` on the queries learned from, judged. `played`: what it runs
    in, where answers are cut off."""
    own = played or bench
    low, high = 1e-3, 1e2
    if bench.point(own.learn, *policy(low, False), columns, bench.learn).energy <= budget * AIM:
        high = low
    for _ in range(24 if high > low else 0):
        price = float(np.sqrt(low * high))
        spent = bench.point(own.learn, *policy(price, False), columns, bench.learn).energy
        low, high = (price, high) if spent > budget * AIM else (low, price)
    return bench.point(own.judge, *policy(high, True), columns, bench.judge)


def by_scores(bench: Bench, own: Array, judged: Array, columns: Sequence[int]) -> Policy:
    """Route once, by predicted score less the price of predicted energy; scores [n, c]."""

    def policy(price: float, judge: bool) -> tuple[Array, Array]:
        side = bench.learned.judge if judge else bench.learned.own
        choice = ((judged if judge else own) - price * bench.cost(side.tokens_out, columns)).argmax(1)
        return np.eye(len(columns), dtype=bool)[choice], choice

    return policy


def ours(bench: Bench, columns: Sequence[int], *, compare: bool, retry: bool, vote: bool = False) -> Policy:
    """Ours; with neither, it routes once, and no answer is cut off."""
    whole, bench = bench, played_in(bench, compare or retry)
    cascade = bench.learned.cascade(columns, compare=compare, vote=vote)

    def policy(price: float, judge: bool) -> tuple[Array, Array]:
        outcomes, side = (bench.judge, bench.learned.judge) if judge else (bench.learn, bench.learned.own)
        cost = price * whole.cost(side.tokens_out, columns)
        plan = learned.plan_for(cascade, side, columns, cost, compare=compare, retry=retry)
        c = list(columns)
        answered = np.ones((len(outcomes), len(c)), bool) if outcomes.answered is None else outcomes.answered[:, c]
        played = play(plan, answered, None if outcomes.answer is None else outcomes.answer[:, c])
        return played.asked, played.final

    return policy


def played_in(bench: Bench, cascades: bool) -> Bench:
    """Answers are cut off where another model may be asked afterwards."""
    return bench.patient or bench if cascades else bench


def folded(bench: Bench, make: Callable[[], routers.Router], columns: Sequence[int]) -> tuple[Array, Array]:
    """A baseline's scores for the folder learned from (in four folds) and for the one to judge, [n, c] each."""
    learn, judge = bench.learn.only([bench.learn.models[c] for c in columns]), bench.judge
    own = np.zeros((len(learn), len(columns)))
    part = np.arange(len(learn)) % 4
    for fold in range(4):
        router = make()
        router.fit(learn.take(part != fold), bench.x_learn[part != fold])
        own[part == fold] = router.scores(learn.take(part == fold), bench.x_learn[part == fold])
    router = make()
    router.fit(learn, bench.x_learn)
    return own, router.scores(judge, bench.x_judge)


def area(points: Sequence[Point], low: float = 0.06, high: float = 1.0) -> float:
    """Mean accuracy over energy from `low` to `high` (logarithmic) of the best that costs no more."""
    grid = np.geomspace(low, high, 200)
    best = [max((p.accuracy for p in points if p.energy <= e * 1.0001), default=0.0) for e in grid]
    return float(np.mean(best))


def curves(bench: Bench, budgets: Sequence[float] = BUDGETS) -> dict[str, list[Point]]:
    """Every policy at every budget."""
    columns = [*bench.small, *([] if bench.reference in bench.small else [bench.reference])]
    strong = bench.learn.models[bench.reference]
    makers: dict[str, Callable[[], routers.Router]] = {
        "knn": routers.Knn, "ridge": routers.Ridge, "win-rate": lambda: routers.WinRate(strong),
    }  # fmt: skip
    policies = {name: by_scores(bench, *folded(bench, make, columns), columns) for name, make in makers.items()}
    policies["calm, one answer"] = ours(bench, columns, compare=False, retry=False)
    policies["calm, retry"] = ours(bench, columns, compare=False, retry=True)
    policies["calm-escalate"] = ours(bench, columns, compare=True, retry=True)
    cascades = {name: played_in(bench, name in ("calm, retry", "calm-escalate")) for name in policies}
    return {n: [at_budget(bench, p, columns, b, cascades[n]) for b in budgets] for n, p in policies.items()}


def small_only(bench: Bench) -> dict[str, Point]:
    """Small models alone: one answer each, and ours with what can be seen at run time."""
    columns = bench.small
    learn = bench.learn.only([bench.learn.models[c] for c in columns])
    judge = bench.judge.only(learn.models)
    result: dict[str, Point] = {}
    plain: list[routers.Router] = [
        routers.Random(), routers.RoundRobin(), routers.Single(), routers.CategoryBest(), routers.Knn(),
        routers.Ridge(), routers.Calm(),
    ]  # fmt: skip
    for router in plain:
        router.fit(learn, bench.x_learn)
        choice = router.scores(judge, bench.x_judge).argmax(1)
        result[router.name] = bench.point(bench.judge, np.eye(len(columns), dtype=bool)[choice], choice, columns)
    for name, compare, vote in (
        ("calm, retry", False, False), ("calm, retry and second opinion", True, False),
        ("calm, retry, second opinion and vote", True, True),
    ):  # fmt: skip
        policy = ours(replace(bench, patient=None), columns, compare=compare, retry=True, vote=vote)
        result[name] = bench.point(bench.judge, *policy(RETRY_PRICE, True), columns)
    choice = np.nan_to_num(judge.score).argmax(1)
    result["oracle"] = bench.point(bench.judge, np.eye(len(columns), dtype=bool)[choice], choice, columns)
    return result


def singles(bench: Bench) -> dict[str, Point]:
    every = range(len(bench.judge.models))
    eye = np.eye(len(bench.judge.models), dtype=bool)
    n = len(bench.judge)
    return {
        name: bench.point(bench.judge, np.tile(eye[i], (n, 1)), np.full(n, i), every)
        for i, name in enumerate(bench.judge.models)
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sim.frontier", description=__doc__)
    parser.add_argument("--learn", type=Path, required=True, metavar="DIR")
    parser.add_argument("--judge", type=Path, required=True, metavar="DIR")
    parser.add_argument("--reference", metavar="MODEL", help="the largest model of the fleet when left out")
    parser.add_argument("--fleet", default="mmlu_pro", metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    try:
        bench = load(arguments.learn, arguments.judge, arguments.fleet, arguments.reference)
    except CalmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    alone, small, lines = singles(bench), small_only(bench), curves(bench)
    areas = {name: area(points) for name, points in lines.items()} | {"single models": area(list(alone.values()))}
    reference = bench.judge.models[bench.reference]
    columns = ("", "accuracy", "energy", "latency", "attempts")
    for title, rows in (("Single models", alone), ("Small models only", small)):
        print_table(title, columns, [(n, p.accuracy, p.energy, p.latency, p.attempts) for n, p in rows.items()])
    for name, points in lines.items():
        print_table(
            f"{name}: with escalation to {reference}", ("budget", *columns[1:]),
            [(str(b), p.accuracy, p.energy, p.latency, p.attempts) for b, p in zip(BUDGETS, points, strict=True)],
        )  # fmt: skip
    print_table("Area under accuracy over log energy, 0.06 to 1", ("", "area"), areas.items())
    print(f"Energy and latency are modelled and relative to {reference} alone; accuracy is recorded.")
    if arguments.json:
        plain: dict[str, Any] = {
            "benchmark": "frontier", "reference": reference, "areas": areas,
            "singles": {n: vars(p) for n, p in alone.items()}, "small": {n: vars(p) for n, p in small.items()},
            "curves": {
                n: [{"budget": b, **vars(p)} for b, p in zip(BUDGETS, ps, strict=True)] for n, ps in lines.items()
            },
        }  # fmt: skip
        write_json(arguments.json, plain)
    return 0


if __name__ == "__main__":
    sys.exit(main())
