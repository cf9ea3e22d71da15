"""`calm policy judge`: what weights on trial would make of quality, latency and energy, and whether that is certain."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.errors import InvalidObjective
from shared.learn import trial as core

AT_ONCE = 1000
"""Decisions asked for at a time."""


async def judged(bus: Bus, state: m.ControlState, most_lost: float) -> tuple[m.Trial, core.Report]:
    """The trial in force and what is known of it; `most_lost`: of quality, see `shared.learn.trial.report`.

    Raises:
        InvalidObjective: nothing is on trial.
        BusUnavailable: the knowledge base does not answer.
    """
    trial = state.trial
    if trial is None:
        raise InvalidObjective("No weights are on trial.", "Begin one: calm policy try --w-latency 0.3 --share 0.1")
    rows: list[m.TrialRow] = []
    more, after = True, trial.at
    while more:
        request = m.KnowledgeRequest(id=str(trial.version), limit=AT_ONCE, after=after)
        part = await bus.ask(subjects.knowledge("trial"), request, m.TrialRows, 30.0)
        rows += part.rows
        more = part.more
        after = rows[-1].at if rows else after
    return trial, core.report(*arrays(rows), most_lost=most_lost)


def arrays(rows: list[m.TrialRow]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Arguments of `report`."""
    number: dict[str, int] = {}
    cards = np.array(
        [[number.setdefault(card, len(number)) for card in (r.chosen, r.present, r.candidate)] for r in rows], np.int64
    )
    came = np.array([[r.score, r.latency_s, r.energy_j] for r in rows], np.float64)
    return (
        cards.reshape(-1, 3), np.array([r.propensity for r in rows], np.float64),
        np.array([r.predicted for r in rows], np.float64).reshape(-1, 3, 3), came.reshape(-1, 3),
    )  # fmt: skip


def described(trial: m.Trial, weights: dict[str, float]) -> str:
    """The trial in one line. `weights` are those in force, for what the trial leaves."""
    own = ", ".join(
        f"{name} {(weights.get(short, 0.0) if value is None else value):.3g}"
        for name, short, value in (
            ("quality", "w_q", trial.w_quality), ("latency", "w_l", trial.w_latency), ("energy", "w_e", trial.w_energy)
        )
    )  # fmt: skip
    return f"trial {trial.version}: {own}, on {trial.share:.0%} of the queries" + (
        "" if trial.share else " (only noted, nothing is routed by it)"
    )


def render(trial: m.Trial, found: core.Report) -> str:
    """The report as text."""
    lines = [f"trial {trial.version}: {found.decisions} decisions, another card by it in {found.differ:.0%} of them"]
    if found.decisions:
        lines.append(f"  {'':10}{'in force':>10}{'on trial':>10}{'difference':>12}{'95 %':>20}{'known':>8}{'taken':>8}")
    for f in found.figures if found.decisions else ():
        if f.known < 2:
            lines.append(f"  {f.name:10}  known of {f.known} decisions")
            continue
        d = f.difference
        lines.append(
            f"  {f.name:10}{f.present.value:10.3f}{f.candidate.value:10.3f}{d.value:+12.3f}"
            f"{f'{d.low:+.3f} to {d.high:+.3f}':>20}{f.known:8}{f.taken:8.0f}"
        )
    verdict = "may be promoted" if found.promote else "not to be promoted yet"
    return "\n".join([*lines, f"{verdict}: {found.reason}"])


def as_json(trial: m.Trial, found: core.Report) -> str:
    """The report for programs."""
    return codec.to_json({"trial": trial, "report": found}).decode()
