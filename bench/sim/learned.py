"""What our models learn from one outcomes folder and say about another.

learned = learn(load_outcomes(a), load_outcomes(b), embed(a.prompts), embed(b.prompts))
learned.judge.quality      # [judge, k]: expected score of every model
plan = plan_for(learned.cascade(columns), learned.judge, columns, cost)   # whom to ask first and next
limits = patience(learned, small, token_price)      # tokens after which an answer is cut off
learned = learn(learn.cut_off(limits), judge.cut_off(limits), ...)         # and what that comes to
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.sim.data import Outcomes
from shared.learn import features as text
from shared.learn import patience as patiently
from shared.learn.cascade import Cascade, Plan
from shared.learn.length import LengthModel
from shared.learn.quality import QualityModel

Array = NDArray[Any]


@dataclass(frozen=True)
class Side:
    """Predictions for n queries, [n, k] each."""

    quality: Array
    answers: Array
    """Chance that an answer can be read."""
    tokens_out: Array


@dataclass(frozen=True)
class Learned:
    """Predictions for the folder to judge, and for the folder learned from by models that have not seen the query."""

    learn: Outcomes
    own: Side
    judge: Side
    quality_std: Array
    """[judge, k], of the expectation."""

    def cascade(self, columns: Sequence[int], *, compare: bool = True, vote: bool = False) -> Cascade:
        """Chances after what can be heard from these models; `vote`: a third opinion is a vote and no last word."""
        c, outcomes = list(columns), self.learn
        return Cascade.fit(
            self.own.quality[:, c], outcomes.score[:, c].astype(np.float64),
            None if outcomes.answered is None else outcomes.answered[:, c],
            None if outcomes.answer is None or not compare else outcomes.answer[:, c],
            vote=vote,
        )  # fmt: skip


def features(embeddings: Array, outcomes: Outcomes, like: Outcomes) -> Array:
    """[n, d]: embeddings beside facts about the text, standardised as they are among the prompts of `like`."""
    reference = text.forms(like.prompts).astype(np.float64)
    own = reference if outcomes is like else text.forms(outcomes.prompts).astype(np.float64)
    scaled = (own - reference.mean(0)) / np.maximum(reference.std(0), 1e-6)
    return np.hstack([embeddings, np.clip(scaled, -5.0, 5.0) * text.FORM_WEIGHT])


def learn(learn: Outcomes, judge: Outcomes, embeddings_learn: Array, embeddings_judge: Array) -> Learned:
    """Fit quality, readability and length on `learn` and predict for `judge`; models in the order of `learn`."""
    x, wanted = features(embeddings_learn, learn, learn), features(embeddings_judge, judge, learn)
    quality, own_quality = QualityModel.fit(learn.models, x, learn.score.astype(np.float64), learn.categories)
    length, own_tokens = LengthModel.fit(learn.models, x, learn.tokens_out.astype(np.float64), learn.categories)
    shape = (len(judge), len(learn.models))
    answers, own_answers = np.ones(shape), np.ones(learn.score.shape)
    if learn.answered is not None:
        known = np.where(np.isnan(learn.score), np.nan, learn.answered.astype(np.float64))
        readable, own = QualityModel.fit(learn.models, x, known, learn.categories)
        answers, own_answers = np.clip(readable.predict(wanted).mean, 0.0, 1.0), np.clip(own, 0.0, 1.0)
    said = quality.predict(wanted)
    return Learned(
        learn,
        Side(own_quality, own_answers, own_tokens),
        Side(said.mean, answers, length.predict(wanted).mean),
        said.std,
    )


PATIENCE_PRICE = 0.3
"""In score, of the energy that the reference's mean answer takes: what a token costs when limits are set. About what
that energy buys at budgets of a quarter to a half. With llama-3.1-70b at 0.47 of its energy 0, 0.1 and 0.3 gave 0.574,
0.583 and 0.585 on six halves, and nothing cut off 0.564."""


def patience(learned: Learned, small: Sequence[int], token_j: Array, reference: int) -> Array:
    """Tokens [k] after which an answer is cut off (`shared.learn.patience`), by the folder learned from. What is to be
    had elsewhere is the answer of that other small model which was predicted to be best. `token_j` [k]."""
    learn, own = learned.learn, learned.own
    price = token_j * (PATIENCE_PRICE / float(np.nanmean(learn.tokens_out[:, reference]) * token_j[reference]))
    rows = np.arange(len(learn))
    elsewhere = np.full(learn.score.shape, np.nan)
    for m in range(len(learn.models)):
        if others := [c for c in small if c != m]:
            best = np.array(others)[own.quality[:, others].argmax(1)]
            elsewhere[:, m] = learn.score[rows, best] - price[best] * own.tokens_out[rows, best]
    return patiently.limits(learn.tokens_out, learn.score, elsewhere, price)


def plan_for(
    cascade: Cascade, side: Side, columns: Sequence[int], cost: Array, *, compare: bool = True, retry: bool = True
) -> Plan:
    """The plan over the models at `columns`; `cost` [n, len(columns)] in units of score."""
    c = list(columns)
    return cascade.plan(side.quality[:, c], side.answers[:, c], cost, compare=compare, retry=retry)
