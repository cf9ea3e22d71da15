"""What live limits on rambling answers gain, against limits learned from recorded outcomes.

    python -m bench.sim.cutting --learn DIR --judge DIR [--models NAME,...] [--seeds 6]

The first model is the best by the router learned offline; the second best follows where nothing can be read or the
first was cut off. Live tables (`shared.learn.live_patience`) come from `--answers` answers of the models asked evenly,
of which one in five is judged; *recorded* limits from all outcomes of `--learn` (`shared.learn.patience`). Energy is in
score: a mean answer of the model with the most parameters costs `--price`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.report import print_table
from bench.sim import learned
from bench.sim.data import Outcomes, load_outcomes
from bench.sim.embed import embed
from services.simulator import fleet as fleets
from shared.errors import CalmError, DataInvalid
from shared.learn import patience
from shared.learn.kept import Heard, Kept, learned_tables
from shared.learn.quality import QualityModel

Array = NDArray[Any]
JUDGED = 0.2


def live_limits(learn: Outcomes, price: Array, answers: int, rng: np.random.Generator) -> Array:
    """Tokens [k] from answers of models asked evenly; `price` [k] of a token."""
    rows = rng.permutation(len(learn))[:answers]
    asked, judged = rng.integers(len(learn.models), size=len(rows)), rng.random(len(rows)) < JUDGED
    heard, kept = {}, {}
    for i, (row, model) in enumerate(zip(rows.tolist(), asked.tolist(), strict=True)):
        readable = learn.answered is None or bool(learn.answered[row, model])
        key = str(i), learn.models[model]
        heard[key] = Heard(b"", readable, tokens=int(learn.tokens_out[row, model]))
        if readable and judged[i]:
            kept[key] = Kept(b"", 0.0, float(learn.score[row, model]))
    tables = learned_tables(heard, kept)
    mean = np.nanmean(learn.tokens_out, axis=0) * price
    found = [
        tables[name].limit(float(price[m]), float(np.delete(mean, m).mean())) if name in tables else None
        for m, name in enumerate(learn.models)
    ]
    return np.array([np.inf if limit is None else limit for limit in found])


def recorded_limits(learn: Outcomes, own: Array, price: Array) -> Array:
    """Tokens [k]; what is to be had elsewhere is the answer of the model predicted to be the best other one."""
    rows, elsewhere = np.arange(len(learn)), np.full(learn.score.shape, np.nan)
    for m in range(len(learn.models)):
        others = np.delete(np.arange(len(learn.models)), m)
        best = others[own[:, others].argmax(1)]
        elsewhere[:, m] = learn.score[rows, best] - price[best] * learn.tokens_out[rows, best]
    return patience.limits(learn.tokens_out, learn.score, elsewhere, price)


def played(judge: Outcomes, said: Array, limits: Array, price: Array) -> tuple[float, float, float]:
    """Mean score, mean price of energy, and the share of first answers that are cut off."""
    order, rows = np.argsort(-said, axis=1), np.arange(len(judge))
    first, second = order[:, 0], order[:, 1]
    tokens = judge.tokens_out[rows, first]
    cut = tokens > limits[first]
    again = cut if judge.answered is None else cut | ~judge.answered[rows, first]
    score = np.where(again, judge.score[rows, second], judge.score[rows, first])
    spent = price[first] * np.minimum(tokens, limits[first])
    spent = spent + again * price[second] * judge.tokens_out[rows, second]
    return float(score.mean()), float(spent.mean()), float(cut.mean())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sim.cutting", description=__doc__)
    parser.add_argument("--learn", type=Path, required=True, metavar="DIR")
    parser.add_argument("--judge", type=Path, required=True, metavar="DIR")
    parser.add_argument("--fleet", default="mmlu_pro", metavar="FILE", help="says how many parameters models have")
    parser.add_argument("--models", default="mathstral-7b,phi-3-mini-4k-instruct,llama-3.1-8b-instruct")
    parser.add_argument("--answers", type=int, default=2900)
    parser.add_argument("--price", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, default=6)
    arguments = parser.parse_args(argv)
    try:
        names = arguments.models.split(",")
        size = {model.name: model.parameters_b for model in fleets.load_fleet(arguments.fleet)[0].models}
        if len(names) < 2 or not set(names) <= set(size):
            raise DataInvalid(f"No two models of the fleet file: {arguments.models}.", "Name them as it does.")
        learn, judge = (load_outcomes(folder).only(names) for folder in (arguments.learn, arguments.judge))
    except CalmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    x, wanted = (learned.features(embed(side.prompts), side, learn) for side in (learn, judge))
    offline, own = QualityModel.fit(learn.models, x, learn.score.astype(np.float64), learn.categories)
    said = offline.predict(wanted).mean
    joules = np.array([size[name] for name in names])
    largest = int(joules.argmax())
    price = arguments.price * joules / (joules[largest] * np.nanmean(learn.tokens_out[:, largest]))
    live = [live_limits(learn, price, arguments.answers, np.random.default_rng(s)) for s in range(arguments.seeds)]
    ways = {
        "nothing cut off": [np.full(len(names), np.inf)], "live tables": live,
        "recorded limits": [recorded_limits(learn, own, price)],
    }  # fmt: skip
    rows = [
        (name, *np.mean([played(judge, said, limits, price) for limits in found], axis=0).tolist())
        for name, found in ways.items()
    ]
    print_table(f"{len(judge)} queries, {len(names)} models", ("", "score", "energy", "cut off"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
