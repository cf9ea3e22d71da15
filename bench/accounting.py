"""Keeps account of what was asked and what came back: every query ends exactly once, or is lost or doubled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.report import percentiles


@dataclass
class Asked:
    """One query as its client saw it; times are seconds after it was sent."""

    id: str
    sent_at: float
    first_s: float | None = None
    final_s: float | None = None
    finals: int = 0
    answer: dict[str, Any] | None = None
    failure: dict[str, Any] | None = None
    attempts: set[int] = field(default_factory=set)

    def take(self, message: dict[str, Any], now: float) -> bool:
        """Account for a message; True when it is the query's end."""
        if message["type"] == "chunk.v1":
            self.attempts.add(message["attempt"])
            if self.first_s is None:
                self.first_s = now - self.sent_at
            return False
        self.finals += 1
        if self.finals == 1:
            self.final_s = now - self.sent_at
            if message["type"] == "answer.v1":
                self.answer = message
            else:
                self.failure = message
        return True

    @property
    def overhead_s(self) -> float | None:
        """What the client waited beyond waiting for a model and a slot, reading, generating, and earlier attempts."""
        if self.answer is None or self.final_s is None:
            return None
        t = self.answer["timings"]
        parts = ("queue_s", "load_s", "prefill_s", "decode_s", "retried_s")
        return float(self.final_s - sum(t.get(part, 0.0) for part in parts))


def totals(asked: Sequence[Asked]) -> dict[str, Any]:
    """Counts: every query is answered, failed or lost."""
    return {
        "sent": len(asked),
        "accepted": sum(a.answer is not None or bool((a.failure or {}).get("id")) for a in asked),
        "answered": sum(a.answer is not None for a in asked),
        "failed": sum(a.failure is not None for a in asked),
        "lost": sum(a.finals == 0 for a in asked),
        "duplicated": sum(a.finals > 1 for a in asked),
        "restarted": sum(len(a.attempts) > 1 for a in asked),
        "failures": dict(Counter(a.failure["code"] for a in asked if a.failure)),
    }


def figures(asked: Sequence[Asked], wall_s: float) -> dict[str, Any]:
    """Latencies as percentiles, rates and energy of those that were answered."""
    done = [a for a in asked if a.answer is not None]
    timings = [a.answer["timings"] for a in done if a.answer]
    usage = [a.answer["usage"] for a in done if a.answer]
    tokens = sum(u["tokens_out"] for u in usage)
    tpot = [t["decode_s"] / (u["tokens_out"] - 1) for t, u in zip(timings, usage, strict=True) if u["tokens_out"] > 1]
    energy = [a.answer["energy"] for a in done if a.answer]
    return {
        "answered": len(done),
        "latency_s": percentiles([a.final_s for a in done if a.final_s is not None]),
        "ttft_s": percentiles([a.first_s for a in done if a.first_s is not None]),
        "tpot_s": percentiles(tpot),
        "overhead_s": percentiles([o for a in done if (o := a.overhead_s) is not None]),
        "queue_s": percentiles([t["queue_s"] for t in timings]),
        "load_s": percentiles([t["load_s"] for t in timings]),
        "tokens_out": tokens,
        "tokens_per_s": tokens / wall_s if wall_s else 0.0,
        "queries_per_s": len(done) / wall_s if wall_s else 0.0,
        "joules_per_query": sum(e["joules"] for e in energy) / len(energy) if energy else 0.0,
        "energy_source": "/".join(sorted({e["source"] for e in energy})) or "none",
    }
