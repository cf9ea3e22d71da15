"""Weights on trial beside those in force: what they would choose, and how a trial begins and ends. Pure.

A share of the queries is routed by them, so that their choices have been taken and what came of them is on record;
propensities stay exact, since a choice is drawn once, from the mixture of both policies.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec
import numpy as np

from services.planner.decide import objectives
from services.planner.decide.scoring import Array
from shared import messages as m
from shared.errors import InvalidObjective
from shared.utility import utility

_NAMES = tuple(objectives.WEIGHTS)


def begin(now: m.Trial | None, asked: m.Control, at: float) -> m.Trial:
    """The trial that `asked` (`try`) means.

    Raises:
        InvalidObjective: no weight is given, something else than weights is, or all three are nought.
    """
    given = objectives.given_in(asked.objectives)
    if other := sorted(given.keys() - set(_NAMES)):
        raise InvalidObjective(
            f"`{other[0]}` cannot be on trial: only weights can.",
            f"Give {', '.join(_NAMES)}; what another objective would do `calm replay` simulates.",
        )
    if not given:
        raise InvalidObjective("No weights to try are given.", f"Give one of {', '.join(_NAMES)}.")
    objectives.check_weights(asked.objectives)
    version = (now.version if now else 0) + 1
    return m.Trial(version=version, share=asked.share, at=at, by=asked.by, **given)


def meant(now: m.Trial | None, asked: m.Control) -> m.Trial:
    """The trial in force, which `asked` (`promote` or `drop`) means.

    Raises:
        InvalidObjective: there is none, or it is another one.
    """
    if now is None or now.ended:
        raise InvalidObjective("No weights are on trial.", "Begin one: calm policy try --w-latency 0.3 --share 0.1")
    if asked.trial not in (0, now.version):
        raise InvalidObjective(
            f"Trial {asked.trial} is over: trial {now.version} is in force.", "Look at it: calm policy judge"
        )
    return now


def promoted(now: m.InForce | None, trial: m.Trial, asked: m.Control, cards: Collection[str], at: float) -> m.InForce:
    """The objectives in force once the weights on trial are taken over; the others stay.

    Raises:
        InvalidObjective: as `objectives.change`.
    """
    wanted = m.Control(
        action="promote",
        objectives=msgspec.structs.replace(m.Objectives(), **objectives.weights_in(trial)),
        by=asked.by,
    )
    return objectives.change(now, wanted, cards, at)


def utilities(standing: Sequence[m.Candidate], weights: Mapping[str, float], tried: Mapping[str, float]) -> Array:
    """[k] utility of each candidate by the weights `tried` (as `weights_of` gives them), on the worker that those in
    force chose for it. Crowding is delay to others and goes with the weight of latency; the burden of a load stays as
    it was priced."""
    by_latency = tried["w_l"] / weights["w_l"] if weights["w_l"] > 0.0 else 0.0
    return np.array([
        utility(c.quality, c.latency_s, c.energy_j, tried)
        + by_latency * c.terms.get("u_crowding", 0.0)
        + c.terms.get("u_burden", 0.0)
        for c in standing
    ])  # fmt: skip


def mixture(present: Array, candidate: Array, share: float) -> Array:
    """[k] probabilities when `share` (0 to 1) of the queries is routed by the candidate's."""
    return np.asarray((1.0 - share) * present + share * candidate)
