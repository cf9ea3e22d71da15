"""What a real model's confidence says of its answers: 100 plain questions to the embedded model, variants compared.

`python -m bench.confidence [--variants int4,int8,fp32] [--splits 200]`. For each variant: how often it is right, and
the AUROC of the mean log-probability (0.5: it says nothing). Then, on halves that the line was not learned from
(`shared.learn.confidence`, the mean over splits): how much more often the surer half is right than all. At last the
cascade: the least sure of the first variant's answers go to the last, and the likelier of the two is given; against as
many answers handed on at random. Variants of one model err alike, so little is to be won here.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.opened import driven, open_as_engine
from bench.questions import QUESTIONS
from bench.report import machine, print_machine, print_table
from services.workers.engine.batcher import Finished, Request
from shared.learn.confidence import Confidences, Line
from shared.messages import ChatMessage, Sampling

Array = NDArray[Any]
MODEL = "smollm2-135m"
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the first variant's answers that are handed on."""


def answers(variant: str, store: Path | None) -> tuple[Array, Array]:
    """Whether each question was answered right [n], and the mean log-probability [n]; greedy, 32 tokens at most."""
    batcher = driven(open_as_engine(MODEL, variant, store, 2, context=512, slots=8), 8, 512)
    for row, (question, _) in enumerate(QUESTIONS):
        turns = [
            ChatMessage(role="system", content="You are a helpful assistant."),
            ChatMessage(role="user", content=question),
        ]
        batcher.add(Request(str(row), turns, Sampling(max_tokens=32)))
    found: dict[int, Finished] = {}
    while batcher.active:
        found |= {int(event.id): event for event in batcher.step() if isinstance(event, Finished)}
    right = [bool(re.search(QUESTIONS[i][1], found[i].text, re.IGNORECASE)) for i in range(len(QUESTIONS))]
    return np.array(right, float), np.array([found[i].mean_logprob for i in range(len(QUESTIONS))])


def auroc(right: Array, sure: Array) -> float:
    above = sure[right == 1][:, None] - sure[right == 0][None, :]
    return float((above > 0).mean() + 0.5 * (above == 0).mean())


def learned(right: Array, sure: Array) -> tuple[float, Line]:
    """Share that is right, and the line with that as the predicted quality."""
    found, quality = Confidences(["card"]), float(right.mean())
    for c in sure:
        found.heard("card", float(c))
    for row, (y, c) in enumerate(zip(right, sure, strict=True)):
        found.judged("card", quality, float(c), float(y), str(row))
    return quality, found.lines["card"]


def said(about: tuple[float, Line], sure: Array) -> Array:
    """Chances of being right."""
    return np.array([about[1].chance(about[0], float(c)) for c in sure])


def cascade(one: tuple[Array, Array], other: tuple[Array, Array], splits: int) -> Array:
    """[shares, 2]: accuracy on unseen halves where the least sure are handed on, and where as many at random are."""
    random, n = np.random.default_rng(0), len(one[0])
    total = np.zeros((len(SHARES), 2))
    for _ in range(splits):
        order = random.permutation(n)
        taught, unseen = order[: n // 2], order[n // 2 :]
        chances = [said(learned(y[taught], c[taught]), c[unseen]) for y, c in (one, other)]
        likelier = np.where(chances[1] > chances[0], other[0][unseen], one[0][unseen])
        for row, share in enumerate(SHARES):
            count = round(share * len(unseen))
            for column, first in enumerate((np.argsort(chances[0]), random.permutation(len(unseen)))):
                final = one[0][unseen].copy()
                final[first[:count]] = likelier[first[:count]]
                total[row, column] += final.mean()
    return total / splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", default="int4,int8,fp32", help="the first and the last make the cascade")
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--store", type=Path, help="model store; the user's own when left out")
    a = parser.parse_args()
    print_machine(machine())
    names = a.variants.split(",")
    found = {name: answers(name, a.store) for name in names}
    random, rows = np.random.default_rng(0), []
    for name, (right, sure) in found.items():
        surer = 0.0
        for _ in range(a.splits):
            order = random.permutation(len(right))
            taught, unseen = order[: len(right) // 2], order[len(right) // 2 :]
            chances = said(learned(right[taught], sure[taught]), sure[unseen])
            top = unseen[np.argsort(-chances)[: len(unseen) // 2]]
            surer += float(right[top].mean() - right[unseen].mean()) / a.splits
        line = learned(right, sure)[1]
        rows.append([name, float(right.mean()), auroc(right, sure), line.slope, surer])
    print_table(f"{len(QUESTIONS)} questions", ("variant", "right", "AUROC", "slope", "surer half above all"), rows)
    if len(names) > 1:
        by_share = cascade(found[names[0]], found[names[-1]], a.splits)
        print_table(
            f"{names[0]}, then {names[-1]}: accuracy on unseen halves", ("handed on", "least sure", "at random"),
            [[share, *row] for share, row in zip(SHARES, by_share.tolist(), strict=True)],
        )  # fmt: skip


if __name__ == "__main__":
    main()
