"""Changing the objectives at run time: validation, and what the planners make of them. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any, Literal

import msgspec

from shared import messages as m
from shared.errors import InvalidObjective

WEIGHTS = {"w_quality": "w_q", "w_latency": "w_l", "w_energy": "w_e"}
_NAMES = m.Objectives.__struct_fields__


def change(now: m.InForce | None, asked: m.Control, cards: Collection[str], at: float) -> m.InForce:
    """The objectives after a `set`, a `reset` or a `promote` (of which `asked` has the weights).

    Raises:
        InvalidObjective: a name that is unknown, a reference that the fleet lacks, or nothing to change.
    """
    version = (now.version if now else 0) + 1
    if asked.action == "reset":
        return m.InForce(objectives=m.Objectives(), version=version, action="reset", at=at, by=asked.by)
    for name in asked.clear:
        if name not in _NAMES:
            near = difflib.get_close_matches(name, _NAMES, 1, 0.5)
            hint = f"Did you mean `{near[0]}`?" if near else f"There are: {', '.join(_NAMES)}."
            raise InvalidObjective(f"There is no objective `{name}` to clear.", hint)
    given = given_in(asked.objectives)
    if not given and not asked.clear:
        raise InvalidObjective(
            "Nothing is to be changed.", f"Give one of: {', '.join(_NAMES)}; or `clear`, or `reset`."
        )
    if both := sorted(given.keys() & set(asked.clear)):
        raise InvalidObjective(f"`{both[0]}` is both set and cleared.", "Do one of the two.")
    objectives = now.objectives if now else m.Objectives()
    objectives = msgspec.structs.replace(objectives, **dict.fromkeys(asked.clear), **given)
    reference = objectives.reference
    if reference is not None and reference not in cards:
        raise InvalidObjective(
            f"`reference` names `{reference}`, which this fleet does not have.",
            f"It has: {', '.join(sorted(cards)) or 'no cards yet'}.",
        )
    if objectives.min_quality_ratio is not None and reference is None:
        raise InvalidObjective(
            "`min_quality_ratio` needs a card to be relative to.", "Set `reference` to the name of a card."
        )
    check_weights(objectives)
    action: Literal["set", "promote"] = "promote" if asked.action == "promote" else "set"
    return m.InForce(objectives=objectives, version=version, action=action, at=at, by=asked.by)


def given_in(objectives: m.Objectives) -> dict[str, Any]:
    """Those that are set, by name."""
    return {name: value for name in _NAMES if (value := getattr(objectives, name)) is not None}


def weights_in(of: m.Objectives | m.Trial) -> dict[str, float]:
    """The weights that are given, by name."""
    return {name: value for name in WEIGHTS if (value := getattr(of, name)) is not None}


def check_weights(of: m.Objectives) -> None:
    """Raises InvalidObjective when all three weights are given as nought."""
    if (of.w_quality, of.w_latency, of.w_energy) == (0.0, 0.0, 0.0):
        raise InvalidObjective("All three weights are 0: every choice would be as good.", "Set one above 0.")


def own(policy: m.Policy, given: m.Objectives | m.Trial) -> m.Policy:
    """The fleet's policy with the weights that people set, or try, in place of its own, before any is moved."""
    return msgspec.structs.replace(policy, **weights_in(given))


def effective(policy: m.Policy, in_force: m.InForce | None, moved: m.Moved | None) -> m.Policy:
    """What routing uses: moved weights where they are for the objectives in force, else the fleet's or people's own."""
    if in_force is None:
        return policy
    if moved is not None and moved.version == in_force.version and moved.fleet == policy.fleet:
        return msgspec.structs.replace(policy, **moved.weights)
    changes: dict[str, float] = {}
    if in_force.objectives.latency_p95_s is not None:
        changes["latency_slo_s"] = in_force.objectives.latency_p95_s
    if in_force.objectives.energy_j_per_query is not None:
        changes["energy_ref_j"] = in_force.objectives.energy_j_per_query
    return msgspec.structs.replace(own(policy, in_force.objectives), **changes)


def shown(
    policy: m.Policy | None, in_force: m.InForce | None, moved: m.Moved | None, trial: m.Trial | None = None
) -> m.ControlState:
    """What `calm policy show` prints."""
    now = moved if moved is not None and in_force is not None and moved.version == in_force.version else None
    used = effective(policy, in_force, moved) if policy is not None else None
    weights: dict[str, float] = {}
    if used is not None:
        weights = {short: getattr(used, name) for name, short in WEIGHTS.items()}
        weights |= {"latency_slo_s": used.latency_slo_s, "energy_ref_j": used.energy_ref_j}
    return m.ControlState(
        objectives=in_force.objectives if in_force else m.Objectives(),
        version=in_force.version if in_force else 0,
        changed_at=in_force.at if in_force else 0.0,
        changed_by=in_force.by if in_force else "",
        weights=weights,
        moved_at=now.at if now else 0.0,
        controller=now.controller if now else "",
        count=now.count if now else 0,
        latency_p95_s=now.latency_p95_s if now else None,
        energy_j_mean=now.energy_j_mean if now else None,
        energy_j_per_hour=now.energy_j_per_hour if now else None,
        infeasible=now.infeasible if now else [],
        trial=trial,
    )
