"""Predicted quality and output length of every model for every query to judge, learned from the folder for learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.sim.data import Outcomes

Array = NDArray[Any]


@dataclass(frozen=True)
class Predictions:
    """For the models of the outcomes, in their order."""

    quality: Array
    """[judge, m]"""
    tokens_out: Array
    """[judge, m]"""
    learn_quality: Array
    """[learn, m] predicted for the queries learned from, by a model that has not seen them."""
    learn_tokens_out: Array
    """[learn, m], likewise."""


def predictions(learn: Outcomes, judge: Outcomes, features_learn: Array, features_judge: Array) -> Predictions:
    """Kernel smoothing over all neighbours, averaged with ridge regression; folds for the queries learned from."""
    quality = _mix(learn.score, features_learn, features_judge)
    tokens = _mix(np.log1p(learn.tokens_out), features_learn, features_judge)
    folds = np.arange(len(learn)) % 4
    own_quality, own_tokens = np.zeros(learn.score.shape), np.zeros(learn.score.shape)
    for fold in range(4):
        rest, mine = folds != fold, folds == fold
        own_quality[mine] = _mix(learn.score[rest], features_learn[rest], features_learn[mine])
        own_tokens[mine] = _mix(np.log1p(learn.tokens_out[rest]), features_learn[rest], features_learn[mine])
    return Predictions(quality, np.expm1(tokens), own_quality, np.expm1(own_tokens))


def _mix(target: Array, features: Array, wanted: Array) -> Array:
    mean = np.nanmean(target, axis=0)
    filled = np.where(np.isnan(target), mean, target)
    weight = np.exp((wanted @ features.T) / 0.1)
    kernel = weight @ filled / weight.sum(axis=1, keepdims=True)
    gram = features.T @ features + 10.0 * np.eye(features.shape[1])
    ridge = wanted @ np.linalg.solve(gram, features.T @ (filled - mean)) + mean
    return (kernel + ridge) / 2.0
