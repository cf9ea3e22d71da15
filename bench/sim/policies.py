"""Routing policies by name: ours and the plain ones. Each makes a `Plan` in a `Setting`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.sim import routers
from bench.sim.budget import RUNGS, Allowance, Budgeted
from bench.sim.setting import Plan, Setting, run
from services.simulator import residency as on_demand
from services.simulator.engine import Residency, Router, Workload
from services.simulator.fleet import SimFleet
from services.simulator.routers import Cascaded, Fixed, Scored
from shared.errors import DataInvalid
from shared.learn.cascade import Cascade, play
from shared.learn.cascade import Plan as CascadePlan
from shared.utility import LN2

Array = NDArray[Any]
LATENCY_MARGIN = 0.93
"""Of the latency budget: nothing holds that while it runs."""
WEIGHTS = np.geomspace(1e-3, 1e2, 48)
"""Weights of energy that are tried."""
GRID = (0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4)
"""Weights of latency that are tried."""
TUNED_ON = 3000
"""Queries of each trial."""
UNKEPT = 1.05
"""A budget that nothing keeps becomes the least that can be spent, times this: the last per cents of energy are taken
from quality at any price."""
W_LATENCY = 0.05
"""Of `calm`: a second opinion that costs seconds must promise something."""
W_LATENCY_ESCALATE = 0.1
"""Of `calm-escalate` without a latency budget."""
TYPICAL_BATCH = 4
PLAIN = ("random", "round-robin", "best-single", "category-best", "semantic", "knn", "ridge", "linucb", "oracle")
DESCRIBED_RESIDENT = 3
"""Models that "CALM as described" keeps on a worker, whatever their size."""
DESCRIBED_WEIGHTS = {"w_quality": 1.0, "w_latency": 0.1, "w_energy": 0.1}


def make(setting: Setting, name: str) -> Plan:
    """The policy of this name.

    Raises:
        DataInvalid: there is none.
    """
    kind, _, detail = name.partition(":")
    base, _, ratio = name.partition("@")
    small = setting.small
    if base == "calm":
        return _ours(setting, small, share(ratio) if ratio else None, W_LATENCY)
    if base == "calm-escalate":
        return _escalating(setting, share(ratio) if ratio else setting.budget)
    if kind == "single":
        if detail not in setting.judge.models:
            raise DataInvalid(
                f"The outcomes have no model {detail!r}.", f"They have: {', '.join(setting.judge.models)}."
            )
        return Plan((detail,), lambda w, _f, _s: Fixed(np.zeros(len(w), int)), fixed)
    if name == "calm-as-described":
        return _as_described(setting)
    if name in PLAIN:
        return _plain(setting, name)
    raise DataInvalid(
        f"There is no policy {name!r}.",
        f"Use calm, calm-escalate[@RATIO], single:MODEL, calm-as-described, {', '.join(PLAIN)}.",
    )


def fixed(work: Workload, fleet: SimFleet, seed: int) -> Residency:
    """All models resident from the start."""
    return on_demand.Fixed()


def _escalating(setting: Setting, ratio: float) -> Plan:
    """Both budgets, where a latency budget is given: the smallest weight of latency with which a simulation of the
    queries learned from keeps it."""
    models = (*setting.small, *(() if setting.reference in setting.small else (setting.reference,)))
    if setting.latency_budget is None or setting.w_latency is not None:
        return _ours(setting, models, ratio, W_LATENCY_ESCALATE)
    own = _on_own(setting)
    alone = Plan((setting.reference,), lambda w, _f, _s: Fixed(np.zeros(len(w), int)), fixed)
    base = float(run(own, alone, 0)[0].latency_s.mean())
    for weight in GRID:
        spent = spending(setting, models, weight)
        if run(own, _ours(own, models, ratio, weight, spent), 0)[0].latency_s.mean() <= (
            setting.latency_budget * LATENCY_MARGIN * base
        ):
            break
    return _ours(setting, models, ratio, weight, spent)


def _ours(
    setting: Setting, models: tuple[str, ...], ratio: float | None, usual: float, spent: Spending | None = None
) -> Plan:
    """`spent`: what prices lead to, if that has been worked out."""
    w_latency = usual if setting.w_latency is None else setting.w_latency
    if ratio is None:  # where energy costs nothing, even a rambling answer is one more voice
        setting = replace(setting, patient=None)
    own = setting.own
    cascades = "cascade" not in setting.off and setting.judge.answer is not None
    cascade = own.learned.cascade(
        setting.columns(models), compare="compare" not in setting.off, vote=_votes(setting, models)
    )
    if ratio is None:
        rung = _Rung(setting, models, cascade if cascades else None, 0.0, w_latency)
        return Plan(
            models, lambda work, _f, _s: rung.router(work), fixed, setting=own,
            notes={"w_energy": 0.0, "w_latency": w_latency},
        )  # fmt: skip
    spent = spent or spending(setting, models, w_latency)
    wanted, ratio = ratio, spent.nearest(ratio)
    allowance = _allowance(setting, models, spent.asked[int(np.abs(spent.ratios - ratio).argmin())])
    weights = [spent.weight(ratio * share) for share in RUNGS]
    rungs = [_Rung(setting, models, cascade if cascades else None, weight, w_latency) for weight in weights]

    def router(work: Workload, fleet: SimFleet, seed: int) -> Router:
        written = None if setting.trace_tokens else work.tokens_out
        return Budgeted([r.router(work) for r in rungs], RUNGS, allowance, ratio, len(work), written, work.row)

    notes = {"w_energy": spent.weight(ratio), "w_latency": w_latency, "energy_budget": wanted, "aimed_at": ratio}
    return Plan(models, router, fixed, setting=own, notes=notes)


def _votes(setting: Setting, models: tuple[str, ...]) -> bool:
    """Among small models a third opinion is a vote; the large one, asked last, has the last word."""
    return "vote" not in setting.off and all(name in setting.small for name in models)


class _Rung:
    """Ours at one price of energy: what to do about each query to judge, whatever its place in a run."""

    def __init__(
        self, setting: Setting, models: tuple[str, ...], cascade: Cascade | None, w_energy: float, w_latency: float
    ) -> None:
        c, side = setting.columns(models), setting.own.predictions
        self._weights = setting.policy(
            w_quality=1.0, w_latency=w_latency, w_energy=w_energy, energy_ref_j=_reference_j(setting)
        )
        self._tokens = np.maximum(side.tokens_out[:, c], 1.0)
        self._first: Array = side.quality[:, c]
        self._plan: CascadePlan | None = None
        if cascade is not None and setting.own.judge.answer is not None:
            self._answers = setting.own.judge.answer[:, c]
            own = _price(setting, models, self._tokens, w_energy, w_latency)
            self._plan = cascade.plan(
                side.quality[:, c], side.answers[:, c], own,
                compare="compare" not in setting.off, retry="retry" not in setting.off,
            )  # fmt: skip
            # Worth of asking a model first contains the price of doing so; scoring takes that off again, on the worker.
            self._first = self._plan.worth + own

    def router(self, work: Workload) -> Scored:
        rows, plan = work.row, self._plan
        escalate = None
        if plan is not None:
            escalate = Cascaded(lambda i, heard: plan.step(int(rows[i]), heard), self._answers[rows])
        return Scored(self._first[rows], work.tokens_in, self._tokens[rows], self._weights, escalate=escalate)


def _price(setting: Setting, models: tuple[str, ...], tokens: Array, w_energy: float, w_latency: float) -> Array:
    """[n, k] what asking each model takes, in units of score: expected joules, and seconds on an idle device."""
    built = setting.fleet(models)
    best = np.argmax(built.fits, axis=1)
    step_s = np.array([built.unit[i][w].step_s(TYPICAL_BATCH) for i, w in enumerate(best)])
    joules = np.array([built.unit[i][w].decode_j for i, w in enumerate(best)])
    late = np.log1p(tokens * step_s / setting.slo_s) * (w_latency / LN2)
    return np.asarray(w_energy * tokens * joules / _reference_j(setting) + late)


@dataclass(frozen=True)
class Spending:
    """What weights of energy lead to."""

    weights: Array
    """Ascending."""
    ratios: Array
    """Energy relative to the reference's; falling."""
    asked: tuple[Array, ...] = ()
    """[learn, k] for each: whom the plan asks."""

    def nearest(self, ratio: float) -> float:
        """The budget to aim at: `ratio`, or, where nothing keeps it, about the least that can be spent."""
        return ratio if ratio >= self.ratios.min() else float(self.ratios.min()) * UNKEPT

    def weight(self, ratio: float) -> float:
        """The least weight that spends no more than `ratio`, between those tried by interpolation."""
        falling = np.minimum.accumulate(self.ratios)
        return float(np.exp(np.interp(-ratio, -falling, np.log(self.weights))))


def spending(setting: Setting, models: tuple[str, ...], w_latency: float) -> Spending:
    """What the queries learned from, predicted by a model that has not seen them, would have cost at each of a range
    of prices."""
    columns, joules = setting.columns(models), setting.token_j(models)
    own, learn = setting.own.learned.own, setting.own.learn
    quality, answers = own.quality[:, columns], own.answers[:, columns]
    tokens = np.maximum(own.tokens_out[:, columns], 1.0)
    real = np.nan_to_num(learn.tokens_out[:, columns]) * joules
    cascade = None
    if "cascade" not in setting.off and learn.answered is not None and learn.answer is not None:
        cascade = setting.own.learned.cascade(
            columns, compare="compare" not in setting.off, vote=_votes(setting, models)
        )
    ratios, whom = [], []
    for weight in WEIGHTS:
        cost = _price(setting, models, tokens, weight, w_latency)
        if cascade is None:
            asked = np.eye(len(columns), dtype=bool)[np.argmax(quality - cost, axis=1)]
        else:
            assert learn.answered is not None
            assert learn.answer is not None
            plan = cascade.plan(
                quality, answers, cost, compare="compare" not in setting.off, retry="retry" not in setting.off
            )
            asked = play(plan, learn.answered[:, columns], learn.answer[:, columns]).asked
        ratios.append(float((asked * real).sum(axis=1).mean()) / _reference_j(setting))
        whom.append(asked)
    return Spending(WEIGHTS, np.array(ratios), tuple(whom))


def _allowance(setting: Setting, models: tuple[str, ...], asked: Array) -> Allowance:
    """What the reference alone would take; its joules a token by simulating it on the queries learned from. `asked`
    [learn, k]: whom the plan asks."""
    alone = Plan((setting.reference,), lambda w, _f, _s: Fixed(np.zeros(len(w), int)), fixed)
    on_own = _on_own(setting)
    result, work = run(on_own, alone, 0)
    token_j = float(result.energy_j.mean() / work.tokens_out.mean())
    c, r = setting.columns(models), setting.columns((setting.reference,))[0]
    ours = setting.own
    return Allowance.fit(
        setting.learned.own.tokens_out[:, r], setting.learn.tokens_out[:, r],
        ours.learned.own.tokens_out[:, c], ours.learn.tokens_out[:, c], asked, c.index(r) if r in c else -1,
        limit=np.inf if ours.limits is None else float(ours.limits[r]), token_j=token_j,
        alone=setting.predictions.tokens_out[:, r], predicted=ours.predictions.tokens_out[:, c], count=setting.count,
    )  # fmt: skip


def _on_own(setting: Setting) -> Setting:
    """The queries learned from, as models that have not seen them predict them, in place of those to judge."""
    return replace(
        setting, judge=setting.learn, learned=replace(setting.learned, judge=setting.learned.own), shift_s=0.0,
        patient=None if setting.patient is None else _on_own(setting.patient),
        count=min(len(setting.learn), TUNED_ON),
    )  # fmt: skip


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
    """Routers that look at the query alone (`bench.sim.routers`)."""
    models = setting.small

    def router(work: Workload, fleet: SimFleet, seed: int) -> Router:
        if name == "oracle":
            return Fixed(np.argmax(np.nan_to_num(work.score), axis=1))
        scores = _baseline(setting, name, models, seed)
        if name in {"random", "round-robin"}:  # these choose arrival by arrival, not by what is asked
            order = np.arange(len(work)) % len(scores)
            return Fixed(scores[order].argmax(axis=1))
        return Fixed(scores[work.row].argmax(axis=1))

    return Plan(models, router, fixed)


def _baseline(setting: Setting, name: str, models: tuple[str, ...], seed: int) -> Array:
    """[judge, k] scores of a baseline, learned on the folder for learning."""
    learn, judge = setting.learn.only(models), setting.judge.only(models)
    made: dict[str, Callable[[], routers.Router]] = {
        "random": lambda: routers.Random(seed),
        "round-robin": routers.RoundRobin,
        "best-single": routers.Single,
        "category-best": routers.CategoryBest,
        "semantic": lambda: routers.Semantic(_descriptions(setting, models)),
        "knn": routers.Knn,
        "ridge": routers.Ridge,
        "linucb": lambda: routers.LinUcb(models, setting.embeddings_learn),
    }
    router = made[name]()
    router.fit(learn, setting.embeddings_learn)
    return router.scores(judge, setting.embeddings_judge)


def _descriptions(setting: Setting, models: tuple[str, ...]) -> dict[str, Array]:
    known = {model.name: model.description or model.name for model in setting.file.models}
    return dict(zip(models, setting.embed([known[name] for name in models]), strict=True))


def _as_described(setting: Setting) -> Plan:
    """CALM as its paper describes it: likeness of query and description with live latency and energy in a weighted
    sum, a fixed number of resident models, the least recently used of which makes room."""

    def router(work: Workload, fleet: SimFleet, seed: int) -> Router:
        likeness = _baseline(setting, "semantic", setting.small, seed)
        spread = likeness.max() - likeness.min()
        tokens = np.nanmean(setting.learn.tokens_out[:, setting.columns(setting.small)], axis=0)
        weights = setting.policy(**DESCRIBED_WEIGHTS, energy_ref_j=_reference_j(setting))
        return Scored(
            (likeness[work.row] - likeness.min()) / max(float(spread), 1e-9), work.tokens_in,
            np.tile(tokens, (len(work), 1)), weights,
        )  # fmt: skip

    return Plan(setting.small, router, lambda _w, _f, _s: on_demand.Lru(None, DESCRIBED_RESIDENT))
