"""`calm replay`: what would have happened to the recorded queries with another policy, memory, fleet or load."""

from __future__ import annotations

import argparse
import asyncio
import html
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from services.simulator import recorded
from services.simulator.engine import Result
from services.simulator.recorded import Answered, Recorded
from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.errors import CalmError, DataInvalid
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


async def replay(arguments: argparse.Namespace, settings: Settings) -> int:
    """Print what was recorded, simulated as it was and as asked for."""
    bus = await Bus.connect(settings, "calm-replay", wait=False)
    try:
        was = await read(bus, arguments.limit)
    finally:
        await bus.close()
    policy = msgspec.structs.replace(was.policy, **_changes(arguments))
    then = recorded.changed(
        was, budget_bytes=parse_bytes(arguments.memory) if arguments.memory else 0, workers=arguments.workers or 0,
        policy=policy, faster=arguments.faster,
    )  # fmt: skip
    outcomes = [
        outcome("as it was", was, recorded.simulate(was)),
        outcome("what if", then, recorded.simulate(then, arguments.residency)),
    ]
    print(codec.to_json(outcomes).decode() if arguments.json else render(outcomes))
    if arguments.plot is not None:
        write(arguments.plot, outcomes)
        print(f"written: {arguments.plot}")
    return 0


def _changes(arguments: argparse.Namespace) -> dict[str, float]:
    wanted = {
        "w_quality": arguments.w_quality, "w_latency": arguments.w_latency, "w_energy": arguments.w_energy,
        "latency_slo_s": arguments.slo,
    }  # fmt: skip
    for name, value in wanted.items():
        if value is not None and (value < 0.0 or (name == "latency_slo_s" and value == 0.0)):
            raise DataInvalid(f"{name} cannot be {value:g}.", "Give a number above 0.")
    return {name: value for name, value in wanted.items() if value is not None}


async def read(bus: Bus, limit: int) -> Recorded:
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
                answer = record.done.answer
                answered.append(
                    Answered(record.received_at, record.route, answer.usage.tokens_in, answer.usage.tokens_out)
                )
                overhead.append(answer.timings.overhead_s)
    assert models.policy is not None
    middle = float(np.median(overhead)) if overhead else 0.0
    return recorded.build(answered, models.cards, fleet.workers(), qos, models.policy, middle)


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


def render(outcomes: list[Outcome]) -> str:
    """A table, one column for each run."""
    lines = [f"{outcomes[0].queries} recorded queries, simulated", ""]
    lines.append(" " * 24 + "".join(f"{o.name:>14}" for o in outcomes))
    for label, name in ROWS:
        lines.append(f"{label:<24}" + "".join(f"{getattr(o, name):>14.3f}" for o in outcomes))
    for model in outcomes[0].shares:
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
        axis.bar([o.name for o in outcomes], [getattr(o, name) for o in outcomes], color=["tab:grey", "tab:red"])
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
