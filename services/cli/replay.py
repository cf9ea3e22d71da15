"""`calm replay`: what would have happened to the recorded queries with another policy, memory, fleet or load."""

from __future__ import annotations

import argparse
import asyncio
import csv
import html
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import msgspec
import numpy as np

from services.simulator import recorded
from services.simulator.engine import Result
from services.simulator.recorded import Answered, Recorded
from services.simulator.telemetry import Run
from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.errors import CalmError, DataInvalid
from shared.models import fleet_file
from shared.models.store import ModelStore
from shared.settings import Settings, parse_bytes
from shared.views import FleetView, ModelsView

AT_ONCE = 20
"""Records asked for at a time."""
READY_S = 5.0


@dataclass(frozen=True)
class Outcome:
    """Figures of one simulated run."""

    name: str
    queries: int
    latency_s_mean: float
    latency_s_p95: float
    energy_j_mean: float
    quality_mean: float
    """Predicted: nobody judged answers that were not given."""
    loads: int
    residency_hit_rate: float
    shares: dict[str, float]


@dataclass(frozen=True)
class Known:
    """What a running system knows of itself and of the queries that it answered."""

    answered: list[Answered]
    cards: dict[str, m.Card]
    workers: list[m.WorkerState]
    qos: m.Qos
    policy: m.Policy
    overhead_s: float

    def recorded(self) -> Recorded:
        """Ready to simulate."""
        return recorded.build(self.answered, self.cards, self.workers, self.qos, self.policy, self.overhead_s)


async def replay(arguments: argparse.Namespace, settings: Settings) -> int:
    """Print what was recorded, simulated as it was and as asked for."""
    if arguments.plot is not None and arguments.plot.suffix not in (".png", ".html"):
        raise DataInvalid(f"{arguments.plot.name} is neither PNG nor HTML.", "Give a name that ends in .png or .html.")
    if arguments.faster <= 0.0:
        raise DataInvalid(f"Arrivals cannot be {arguments.faster:g} times as fast.", "Give a number above 0.")
    if arguments.workers is not None and arguments.workers < 1:
        raise DataInvalid(f"There cannot be {arguments.workers} workers.", "Give 1 or more.")
    bus = await Bus.connect(settings, "calm-replay", wait=False)
    try:
        known = await read(bus, arguments.limit)
    finally:
        await bus.close()
    if arguments.trace is not None:
        rows = await asyncio.to_thread(read_trace, arguments.trace, arguments.limit)
        known = replace(known, answered=recorded.retimed(known.answered, rows))
    other = known
    if arguments.fleet:
        file = await asyncio.to_thread(fleet_file.load_fleet, arguments.fleet)
        cards = {card.name: card for card in fleet_file.cards(file, ModelStore(settings.models_path))}
        policy = fleet_file.policy(file)
        budget = policy.worker_memory_bytes
        workers = [msgspec.structs.replace(w, budget_bytes=budget or w.budget_bytes) for w in known.workers]
        other = replace(
            known, cards=cards, policy=policy, workers=workers, answered=recorded.reconsidered(known.answered, cards)
        )
    then = recorded.changed(
        other.recorded(), budget_bytes=parse_bytes(arguments.memory) if arguments.memory else 0,
        workers=arguments.workers or 0, policy=msgspec.structs.replace(other.policy, **_changes(arguments)),
        faster=arguments.faster,
    )  # fmt: skip
    was = known.recorded()
    outcomes = [
        outcome("as it was", was, recorded.simulate(was)),
        outcome("what if", then, recorded.simulate(then, arguments.residency)),
    ]
    print(codec.to_json(outcomes).decode() if arguments.json else render(outcomes))
    if arguments.plot is not None:
        write(arguments.plot, outcomes)
        print(f"written: {arguments.plot}", file=sys.stderr if arguments.json else sys.stdout)
    return 0


def read_trace(path: Path, limit: int) -> list[tuple[float, int, int]]:
    """(seconds since the first, tokens in, tokens out) of the first `limit` arrivals of a trace in Azure's format.

    Raises:
        DataInvalid: the file is missing, has no arrivals, or a line cannot be used.
    """
    found: list[tuple[datetime, int, int]] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line, row in enumerate(csv.DictReader(file), 2):
                try:
                    # Seconds with seven digits: one more than Python reads.
                    at = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26])
                    found.append((at, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
                except (KeyError, TypeError, ValueError, AttributeError):
                    raise DataInvalid(
                        "This line is no arrival.", "Each has TIMESTAMP,ContextTokens,GeneratedTokens.", path=str(path),
                        line=line,
                    ) from None  # fmt: skip
                if len(found) == limit:
                    break
    except OSError as error:
        raise DataInvalid(f"The trace cannot be read: {error.strerror}.", "Name a CSV file.", path=str(path)) from None
    if not found:
        raise DataInvalid("There are no arrivals in this trace.", "Give one with at least one line.", path=str(path))
    found.sort(key=lambda one: one[0])
    return [((at - found[0][0]).total_seconds(), tokens_in, tokens_out) for at, tokens_in, tokens_out in found]


def _changes(arguments: argparse.Namespace) -> dict[str, float]:
    wanted = {
        "w_quality": arguments.w_quality, "w_latency": arguments.w_latency, "w_energy": arguments.w_energy,
        "latency_slo_s": arguments.slo,
    }  # fmt: skip
    for name, value in wanted.items():
        if value is not None and (value < 0.0 or (name == "latency_slo_s" and value == 0.0)):
            raise DataInvalid(f"{name} cannot be {value:g}.", "Give a number above 0.")
    return {name: value for name, value in wanted.items() if value is not None}


async def read(bus: Bus, limit: int) -> Known:
    """The latest answered queries, with what the system knows of itself.

    Raises:
        CalmError: the system does not run, or has answered nothing.
    """
    models, fleet = ModelsView(bus), FleetView(bus)
    await models.start()
    await fleet.start()
    recent = await bus.ask(subjects.knowledge("recent"), m.KnowledgeRequest(limit=limit), m.QueryRecords, 5.0)
    qos = await bus.ask(subjects.knowledge("qos"), m.KnowledgeRequest(), m.Qos, 5.0)
    try:
        async with asyncio.timeout(READY_S):
            await models.ready.wait()
    except TimeoutError:
        raise DataInvalid("No fleet is known.", "Start the system: calm up.") from None
    ids = [r.query_id for r in recent.records if r.state == "answered"]
    answered, overhead = [], []
    for start in range(0, len(ids), AT_ONCE):
        asked = (
            bus.ask(subjects.knowledge("query"), m.KnowledgeRequest(id=i), m.QueryRecord, 5.0)
            for i in ids[start : start + AT_ONCE]
        )
        for record in await asyncio.gather(*asked):
            if record.route is not None and record.done is not None and record.done.answer is not None:
                answered.append(_answered(record, record.route, record.done, record.done.answer))
                overhead.append(record.done.answer.timings.overhead_s)
    if not answered:
        raise DataInvalid("No answered query is on record.", "Ask some queries first: calm ask.")
    assert models.policy is not None
    middle = float(np.median(overhead))
    return Known(answered, dict(models.cards), fleet.workers(), qos, models.policy, middle)


def _answered(record: m.QueryRecord, route: m.Route, done: m.Done, answer: m.Answer) -> Answered:
    tokens_read, t = answer.usage.tokens_in - answer.usage.tokens_cached, answer.timings
    return Answered(
        record.received_at, route, tokens_read, answer.usage.tokens_out,
        record.query.preference if record.query is not None else m.Preference(),
        Run(
            done.artifact or answer.artifact, tokens_read, answer.usage.tokens_out, t.prefill_s, t.decode_s,
            done.batch_mean,
        ),
    )  # fmt: skip


def outcome(name: str, what: Recorded, result: Result) -> Outcome:
    """Figures of a run."""
    n = len(result.latency_s)
    share = np.bincount(result.model, minlength=len(what.fleet.names)) / n
    return Outcome(
        name=name, queries=n, latency_s_mean=float(result.latency_s.mean()),
        latency_s_p95=float(np.quantile(result.latency_s, 0.95)),
        energy_j_mean=float((result.energy_j.sum() + result.load_j) / n), quality_mean=float(result.score.mean()),
        loads=result.loads, residency_hit_rate=float(result.hit.mean()),
        shares={model: float(s) for model, s in zip(what.fleet.names, share, strict=True)},
    )  # fmt: skip


ROWS = (
    ("mean latency, s", "latency_s_mean"), ("p95 latency, s", "latency_s_p95"), ("joules a query", "energy_j_mean"),
    ("predicted quality", "quality_mean"), ("loads", "loads"), ("residency hits", "residency_hit_rate"),
)  # fmt: skip


def render(outcomes: Sequence[Outcome]) -> str:
    """A table, one column for each run."""
    lines = [f"{outcomes[0].queries} recorded queries, simulated", ""]
    lines.append(" " * 24 + "".join(f"{o.name:>14}" for o in outcomes))
    for label, name in ROWS:
        lines.append(f"{label:<24}" + "".join(f"{getattr(o, name):>14.3f}" for o in outcomes))
    for model in dict.fromkeys(name for o in outcomes for name in o.shares):
        lines.append(f"{'share of ' + model:<24}" + "".join(f"{o.shares.get(model, 0.0):>14.3f}" for o in outcomes))
    return "\n".join(lines)


def write(path: Path, outcomes: list[Outcome]) -> None:
    """Bars of each figure, as PNG or as a page of its own.

    Raises:
        CalmError: the name ends neither in .png nor in .html, or PNG is wanted without matplotlib.
    """
    if path.suffix == ".html":
        path.write_text(page(outcomes), encoding="utf-8")
        return
    if path.suffix != ".png":
        raise DataInvalid(f"{path.name} is neither PNG nor HTML.", "Give a name that ends in .png or .html.")
    try:
        import matplotlib as mpl  # noqa: PLC0415
    except ModuleNotFoundError:
        raise CalmError("PNG needs matplotlib.", 'Run pip install "calm-fleet[plot]", or ask for .html.') from None
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, len(ROWS), figsize=(2.4 * len(ROWS), 3.0))
    for axis, (label, name) in zip(axes, ROWS, strict=True):
        bars = axis.bar([o.name for o in outcomes], [getattr(o, name) for o in outcomes], color=["tab:grey", "tab:red"])
        axis.bar_label(bars, fmt="%.3g", fontsize=8)
        axis.margins(y=0.15)
        axis.set_title(label, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def page(outcomes: list[Outcome]) -> str:
    """An HTML page without anything from elsewhere."""
    parts = ["<!doctype html><meta charset='utf-8'><title>calm replay</title>",
             "<style>body{font:14px sans-serif;margin:2em}svg{margin:1em}text{font-size:12px}</style>",
             f"<h1>{outcomes[0].queries} recorded queries, simulated</h1>"]  # fmt: skip
    for label, name in ROWS:
        values = [float(getattr(o, name)) for o in outcomes]
        most = max(*values, 1e-9)
        bars = "".join(
            f"<rect x='{20 + 80 * i}' y='{130 - 110 * v / most:.1f}' width='60' height='{110 * v / most:.1f}'"
            f" fill='{('#999', '#c33')[i % 2]}'/><text x='{50 + 80 * i}' y='{125 - 110 * v / most:.1f}'"
            f" text-anchor='middle'>{v:.3g}</text><text x='{50 + 80 * i}' y='146' text-anchor='middle'>"
            f"{html.escape(o.name)}</text>"
            for i, (o, v) in enumerate(zip(outcomes, values, strict=True))
        )
        parts.append(f"<svg width='{40 + 80 * len(values)}' height='175'>{bars}"
                     f"<text x='20' y='168' font-weight='bold'>{html.escape(label)}</text></svg>")  # fmt: skip
    parts.append(f"<pre>{html.escape(render(outcomes))}</pre>")
    return "\n".join(parts)
