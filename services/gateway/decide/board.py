"""What the dashboard shows, as JSON. Pure. No words of queries or answers: whoever may look at the fleet need not read
what its users ask."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec
from msgspec.structs import asdict

from shared import messages as m


def fleet(
    *,
    missing: str,
    services: Collection[m.Heartbeat],
    workers: Collection[m.WorkerState],
    cards: Collection[m.Card],
    queues: Mapping[str, int],
    counts: m.Counts | None,
    qos: m.Qos | None,
    energy: m.EnergyReports | None,
    recent: Collection[m.QueryRecord],
    at: float,
) -> dict[str, Any]:
    """The fleet at one moment (`at`, Unix seconds); `missing` is what it lacks to answer queries."""
    return {
        "at": at,
        "missing": missing,
        "services": [_service(one) for one in services],
        "workers": [_worker(one) for one in workers],
        "queues": dict(sorted(queues.items())),
        "counts": None if counts is None else asdict(counts),
        "models": _models(cards, counts, qos),
        "energy": [_energy(one) for one in (energy.workers if energy is not None else [])],
        "decisions": [decision(one) for one in recent],
    }


def decision(record: m.QueryRecord) -> dict[str, Any]:
    """A query in one line."""
    route, done = record.route, record.done
    answer = done.answer if done is not None else None
    failure = done.failure if done is not None else None
    return {
        "id": record.query_id,
        "at": record.received_at,
        "state": record.state,
        "model": answer.model if answer is not None else (route.order[0] if route is not None and route.order else ""),
        "reason": route.reason if route is not None else "",
        "why": route.why if route is not None else answer.why if answer is not None else "",
        "latency_s": answer.timings.total_s if answer is not None else None,
        "energy_j": answer.energy.joules if answer is not None else None,
        "estimated": answer.energy.estimated if answer is not None else None,
        "tokens_out": answer.usage.tokens_out if answer is not None else None,
        "error": failure.code if failure is not None else "",
        "feedback": [one.score for one in record.feedback],
    }


def explained(record: m.QueryRecord) -> dict[str, Any]:
    """A query with its whole decision: every candidate with its terms, and what would have changed the choice."""
    route, answer = record.route, record.done.answer if record.done is not None else None
    told = decision(record)
    if route is not None:
        order = {card: rank for rank, card in enumerate(route.order)}
        told |= {
            "runner_up": route.runner_up,
            "margin": route.margin,
            "flip": route.flip,
            "weights": route.weights,
            "propensity": route.propensity,
            "domains": dict(sorted(route.domains.items(), key=lambda item: -item[1])[:3]),
            "decided_in_s": route.decided_in_s,
            "candidates": [
                asdict(one)
                for one in sorted(route.candidates, key=lambda c: order.get(c.card, len(order)))
            ],
        }  # fmt: skip
    if answer is not None:
        told |= {
            "worker": answer.worker,
            "attempt": answer.attempt,
            "timings": msgspec.to_builtins(answer.timings),
            "passed_over": msgspec.to_builtins(answer.passed_over),
        }
    return told


def _service(beat: m.Heartbeat) -> dict[str, Any]:
    names = ("service", "instance", "state", "in_flight", "handled", "failed", "detail")
    return {name: getattr(beat, name) for name in names}


def _worker(worker: m.WorkerState) -> dict[str, Any]:
    return {
        "worker": worker.worker,
        "device": f"{worker.device.kind} ({worker.device.name})",
        "used_bytes": worker.used_bytes,
        "budget_bytes": worker.budget_bytes,
        "draining": worker.draining,
        "standby": worker.standby,
        "engines": [
            {
                "artifact": engine.artifact,
                "state": engine.state,
                "active": engine.active,
                "slots": engine.slots,
                "footprint_bytes": engine.footprint_bytes,
                "tokens_per_s": 1.0 / engine.tpot_s if engine.tpot_s else None,
            }
            for engine in worker.engines
        ],
    }


def _models(cards: Collection[m.Card], counts: m.Counts | None, qos: m.Qos | None) -> list[dict[str, Any]]:
    answered = counts.by_card if counts is not None else {}
    seen = {one.card: asdict(one) for one in (qos.cards if qos is not None else [])}
    return [
        {"card": card.name, "artifact": card.artifact.name, "answered_in_all": answered.get(card.name, 0),
         "recent": seen.get(card.name)}
        for card in sorted(cards, key=lambda card: card.name)
    ]  # fmt: skip


def _energy(report: m.EnergyReport) -> dict[str, Any]:
    return {
        "worker": report.worker,
        "source": report.source,
        "total_j": report.total_j,
        "active_j": sum(one.active_j for one in report.accounts),
        "load_j": sum(one.load_j for one in report.accounts),
        "idle_j": report.idle_j,
        "other_j": report.other_j,
    }
