"""Learning from nothing: only the chosen model's outcome is seen, and only now and then.

    python -m bench.sim.online --learn DIR --judge DIR [--queries 3000] [--feedback 0.2] [--seeds 10] [--json FILE]

Queries come from `--learn` in random order; nothing of them is known beforehand. `calm` is what the running system
learns with (`shared.learn.live`): topics are made from the queries seen so far, and made anew as more have come.
Accuracy at a mark is that of the best guess at that time on all of `--judge`; regret is against the router that learned
offline from everything in `--learn`, on the queries as they came. Bands are two standard errors.

`calm` also sees, as a running system does, whether an answer could be read at all and how long it is: of every answer,
judged or not (where the outcomes say it). `calm, judged only` sees nothing but the chosen model's outcome on the judged
share. `calm, cards` begins at what the cards promise (`quality` in the fleet file), where all promise something.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bench.report import print_table, write_json
from bench.sim import learned, routers
from bench.sim.data import Outcomes, load_outcomes
from bench.sim.embed import embed
from services.simulator import fleet as fleets
from shared.errors import CalmError
from shared.learn import bandit, features
from shared.learn.live import Learner as Live
from shared.learn.live import first_quality
from shared.learn.quality import QualityModel
from shared.learn.readable import ReadableQuality

Array = NDArray[Any]
MARKS = (100, 200, 500, 1000, 1500, 2000, 2500, 3000, 4000, 5000)


class Learner(Protocol):
    def choose(self, row: int) -> int:
        """The model for the query of this row of the folder learned from."""

    def heard(self, row: int, model: int, readable: bool, tokens: int) -> None:
        """An answer came: whether it could be read, and its length. Told of every answer where the outcomes say it."""

    def observe(self, row: int, model: int, score: float) -> None:
        """An answer was judged."""

    def best(self) -> Array:
        """[judge]: the best guess for every query to judge."""


class Deaf:
    """Makes nothing of an answer that is not judged."""

    def heard(self, row: int, model: int, readable: bool, tokens: int) -> None:
        pass


class Calm:
    """Ours: what the running system learns with (`shared.learn.live`), and top-two Thompson sampling over it."""

    def __init__(
        self,
        models: tuple[str, ...],
        x: Array,
        judge: Array,
        rng: np.random.Generator,
        *,
        hears: bool,
        promised: Array | None = None,
        explore: float = 1.0,
    ) -> None:
        """`hears`: learn from signs of answers; `promised` [k]: by the cards, for a readable answer; `explore`: as in
        the fleet's policy, the largest chance of not choosing the best guess."""
        self._x, self._judge, self._rng, self._hears = x, judge, rng, hears
        self._names, self._explore = models, explore
        self._learner = Live(models)
        self._column = [self._learner.cards.index(model) for model in models]
        self._promised = np.zeros(len(models))
        if promised is not None:
            self._promised[self._column] = promised
        self._asked = 0

    def choose(self, row: int) -> int:
        self._asked += 1
        if (first := self._learner.seen(self._x[row])) is not None:
            self._learner.begin(first_quality(self._learner.cards, first, len(features.FORM)))
        model = self._known()
        if model is None:  # too few queries to make topics from: any of the models
            return int(self._rng.integers(len(self._names)))
        x = self._x[row]
        mean, spread = model.predict(x[None, :], self._promised[None, :]).mean[0], model.spread(x, self._promised)
        normal = self._rng.standard_normal(spread.shape(bandit.DRAWS))
        chances = bandit.distribution(mean, spread, normal, budget=self._explore, duel=bandit.DUEL)
        return self._column.index(bandit.choose(chances, self._rng.random()).model)

    def heard(self, row: int, model: int, readable: bool, tokens: int) -> None:
        if self._hears:
            self._learner.heard(self._names[model], self._x[row], readable, str(self._asked), tokens)

    def observe(self, row: int, model: int, score: float) -> None:
        promised = float(self._promised[self._column[model]])
        self._learner.judged(self._names[model], self._x[row], promised, score, str(self._asked))

    def best(self) -> Array:
        model = self._known()
        if model is None:
            return self._rng.integers(len(self._names), size=len(self._judge))
        said = model.predict(self._judge, np.tile(self._promised, (len(self._judge), 1))).mean
        return np.asarray(said[:, self._column].argmax(1))

    def _known(self) -> QualityModel | ReadableQuality | None:
        quality, readable = self._learner.quality, self._learner.readable
        if quality is None or readable is None or not self._hears:
            return quality
        return ReadableQuality(readable, quality)


class LinUcb(Deaf):
    def __init__(self, models: tuple[str, ...], x: Array, judge: Array) -> None:
        self._router, self._x, self._judge = routers.LinUcb(models, x), x, judge

    def choose(self, row: int) -> int:
        return self._router.choose(self._x[row])

    def observe(self, row: int, model: int, score: float) -> None:
        self._router.observe(self._x[row], model, score)

    def best(self) -> Array:
        return np.asarray(self._router.means(self._judge).argmax(1))


class Levels(Deaf):
    """UCB1 on the models' levels alone (Auer et al. 2002): what is to be had without looking at the query."""

    def __init__(self, models: int, judge: int) -> None:
        self._sum, self._count, self._judge = np.zeros(models), np.zeros(models), judge

    def choose(self, row: int) -> int:
        if (self._count == 0).any():
            return int(self._count.argmin())
        width = np.sqrt(0.5 * np.log(self._count.sum()) / self._count)
        return int((self._sum / self._count + width).argmax())

    def observe(self, row: int, model: int, score: float) -> None:
        self._sum[model] += score
        self._count[model] += 1

    def best(self) -> Array:
        return np.full(self._judge, int((self._sum / np.maximum(self._count, 1)).argmax()))


class Blind(Deaf):
    """Chooses at random and learns nothing."""

    def __init__(self, models: int, judge: int, rng: np.random.Generator) -> None:
        self._models, self._judge, self._rng = models, judge, rng

    def choose(self, row: int) -> int:
        return int(self._rng.integers(self._models))

    def observe(self, row: int, model: int, score: float) -> None:
        pass

    def best(self) -> Array:
        return self._rng.integers(self._models, size=self._judge)


def run(
    learner: Learner,
    score: Array,
    judge: Array,
    queries: int,
    feedback: float,
    rng: np.random.Generator,
    answered: Array | None = None,
    tokens: Array | None = None,
) -> tuple[dict[int, float], Array, Array]:
    """Accuracy on `judge` at the marks, the scores got [queries], and the rows asked [queries]."""
    rows = np.concatenate([rng.permutation(len(score)) for _ in range(-(-queries // len(score)))])[:queries]
    got, at = np.zeros(queries), {}
    everyone = np.arange(len(judge))
    for t, row in enumerate(rows.tolist()):
        model = learner.choose(row)
        got[t] = score[row, model]
        if answered is not None:
            length = 0 if tokens is None else int(np.nan_to_num(tokens[row, model]))
            learner.heard(row, model, bool(answered[row, model]), length)
        if rng.random() < feedback:
            learner.observe(row, model, float(score[row, model]))
        if t + 1 in MARKS or t + 1 == queries:
            at[t + 1] = float(judge[everyone, learner.best()].mean())
    return at, got, rows


def compare(
    learn: Outcomes, judge: Outcomes, queries: int, feedback: float, seeds: int, promised: Array | None = None
) -> dict[str, Any]:
    """All learners over all seeds; `promised` [k] by the models' cards."""
    e_learn, e_judge = embed(learn.prompts), embed(judge.prompts)
    x, wanted = learned.features(e_learn, learn, learn), learned.features(e_judge, judge, learn)
    seen, asked_of = (np.hstack([e, features.forms(side.prompts)]) for e, side in ((e_learn, learn), (e_judge, judge)))
    score, truth = np.nan_to_num(learn.score).astype(float), np.nan_to_num(judge.score).astype(float)
    offline, own = QualityModel.fit(learn.models, x, learn.score.astype(np.float64), learn.categories)
    rows = np.arange(len(judge))
    offline_accuracy = float(truth[rows, offline.predict(wanted).mean.argmax(1)].mean())
    reached = score[np.arange(len(learn)), own.argmax(1)]
    k = len(learn.models)
    hears = learn.answered is not None
    makers: dict[str, Callable[[np.random.Generator], Learner]] = {
        "calm": lambda rng: Calm(learn.models, seen, asked_of, rng, hears=hears),
        "calm, judged only": lambda rng: Calm(learn.models, seen, asked_of, rng, hears=False),
        "linucb": lambda _: LinUcb(learn.models, e_learn, e_judge),
        "ucb on levels": lambda _: Levels(k, len(judge)),
        "random": lambda rng: Blind(k, len(judge), rng),
    }
    if promised is not None:
        makers["calm, cards"] = lambda rng: Calm(learn.models, seen, asked_of, rng, hears=hears, promised=promised)
    policies: dict[str, Any] = {}
    for name, make in makers.items():
        accuracy: list[dict[int, float]] = []
        regrets: list[list[float]] = []
        for seed in range(seeds):
            print(f"\r{name}: seed {seed + 1} of {seeds}   ", end="", file=sys.stderr, flush=True)
            rng = np.random.default_rng(seed)
            at, got, asked = run(make(rng), score, truth, queries, feedback, rng, learn.answered, learn.tokens_out)
            accuracy.append(at)
            lost = np.cumsum(reached[asked] - got)
            regrets.append([float(lost[mark - 1]) for mark in at])
        marks = list(accuracy[0])
        values, losses = np.array([[a[m] for m in marks] for a in accuracy]), np.array(regrets)
        policies[name] = {
            "queries": marks, "accuracy": values.mean(0).tolist(), "accuracy_band": _band(values),
            "regret": losses.mean(0).tolist(), "regret_band": _band(losses),
        }  # fmt: skip
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    return {
        "benchmark": "online", "feedback": feedback, "seeds": seeds, "offline_accuracy": offline_accuracy,
        "best_single": float(truth[:, int(np.nanmean(learn.score, axis=0).argmax())].mean()), "policies": policies,
        "gap": offline_accuracy - policies["calm"]["accuracy"][-1],
        "gap_judged_only": offline_accuracy - policies["calm, judged only"]["accuracy"][-1],
        "gap_cards": offline_accuracy - policies["calm, cards"]["accuracy"][-1] if promised is not None else None,
    }  # fmt: skip


def _band(values: Array) -> list[float]:
    return (2.0 * values.std(0, ddof=1) / np.sqrt(len(values))).tolist() if len(values) > 1 else [0.0] * values.shape[1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sim.online", description=__doc__)
    parser.add_argument("--learn", type=Path, required=True, metavar="DIR")
    parser.add_argument("--judge", type=Path, required=True, metavar="DIR")
    parser.add_argument("--fleet", default="mmlu_pro", metavar="FILE", help="says which models are small")
    parser.add_argument("--queries", type=int, default=3000)
    parser.add_argument("--feedback", type=float, default=0.2, help="share of queries of which the outcome is seen")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    try:
        judge = load_outcomes(arguments.judge)
        small = {model.name: model.quality for model in fleets.load_fleet(arguments.fleet)[0].models if model.small}
        judge = judge.only([m for m in judge.models if m in small])
        learn = load_outcomes(arguments.learn).only(judge.models)
        cards = [quality for m in judge.models if (quality := small[m]) is not None]
        promised = np.array(cards) if len(cards) == len(judge.models) else None
        result = compare(learn, judge, arguments.queries, arguments.feedback, arguments.seeds, promised)
    except CalmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for what, digits in (("accuracy", 4), ("regret", 0)):
        marks = result["policies"]["calm"]["queries"]
        print_table(
            f"{what} after so many queries, and band", ("", *map(str, marks)),
            [
                (name, *(f"{v:.{digits}f}±{b:.{digits}f}" for v, b in zip(p[what], p[f"{what}_band"], strict=True)))
                for name, p in result["policies"].items()
            ],
        )  # fmt: skip
    print(
        f"\noffline {result['offline_accuracy']:.4f}, best single {result['best_single']:.4f}, "
        f"gap {result['gap']:.4f}, by judged answers only {result['gap_judged_only']:.4f}"
        + (f", from what cards promise {result['gap_cards']:.4f}" if promised is not None else "")
    )
    if arguments.json:
        write_json(arguments.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
