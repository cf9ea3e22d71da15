"""`calm policy show|set|reset`: the objectives that the fleet is to hold, changed while it runs; and
`try|judge|promote|drop`: weights on trial beside those in force."""

from __future__ import annotations

import argparse
import getpass
import time

import msgspec
import nats.errors

from services.cli import trial
from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.errors import BusUnavailable, InvalidObjective
from shared.settings import Settings

FLAGS = {
    "p95": "latency_p95_s",
    "energy": "energy_j_per_query",
    "energy_per_hour": "energy_j_per_hour",
    "min_quality": "min_quality_ratio",
    "reference": "reference",
    "w_quality": "w_quality",
    "w_latency": "w_latency",
    "w_energy": "w_energy",
}
"""Objective by command-line option."""


async def policy(arguments: argparse.Namespace, settings: Settings) -> int:
    """Ask `calm.control`, and print how things stand after it."""
    request = request_of(arguments)
    bus = await Bus.connect(settings, "calm-policy", wait=False)
    try:
        if arguments.action in ("judge", "promote"):
            found = await trial.judged(bus, await _ask(bus, m.Control()), arguments.most_quality_lost)
            if arguments.action == "judge":
                print(trial.as_json(*found) if arguments.json else trial.render(*found))
                return 0
            if not found[1].promote and not arguments.force:
                raise InvalidObjective(
                    f"Trial {found[0].version} is not to be promoted yet: {found[1].reason}.",
                    "Look at it with `calm policy judge`, or promote it all the same with --force.",
                )
            request = msgspec.structs.replace(request, trial=found[0].version)
        state = await _ask(bus, request)
    finally:
        await bus.close()
    print(codec.to_json(state).decode() if arguments.json else render(state, time.time()))
    return 0


async def _ask(bus: Bus, request: m.Control) -> m.ControlState:
    try:
        reply = await bus.nc.request(subjects.CONTROL, codec.to_json(request), timeout=5)
    except nats.errors.NoRespondersError:
        raise BusUnavailable("No planner is running on this NATS server.", "Start the system: calm up") from None
    except TimeoutError:
        raise BusUnavailable("No reply within 5 s.", "See `calm status`.") from None
    state = codec.from_json(reply.data, m.ControlState | m.Failure)  # type: ignore[arg-type]
    if isinstance(state, m.Failure):
        raise codec.error_of(state)
    return state


def request_of(arguments: argparse.Namespace) -> m.Control:
    """The message that the command line means.

    Raises:
        InvalidObjective: a value out of range.
    """
    if arguments.action == "judge":
        return m.Control()
    if arguments.action not in ("set", "try"):
        return m.Control(action=arguments.action, by=_who())
    given = {name: value for flag, name in FLAGS.items() if (value := getattr(arguments, flag, None)) is not None}
    clear = [FLAGS.get(name.replace("-", "_"), name) for name in getattr(arguments, "clear", [])]
    try:
        share = msgspec.convert({"share": getattr(arguments, "share", 0.0)}, m.Control).share
        wanted = msgspec.convert(given, m.Objectives)
    except msgspec.ValidationError as error:
        text, _, at = str(error).partition(" - at ")
        raise InvalidObjective(f"{at.strip('`').removeprefix('$.')}: {text}.", "Give a value in that range.") from None
    return m.Control(action=arguments.action, objectives=wanted, clear=clear, share=share, by=_who())


def render(state: m.ControlState, now: float) -> str:
    """The state as text."""
    o = state.objectives
    lines = [
        f"{name} {value:g}{unit}"
        for name, value, unit in (
            ("95th percentile of latency at most", o.latency_p95_s, " s"),
            ("mean energy of a query at most", o.energy_j_per_query, " J"),
            ("energy of an hour at most", o.energy_j_per_hour, " J"),
            (f"quality at least, relative to {o.reference}:", o.min_quality_ratio, ""),
            ("weight of quality", o.w_quality, ""),
            ("weight of latency", o.w_latency, ""),
            ("weight of energy", o.w_energy, ""),
        )
        if value is not None
    ]
    head = "objectives"
    if state.version:
        by = f" by {state.changed_by}" if state.changed_by else ""
        head += f" (version {state.version}, changed {_ago(now - state.changed_at)}{by})"
    result = [head, *(f"  {line}" for line in lines or ["none: the fleet file's own weights stand"]), weights(state)]
    if state.controller:
        result.append(f"  moved {_ago(now - state.moved_at)} by {state.controller}")
        figures = [
            text
            for value, text in (
                (state.latency_p95_s, f"p95 {state.latency_p95_s or 0.0:.2f} s"),
                (state.energy_j_mean, f"{state.energy_j_mean or 0.0:.1f} J a query"),
                (state.energy_j_per_hour, f"{state.energy_j_per_hour or 0.0:.0f} J an hour"),
            )
            if value is not None
        ]
        result.append(f"  over the last {state.count} queries: {', '.join(figures) or 'nothing has ended yet'}")
    if state.trial is not None:
        result.append(f"on {trial.described(state.trial, state.weights)}, since {_ago(now - state.trial.at)}")
    if state.infeasible:
        result.append(f"  cannot be held by this fleet now: {', '.join(state.infeasible)}; ease it, or add workers")
    return "\n".join(result)


def weights(state: m.ControlState) -> str:
    """One line with the weights in use."""
    w = state.weights
    if not w:
        return "weights: not known yet"
    return (
        f"weights: quality {w['w_q']:.3g}, latency {w['w_l']:.3g} (scale {w['latency_slo_s']:g} s),"
        f" energy {w['w_e']:.3g} (scale {w['energy_ref_j']:.3g} J)"
    )


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0.0):.0f} s ago"


def _who() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""
