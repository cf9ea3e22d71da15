"""Plain sample data for unit tests of the deciders."""

from __future__ import annotations

from collections.abc import Sequence

from shared import messages as m

GB = 10**9


def spec(name: str = "a-int8", *, weights: int = GB // 10, slots: int = 4, context: int = 1000) -> m.ArtifactSpec:
    """An artifact whose footprint is its weights plus 1 kB per token and slot."""
    model, _, variant = name.rpartition("-")
    return m.ArtifactSpec(
        name=name, model=model or name, variant=variant, weights_bytes=weights, kv_bytes_per_token=1000, slots=slots,
        context=context,
    )  # fmt: skip


def card(name: str, artifact: m.ArtifactSpec | None = None, **more: object) -> m.Card:
    values: dict[str, object] = {"description": name, "quality": 0.5, **more}
    return m.Card(name=name, artifact=artifact or spec(), **values)  # type: ignore[arg-type]


def engine(artifact: m.ArtifactSpec, **more: object) -> m.EngineState:
    values: dict[str, object] = {"state": "ready", "slots": artifact.slots, **more}
    return m.EngineState(artifact=artifact.name, footprint_bytes=artifact.footprint_bytes, **values)  # type: ignore[arg-type]


def worker(name: str = "w1", budget: int = GB, engines: Sequence[m.EngineState] = (), **more: object) -> m.WorkerState:
    device = m.Device(kind="cpu", name="cpu", threads=2, memory_bytes=10 * GB)
    return m.WorkerState(
        worker=name, host="h", device=device, budget_bytes=budget, engines=list(engines), **more  # type: ignore[arg-type]
    )  # fmt: skip


def analyzed(query: m.Query | None = None, *, deadline_at: float = 1e9, **profile: object) -> m.Analyzed:
    accepted = m.Accepted(query=query or m.Query(prompt="hi"), query_id="q1", deadline_at=deadline_at)
    values: dict[str, object] = {"tokens_in": {"a": 10}, "tokens_out": 50.0, **profile}
    return m.Analyzed(accepted=accepted, profile=m.Profile(**values))  # type: ignore[arg-type]
