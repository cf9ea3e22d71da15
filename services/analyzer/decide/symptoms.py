"""What is wrong with the fleet, from its QoS and the workers seen. Pure."""

from __future__ import annotations

from shared import messages as m


def find(
    qos: m.Qos, policy: m.Policy, before: frozenset[str], now_alive: frozenset[str], now: float
) -> list[m.Symptom]:
    """Objectives that do not hold and workers that have gone since the last look."""
    slow = [
        m.Symptom(
            kind="slo_violation",
            subject=card.card,
            detail=f"p95 latency {card.latency_p95_s:.2f} s is over the objective of {policy.latency_slo_s:g} s",
            value=card.latency_p95_s,
            limit=policy.latency_slo_s,
            at=now,
        )
        for card in qos.cards
        if card.answered >= 20 and card.latency_p95_s > policy.latency_slo_s
    ]
    lost = [
        m.Symptom(kind="worker_lost", subject=worker, detail="no sign of life for 3 s", at=now)
        for worker in sorted(before - now_alive)
    ]
    return slow + lost
