"""Routing policies by name: ours and the plain ones. Each makes a `Plan` in a `Setting`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.sim.setting import Plan, Setting
from services.simulator import residency as on_demand
from services.simulator.engine import Residency, Router, Workload
from services.simulator.fleet import SimFleet
from services.simulator.routers import Fixed, Scored
from shared.errors import DataInvalid

Array = NDArray[Any]
BUDGET_MARGIN = 0.97
"""The energy budget is aimed at with this much to spare: it is learned on other queries than it is judged on."""
W_LATENCY = 0.01
"""Enough to choose between near-equals by their queues, too little to cost accuracy."""
PLAIN = ("random", "round-robin", "best-single", "category-best", "oracle")


def make(setting: Setting, name: str) -> Plan:
    """The policy of this name.

    Raises:
        DataInvalid: there is none.
    """
    kind, _, detail = name.partition(":")
    base, _, ratio = name.partition("@")
    small = setting.small
    if base == "calm":
        return _ours(setting, small, 0.0 if not ratio else price(setting, small, share(ratio)))
    if base == "calm-escalate":
        models = (*small, *(() if setting.reference in small else (setting.reference,)))
        return _ours(setting, models, price(setting, models, share(ratio) if ratio else setting.budget))
    if kind == "single":
        if detail not in setting.judge.models:
            raise DataInvalid(
                f"The outcomes have no model {detail!r}.", f"They have: {', '.join(setting.judge.models)}."
            )
        return Plan((detail,), lambda w, _f, _s: Fixed(np.zeros(len(w), int)), fixed)
    if name in PLAIN:
        return _plain(setting, name)
    raise DataInvalid(
        f"There is no policy {name!r}.",
        f"Use calm, calm-escalate[@RATIO], single:MODEL, {', '.join(PLAIN)}.",
    )


def fixed(work: Workload, fleet: SimFleet, seed: int) -> Residency:
    """All models resident from the start."""
    return on_demand.Fixed()


def _ours(setting: Setting, models: tuple[str, ...], w_energy: float) -> Plan:
    columns = setting.columns(models)
    weights = setting.policy(w_quality=1.0, w_latency=W_LATENCY, w_energy=w_energy, energy_ref_j=_reference_j(setting))
    p = setting.predictions

    def router(work: Workload, fleet: SimFleet, seed: int) -> Router:
        quality, tokens = p.quality[work.row][:, columns], np.maximum(p.tokens_out[work.row][:, columns], 1.0)
        again = None
        if work.answered is not None and "retry" not in setting.off:
            worth = quality - w_energy * tokens * setting.token_j(models) / weights.energy_ref_j
            again = _retry(worth, work.answered)
        return Scored(quality, work.tokens_in, tokens, weights, escalate=again)

    return Plan(models, router, fixed, notes={"w_energy": w_energy})


def _retry(worth: Array, answered: Array) -> Callable[[int, int, int], int]:
    """An answer that could not be read is worth nothing: the next best model is asked, once."""
    good: list[list[bool]] = answered.tolist()
    order: list[list[int]] = np.argsort(-worth, axis=1).tolist()
    values: list[list[float]] = worth.tolist()

    def after(i: int, model: int, attempt: int) -> int:
        if good[i][model] or attempt > 1:
            return -1
        other = next((o for o in order[i] if o != model), -1)
        return other if other >= 0 and values[i][other] > 0.0 else -1

    return after


def price(setting: Setting, models: tuple[str, ...], ratio: float) -> float:
    """The weight of energy with which the queries learned from, predicted by a model that has not seen them, would
    have cost `ratio` of the reference's energy: bisection on a logarithmic scale."""
    columns, joules = setting.columns(models), setting.token_j(models)
    p, learn = setting.predictions, setting.learn
    quality = p.learn_quality[:, columns]
    expected = np.maximum(p.learn_tokens_out[:, columns], 1.0) * joules / _reference_j(setting)
    real = np.nan_to_num(learn.tokens_out[:, columns]) * joules
    rows = np.arange(len(learn))
    answered = None if learn.answered is None or "retry" in setting.off else learn.answered[:, columns]

    def spent(weight: float) -> float:
        worth = quality - weight * expected
        choice = np.argmax(worth, axis=1)
        total = real[rows, choice]
        if answered is not None:
            worth[rows, choice] = -np.inf
            second = np.argmax(worth, axis=1)
            again = ~answered[rows, choice] & (worth[rows, second] > 0.0)
            total = total + np.where(again, real[rows, second], 0.0)
        return float(total.mean())

    target = ratio * BUDGET_MARGIN * _reference_j(setting)
    if spent(0.0) <= target:
        return 0.0
    low, high = 1e-4, 1e3
    for _ in range(50):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if spent(middle) > target else (low, middle)
    return high


def _reference_j(setting: Setting) -> float:
    """Mean joules of the reference model on the queries learned from."""
    column = setting.learn.models.index(setting.reference)
    return float(np.nanmean(setting.learn.tokens_out[:, column]) * setting.token_j((setting.reference,))[0])


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value <= 0.0:
        raise DataInvalid(f"{text!r} is no share of the reference's energy.", "Write a number above 0, such as 0.19.")
    return value


def _plain(setting: Setting, name: str) -> Plan:
    models = setting.small
    columns = setting.columns(models)

    def router(work: Workload, fleet: SimFleet, seed: int) -> Router:
        n, k = len(work), len(models)
        if name == "random":
            return Fixed(np.random.default_rng(seed).integers(0, k, n))
        if name == "round-robin":
            return Fixed(np.arange(n) % k)
        learned = np.nanmean(setting.learn.score[:, columns], axis=0)
        if name == "best-single":
            return Fixed(np.full(n, int(np.argmax(learned))))
        if name == "oracle":
            return Fixed(np.argmax(np.nan_to_num(work.score), axis=1))
        best = {None: int(np.argmax(learned))}
        categories = np.array([c or "" for c in setting.learn.categories])
        for category in set(categories):
            best[category] = int(np.argmax(np.nanmean(setting.learn.score[categories == category][:, columns], axis=0)))
        return Fixed(np.array([best.get(setting.judge.categories[r] or "", best[None]) for r in work.row]))

    return Plan(models, router, fixed)
