"""Bayesian linear regression of many models at once, with a component that all share.

    y = z . (w + v_m) + noise,   w ~ N(0, D0),   v_m ~ N(0, D1),   noise ~ N(0, noise_var)

`w` is how hard queries are for everybody, `v_m` what sets model m apart: the hierarchical linear model of Lindley and
Smith (1972). Given `w` the models are independent, so the exact joint posterior of k models over p features costs
k p^3 and not (k p)^3, and all that is kept of the past are sums: it can be updated one outcome at a time, forgotten by
scaling, stored in a few kilobytes, and gives the evidence by which its own prior is chosen (empirical Bayes; MacKay
1992). The first feature is the constant 1 and has prior variances of its own (the level).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Prior:
    """Standard deviations of the prior, in units of the outcome (0 to 1) per unit of feature."""

    level: float = 0.4
    """Of the level that all share."""
    own_level: float = 0.15
    """Of a model's level against it."""
    slope: float = 0.2
    own_slope: float = 0.15
    noise: float = 0.45
    """Of an outcome around its expectation: at most 0.5 for right or wrong."""

    def variances(self, features: int) -> tuple[Array, Array]:
        """Diagonals of D0 and D1, [features]."""
        shared, own = np.full(features, self.slope**2), np.full(features, self.own_slope**2)
        shared[0], own[0] = self.level**2, self.own_level**2
        return shared, own


@dataclass
class Sums:
    """What is kept of the outcomes of k models: sums over outcomes, per model."""

    zz: Array
    """[k, p, p]"""
    zy: Array
    """[k, p]"""
    yy: Array
    """[k]"""
    count: Array
    """[k]"""

    @classmethod
    def empty(cls, models: int, features: int) -> Sums:
        return cls(
            np.zeros((models, features, features)), np.zeros((models, features)), np.zeros(models), np.zeros(models)
        )

    def add(self, z: Array, model: int, y: float, weight: float = 1.0) -> None:
        """One outcome of one model; z [p]."""
        self.zz[model] += weight * np.outer(z, z)
        self.zy[model] += (weight * y) * z
        self.yy[model] += weight * y * y
        self.count[model] += weight

    def add_rows(self, z: NDArray[Any], model: NDArray[Any], y: NDArray[Any], weight: NDArray[Any]) -> None:
        """Outcomes of one model each: z [n, p], indices of models [n], y [n], weights [n]."""
        for index in np.unique(model):
            rows = model == index
            weighted = weight[rows, None] * z[rows]
            self.zz[index] += weighted.T @ z[rows]
            self.zy[index] += weighted.T @ y[rows]
        np.add.at(self.yy, model, weight * y * y)
        np.add.at(self.count, model, weight)

    def add_all(self, z: NDArray[Any], y: NDArray[Any], weight: float = 1.0) -> None:
        """Many outcomes: z [n, p], y [n, k] with NaN where a model was not asked."""
        known = ~np.isnan(y)
        filled = np.where(known, y, 0.0)
        for model in range(y.shape[1]):
            rows = z[known[:, model]]
            self.zz[model] += weight * rows.T @ rows
        self.zy += weight * filled.T @ z
        self.yy += weight * (filled**2).sum(0)
        self.count += weight * known.sum(0)

    def scale(self, model: int, keep: float) -> None:
        """Let the past of a model count `keep` (0 to 1) of what it does: it has changed."""
        for sums in (self.zz, self.zy, self.yy, self.count):
            sums[model] *= keep

    def grow(self, models: int) -> None:
        """Room for further models, of which nothing is known."""
        more = Sums.empty(models, self.zz.shape[1])
        self.zz, self.zy = np.concatenate([self.zz, more.zz]), np.concatenate([self.zy, more.zy])
        self.yy, self.count = np.concatenate([self.yy, more.yy]), np.concatenate([self.count, more.count])


@dataclass(frozen=True)
class Posterior:
    """Of the weights u_m = w + v_m."""

    mean: Array
    """[k, p]"""
    own_root: Array
    """[k, p, p]: a square root of the covariance of u_m given w."""
    shared_root: Array
    """[k, p, p]: what a deviation of w by a standard normal [p] does to u_m."""
    evidence: float
    """Logarithm of the probability of the outcomes under the prior."""
    noise_var: float

    def predict(self, z: NDArray[Any]) -> tuple[Array, Array]:
        """Mean and standard deviation of the expected outcome: z [n, p] gives [n, k] each."""
        own, shared = z @ self.own_root, z @ self.shared_root  # [k, n, p]
        return z @ self.mean.T, np.sqrt((own**2).sum(-1) + (shared**2).sum(-1)).T

    def spread(self, z: NDArray[Any]) -> tuple[Array, Array]:
        """How the expected outcomes for one query, z [p], may deviate: the standard deviation of each model's own [k],
        and what a standard normal [p], the same for all models, does to them [k, p]."""
        own, shared = (self._roots @ z).reshape(2, *self.mean.shape)
        return np.sqrt(np.einsum("kp,kp->k", own, own)), shared

    @cached_property
    def _roots(self) -> Array:
        """[2 k p, p]: both roots in the order in which one product with a query's features goes through them."""
        rows = [np.swapaxes(root, 1, 2).reshape(-1, self.mean.shape[1]) for root in (self.own_root, self.shared_root)]
        return np.ascontiguousarray(np.concatenate(rows))


def solve(sums: Sums, prior: Prior) -> Posterior:
    """The exact posterior, and the evidence."""
    models, features = sums.zy.shape
    shared_var, own_var = prior.variances(features)
    noise = prior.noise**2
    zz, zy = sums.zz / noise, sums.zy / noise
    precision = zz + np.diag(1.0 / own_var)
    factor = np.linalg.cholesky(precision)  # [k, p, p]
    inverse = np.linalg.inv(factor)
    own_cov = np.swapaxes(inverse, 1, 2) @ inverse
    gain = own_cov @ zz  # how far v_m takes up what w leaves, and the reverse
    shared_precision = np.diag(1.0 / shared_var) + (zz - zz @ gain).sum(0)
    own_b = np.einsum("kpq,kq->kp", own_cov, zy)
    rhs = (zy - np.einsum("kpq,kq->kp", zz, own_b)).sum(0)
    shared_precision = (shared_precision + shared_precision.T) / 2.0
    root = np.linalg.cholesky(shared_precision)
    shared_inverse = np.linalg.inv(root)
    shared_mean = shared_inverse.T @ (shared_inverse @ rhs)
    reach = np.eye(features) - gain
    mean = own_b + reach @ shared_mean
    logs = (
        2.0 * np.log(np.diagonal(factor, axis1=1, axis2=2)).sum() + models * np.log(own_var).sum()
        + 2.0 * np.log(np.diagonal(root)).sum() + np.log(shared_var).sum()
    )  # fmt: skip
    fit = sums.yy.sum() / noise - (zy * own_b).sum() - rhs @ shared_mean
    evidence = -0.5 * (sums.count.sum() * math.log(2.0 * math.pi * noise) + fit + logs)
    return Posterior(mean, np.swapaxes(inverse, 1, 2), reach @ shared_inverse.T, float(evidence), noise)


def choose_prior(sums: Sums, prior: Prior, believed: Prior | None = None) -> Prior:
    """The prior of a grid around `prior` under which the outcomes are most probable (one sweep by coordinates).

    With `believed`, most probable along with how far it is from that: each scale is log-normal about it, by `DOUBT`."""
    best, found = prior, solve(sums, prior).evidence - _distance(prior, believed)
    for name, factors in product(SCALES, ((0.5, 2.0), (0.7, 1.4))):
        for factor in factors:
            limits = LIMITS[name]
            value = min(max(getattr(best, name) * factor, limits[0]), limits[1])
            trial = replace(best, **{name: value})
            evidence = solve(sums, trial).evidence - _distance(trial, believed)
            if evidence > found:
                best, found = trial, evidence
    return best


def _distance(prior: Prior, believed: Prior | None) -> float:
    """What is taken from the evidence for what was believed beforehand."""
    if believed is None:
        return 0.0
    return sum(0.5 * (math.log(getattr(prior, name) / getattr(believed, name)) / DOUBT) ** 2 for name in SCALES)


SCALES = ("own_slope", "slope", "own_level", "noise")
"""Entries of the prior that the evidence moves."""
DOUBT = 0.5
"""Standard deviation of the logarithm of a scale about what is believed of it: a factor of 1.6 either way."""

LIMITS = {"own_slope": (0.02, 2.0), "slope": (0.02, 2.0), "own_level": (0.03, 0.3), "noise": (0.1, 0.5)}
"""Bounds within which the evidence may move the prior: few outcomes can speak for extremes."""
