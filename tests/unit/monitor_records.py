"""Makers of records for the tests of the monitor and the knowledge base."""

from __future__ import annotations

from shared import messages as m


def done(
    query_id: str, card: str = "alpha", *, tokens_in: int = 10, tokens_out: int = 11, text: str = "text", **more: object
) -> m.Done:
    """An answered query: 1 s prefill, 2 s decode, 0.5 s elsewhere, 6 J."""
    answer = m.Answer(
        id=query_id,
        text=text,
        model=card,
        artifact="small-int8",
        worker="w1",
        finish_reason="stop",
        usage=m.Usage(tokens_in=tokens_in, tokens_out=tokens_out),
        timings=m.Timings(queue_s=0.2, load_s=0.0, prefill_s=1.0, decode_s=2.0, overhead_s=0.3, total_s=3.5),
        energy=m.Energy(joules=6.0, source="model"),
        confidence=m.Confidence(mean_logprob=-0.1, min_logprob=-1.0, mean_entropy=0.2),
        attempt=1,
        why="best",
    )
    fields: dict[str, object] = {
        "query_id": query_id,
        "answer": answer,
        "attempt": 1,
        "card": card,
        "artifact": "small-int8",
        "worker": "w1",
        "device_class": "cpu-2t",
        "batch_mean": 2.0,
    }
    return m.Done(**{**fields, **more})  # type: ignore[arg-type]


def failed(query_id: str, code: str = "engine_failed", card: str = "alpha") -> m.Done:
    return m.Done(query_id=query_id, card=card, failure=m.Failure(code=code, message="m", id=query_id))


def accepted(query_id: str, at: float = 1000.0) -> m.Accepted:
    return m.Accepted(
        query=m.Query(prompt="x", id=query_id),
        query_id=query_id,
        deadline_at=at + 120,
        stamps={"received": at, "accepted": at},
    )


def route(query_id: str) -> m.Route:
    candidate = m.Candidate(card="alpha", artifact="small-int8", utility=0.5)
    return m.Route(query_id=query_id, order=["alpha"], candidates=[candidate], reason="best_utility", margin=0.1)


def operation(op_id: str, kind: str = "load", **more: object) -> m.Operation:
    fields: dict[str, object] = {
        "op_id": op_id,
        "kind": kind,
        "worker": "w1",
        "artifact": "small-int8",
        "ok": True,
        "reason": "demand",
        "seconds": 2.0,
        "at": 1000.0,
    }
    return m.Operation(**{**fields, **more})  # type: ignore[arg-type]
