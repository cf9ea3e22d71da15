"""`calm status`: workers, resident models, queues, quality of service, loads and evictions."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

import nats.errors
from nats.aio.msg import Msg

from services.cli import policy
from shared import codec, streams, subjects
from shared import messages as m
from shared.bus import Bus
from shared.errors import CalmError
from shared.settings import Settings, format_bytes
from shared.views import FleetView

LISTEN_S = 1.2
"""Services say that they live once a second."""


@dataclass
class Snapshot:
    """The fleet at one moment."""

    services: list[m.Heartbeat] = field(default_factory=list)
    workers: list[m.WorkerState] = field(default_factory=list)
    queues: dict[str, int] = field(default_factory=dict)
    """Queries dispatched and not yet done, by artifact."""
    counts: m.Counts | None = None
    qos: m.Qos | None = None
    operations: list[m.Operation] = field(default_factory=list)
    control: m.ControlState | None = None


async def status(settings: Settings, *, as_json: bool) -> int:
    """Print a snapshot of the fleet."""
    bus = await Bus.connect(settings, "calm-status", wait=False)
    try:
        snapshot = await take(bus)
    finally:
        await bus.close()
    print(codec.to_json(snapshot).decode() if as_json else render(snapshot))
    return 0


async def take(bus: Bus) -> Snapshot:
    """Listen and ask for a little over a second."""
    beats: dict[tuple[str, str], m.Heartbeat] = {}

    async def on_beat(message: Msg) -> None:
        beat = codec.unpack(message.data, m.Heartbeat)
        beats[(beat.service, beat.instance)] = beat

    await bus.subscribe(subjects.health("*"), on_beat)
    fleet = FleetView(bus)
    await fleet.start()
    snapshot = Snapshot()
    for name, kind in (("counts", m.Counts), ("qos", m.Qos), ("operations", m.Operations)):
        request = m.KnowledgeRequest(limit=12)
        try:
            reply: Any = await bus.ask(subjects.knowledge(name), request, kind, 2.0)
        except CalmError:
            continue  # no monitor: the rest is shown all the same
        if isinstance(reply, m.Operations):
            snapshot.operations = reply.operations
        else:
            setattr(snapshot, name, reply)
    with contextlib.suppress(CalmError):
        snapshot.control = await _control(bus)
    snapshot.queues = await streams.queued(bus.js)
    await asyncio.sleep(LISTEN_S)  # every service that lives has spoken by then
    snapshot.services = [beats[key] for key in sorted(beats)]
    snapshot.workers = fleet.workers()
    return snapshot


async def _control(bus: Bus) -> m.ControlState | None:
    """The objectives and weights; None when no planner answers."""
    try:
        reply = await bus.nc.request(subjects.CONTROL, codec.to_json(m.Control()), timeout=2)
    except (TimeoutError, nats.errors.Error):
        return None
    state = codec.from_json(reply.data, m.ControlState | m.Failure)  # type: ignore[arg-type]
    return state if isinstance(state, m.ControlState) else None


def render(s: Snapshot) -> str:
    """The snapshot as text."""
    lines = ["services"]
    for b in s.services:
        lines.append(
            f"  {b.service:10} {b.instance:24} {b.state:9} {b.in_flight:4} in flight {b.handled:7} handled  {b.detail}"
        )
    if not s.services:
        lines.append("  none is running")
    lines.append("workers")
    for w in s.workers:
        used = f"{format_bytes(w.used_bytes)} of {format_bytes(w.budget_bytes)}"
        lines.append(f"  {w.worker:20} {w.device.kind} ({w.device.name}), {used}" + (", leaving" if w.draining else ""))
        for e in w.engines:
            speed = f", {1 / e.tpot_s:.0f} tokens/s a sequence" if e.tpot_s else ""
            lines.append(
                f"    {e.artifact:28} {e.state:9} {e.active}/{e.slots} slots,"
                f" {format_bytes(e.footprint_bytes)} (measured {format_bytes(e.measured_bytes)}){speed}"
            )
        if w.lacks:
            lines.append(f"    lacks in its store (calm models pull): {', '.join(w.lacks)}")
    if not s.workers:
        lines.append("  none is registered")
    if s.control is not None:
        lines.append(policy.weights(s.control))
        if s.control.version:
            lines += [f"  {line}" for line in policy.render(s.control, time.time()).splitlines() if line[:1] != "w"]
    lines.append("queues: " + (", ".join(f"{a} {n}" for a, n in sorted(s.queues.items())) or "empty"))
    if s.counts is not None:
        c = s.counts
        lines.append(
            f"queries: {c.accepted} accepted, {c.answered} answered, {c.failed} failed, {c.in_flight} in flight,"
            f" {c.rejected} rejected; {c.loads} loads, {c.evictions} evictions, {c.lost} engines lost"
        )
        if c.failures:
            lines.append("  failures: " + ", ".join(f"{code} {n}" for code, n in sorted(c.failures.items())))
        lines += _cards(c, s.qos)
    lines.append("latest operations")
    for o in s.operations:
        outcome = "ok" if o.ok else (o.failure.code if o.failure else "failed")
        lines.append(
            f"  {o.kind:6} {o.artifact:28} {o.worker:20} {o.reason:28} {outcome} in {o.seconds:.2f} s{_measured(o)}"
        )
    return "\n".join(lines)


def _measured(operation: m.Operation) -> str:
    """What the worker measured of an engine's memory, where it did."""
    if not operation.held_bytes:
        return ""
    held = format_bytes(operation.held_bytes)
    if operation.kind == "load":
        return f", holds {held}"
    return f", gave back {format_bytes(operation.freed_bytes)} of {held}"


def _cards(counts: m.Counts, qos: m.Qos | None) -> list[str]:
    by_card = {c.card: c for c in (qos.cards if qos else [])}
    head = f"  {'card':24}{'answered':>9}{'p50':>9}{'p95':>9}{'ttft p50':>10}{'energy':>10}{'feedback':>10}"
    lines = ["models", head]
    for card in sorted({*counts.by_card, *by_card}):
        q = by_card.get(card)
        figures = (
            f"{q.latency_p50_s:7.2f} s{q.latency_p95_s:7.2f} s{q.ttft_p50_s:8.2f} s{q.energy_j_mean:8.1f} J"
            if q
            else ""
        )
        judged = f"{q.feedback_mean:10.2f}" if q and q.feedback_count else ""
        lines.append(f"  {card:24}{counts.by_card.get(card, 0):9}{figures}{judged}")
    return lines
