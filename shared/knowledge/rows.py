"""Messages as rows of the knowledge base. Pure; `at` is when the broker stored the message, in Unix seconds."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import Any

from shared import codec
from shared import messages as m

Row = dict[str, Any]
READ_CHARS = 200
"""Of what was read, in its own column; the record has all of it."""
_DEVICE_SUMS = ("elapsed_s", "total_j", "idle_j", "other_j")
_ACCOUNT_SUMS = ("active_j", "load_j", "loads", "busy_s", "tokens_in", "tokens_out")


def day(at: float) -> str:
    """The UTC day of a Unix time, as `2026-01-31`."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")


def query(accepted: m.Accepted, at: float) -> Row:
    return {
        "query_id": accepted.query_id,
        "received_at": accepted.stamps.get("received", at),
        "deadline_at": accepted.deadline_at,
        "record": codec.pack(accepted.query),
    }


def decision(route: m.Route, at: float) -> Row:
    return {
        "query_id": route.query_id,
        "chosen": route.order[0] if route.order else "",
        "reason": route.reason,
        "runner_up": route.runner_up or "",
        "margin": route.margin,
        "propensity": route.propensity,
        "knowledge_version": route.knowledge_version,
        "decided_at": route.decided_at or at,
        "record": codec.pack(route),
    }


def completion(done: m.Done, at: float) -> Row:
    """The end of a query."""
    answer = done.answer
    reading = answer.reading if answer else None
    row: Row = {
        "query_id": done.query_id,
        "answered": answer is not None,
        "code": "" if answer else done.failure.code if done.failure else "unknown",
        "card": done.card or (answer.model if answer else ""),
        "artifact": done.artifact or (answer.artifact if answer else ""),
        "worker": done.worker or (answer.worker if answer else ""),
        "device_class": done.device_class,
        "attempt": done.attempt,
        "batch_mean": done.batch_mean,
        "ended_at": at,
        "record": codec.pack(done),
        "tokens_in": answer.usage.tokens_in if answer else 0,
        "tokens_out": answer.usage.tokens_out if answer else 0,
        "energy_j": answer.energy.joules if answer else 0.0,
        "energy_source": answer.energy.source if answer else "",
        "retried_j": answer.energy.retried_j if answer else 0.0,
        "readable": reading.value is not None if reading else None,
        "read": reading.value[:READ_CHARS] if reading and reading.value is not None else None,
    }
    for name in ("queue_s", "load_s", "prefill_s", "decode_s", "overhead_s", "total_s"):
        row[name] = getattr(answer.timings, name) if answer else 0.0
    return row


def operation(done: m.Operation, at: float, device_class: str) -> Row:
    return {
        "op_id": done.op_id,
        "kind": done.kind,
        "worker": done.worker,
        "artifact": done.artifact,
        "device_class": device_class,
        "ok": done.ok,
        "reason": done.reason,
        "seconds": done.seconds,
        "bytes": done.bytes,
        "at": done.at or at,
        "record": codec.pack(done),
    }


def placement(decided: m.Placement, at: float) -> Row:
    return {
        "id": decided.id,
        "reason": decided.reason,
        "decided_at": decided.decided_at or at,
        "record": codec.pack(decided),
    }


def control(state: m.ControlState, at: float) -> Row:
    """A change of the objectives, or a move of the weights."""
    when = state.moved_at if state.event == "moved" else state.changed_at
    return {
        "id": f"{state.version}-{state.event}-{when or at}",
        "version": state.version,
        "event": state.event,
        "changed_by": state.changed_by,
        "w_quality": state.weights.get("w_q", 0.0),
        "w_latency": state.weights.get("w_l", 0.0),
        "w_energy": state.weights.get("w_e", 0.0),
        "at": when or at,
        "record": codec.pack(state),
    }


def symptom(found: m.Symptom) -> Row:
    return {
        "kind": found.kind,
        "subject": found.subject,
        "detail": found.detail,
        "value": found.value,
        "limit": found.limit,
        "at": found.at,
    }


def worker(state: m.WorkerState) -> Row:
    return {
        "worker": state.worker,
        "host": state.host,
        "device_kind": state.device.kind,
        "device_name": state.device.name,
        "device_class": state.device.device_class,
        "budget_bytes": state.budget_bytes,
        "first_seen": state.at,
        "last_seen": state.at,
    }


def sample(state: m.WorkerState) -> Row:
    """What a worker holds now."""
    return {
        "worker": state.worker,
        "at": state.at,
        "budget_bytes": state.budget_bytes,
        "used_bytes": state.used_bytes,
        "measured_bytes": sum(e.measured_bytes for e in state.engines),
        "engines": len(state.engines),
        "active": sum(e.active for e in state.engines),
        "held": sum(e.held for e in state.engines),
    }


def energy(report: m.EnergyReport) -> list[Row]:
    """A worker's energy ledger: one row for the device, with the empty artifact, and one for each artifact."""
    common = {
        "worker": report.worker,
        "started_at": report.started_at,
        "host": report.host,
        "device_class": report.device_class,
        "source": report.source,
        "at": report.at,
    }
    device = m.EnergyAccount(artifact="")
    return [
        {
            **common,
            "artifact": account.artifact,
            **{name: getattr(report, name) if account is device else 0.0 for name in _DEVICE_SUMS},
            **{name: getattr(account, name) for name in _ACCOUNT_SUMS},
        }
        for account in (device, *report.accounts)
    ]


def card(published: m.Card, at: float) -> Row:
    return {
        "card": published.name,
        "artifact": published.artifact.name,
        "first_seen": at,
        "last_seen": at,
        "record": codec.pack(published),
    }


def daily(completions: list[Row]) -> list[Row]:
    """Completion rows summed by day and card."""
    sums: dict[tuple[str, str], Counter[str]] = {}
    for row in completions:
        entry = sums.setdefault((day(row["ended_at"]), row["card"]), Counter())
        entry["answered" if row["answered"] else "failed"] += 1
        for name in ("tokens_in", "tokens_out", "total_s", "energy_j"):
            entry[name] += row[name]
    names = ("answered", "failed", "tokens_in", "tokens_out", "total_s", "energy_j")
    return [{"day": d, "card": c, **{n: entry[n] for n in names}} for (d, c), entry in sums.items()]


def tallies(completions: list[Row], operations: list[Row], accepted: int, judged: int) -> list[Row]:
    """Counts that these new rows add, by name and key."""
    counts: Counter[tuple[str, str]] = Counter({("accepted", ""): accepted, ("feedback", ""): judged})
    for row in completions:
        counts["answered" if row["answered"] else "failed", row["card"] if row["answered"] else row["code"]] += 1
    for row in operations:
        if row["ok"] or row["kind"] == "lost":
            counts[row["kind"], ""] += 1
            counts["reason", row["reason"]] += 1
        else:
            counts[f"{row['kind']}_failed", ""] += 1
    return [{"name": n, "key": k, "count": count} for (n, k), count in counts.items() if count]
