"""Is the simulator faithful? One short trace, live on an embedded fleet and simulated with that machine's own figures.

`python -m bench.fidelity --queries FILE [--count 80] [--rate 0.8] [--workers 1] [--profile FILE] [--json FILE]`

1. The system starts and is asked `--warm-up` questions of each model by name, one at a time: it learns its unit costs.
2. The trace runs live: Poisson arrivals, any model, at most `--max-tokens` tokens each.
3. The unit costs are read from its knowledge base (and written as a measured profile with `--profile`).
4. The same arrivals, with the qualities and lengths that the live planner predicted and the lengths that were really
   written, are simulated from the same resident models; residency and routing are the planner's own code in both.

Mean latency, residency hits and the models' shares are to agree within 15 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import nats
import numpy as np
from nats.aio.client import Client
from nats.aio.msg import Msg

from bench.e2e import read_prompts
from bench.report import machine, print_machine, print_table, write_json
from bench.system import running
from services.planner.decide import cost
from services.simulator import recorded
from services.simulator.engine import Result
from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.models.fleet_file import load_fleet
from shared.settings import Settings
from shared.views import FleetView, ModelsView

WITHIN = 0.15
SETTLE_S = 3.0
"""After the last answer: the figures of the last answers are learned by then."""
HIT_S = 0.05
"""An answer that waited less than this for its model found it resident."""


@dataclass
class Live:
    """What the live run gave."""

    at: dict[str, float] = field(default_factory=dict)
    latency: dict[str, float] = field(default_factory=dict)
    answer: dict[str, dict[str, Any]] = field(default_factory=dict)
    route: dict[str, m.Route] = field(default_factory=dict)


class Asker:
    """Asks and listens on one connection."""

    def __init__(self, nc: Client, max_tokens: int) -> None:
        self._nc, self._max_tokens = nc, max_tokens
        self._inbox = nc.new_inbox()
        self.live = Live()
        self._ended: dict[str, asyncio.Event] = {}

    async def start(self) -> None:
        await self._nc.subscribe(f"{self._inbox}.*", cb=self._on_answer)
        await self._nc.subscribe(subjects.DECISION_ROUTE, cb=self._on_route)

    async def ask(self, prompt: str, model: str | None = None) -> str:
        query_id = uuid.uuid4().hex
        query = {"prompt": prompt, "max_tokens": self._max_tokens, "deadline_s": 300, "id": query_id}
        if model is not None:
            query["model"] = model
        self._ended[query_id] = asyncio.Event()
        self.live.at[query_id] = time.perf_counter()
        await self._nc.publish("calm.query", json.dumps(query).encode(), reply=f"{self._inbox}.{query_id}")
        return query_id

    async def ended(self, query_id: str) -> None:
        async with asyncio.timeout(320):
            await self._ended[query_id].wait()

    async def _on_answer(self, message: Msg) -> None:
        query_id, body = message.subject.rsplit(".", 1)[1], json.loads(message.data)
        if body["type"] == "answer.v1":
            self.live.latency[query_id] = time.perf_counter() - self.live.at[query_id]
            self.live.answer[query_id] = body
        if body["type"] != "chunk.v1":
            self._ended[query_id].set()

    async def _on_route(self, message: Msg) -> None:
        route = codec.unpack(message.data, m.Route)
        self.live.route[route.query_id] = route


@dataclass(frozen=True)
class Known:
    """What the live system knows of itself."""

    cards: dict[str, m.Card]
    policy: m.Policy
    workers: list[m.WorkerState]
    """As they stood when the trace began."""
    qos: m.Qos
    """As learned by the end of the trace."""


async def record(arguments: argparse.Namespace) -> tuple[Live, list[str], Known]:
    """Steps 1 to 3."""
    fleet = load_fleet(arguments.fleet)
    prompts = read_prompts(arguments.queries, arguments.count)
    async with running(workers=arguments.workers, fleet=arguments.fleet, memory=arguments.memory) as url:
        nc = await nats.connect(url)
        bus = await Bus.connect(replace(Settings.from_env(), nats_url=url), "bench-fidelity")
        try:
            models, seen = ModelsView(bus), FleetView(bus)
            await models.start()
            await seen.start()
            asker = Asker(nc, arguments.max_tokens)
            await asker.start()
            for name in {card.variant: card.name for card in fleet.cards}.values():
                for prompt in prompts[: arguments.warm_up]:
                    await asker.ended(await asker.ask(prompt, name))
            async with asyncio.timeout(10):
                await models.ready.wait()
            state = seen.workers()
            gaps = np.random.default_rng(arguments.seed).exponential(1.0 / arguments.rate, len(prompts))
            asked: list[str] = []
            start = time.perf_counter()
            for prompt, at in zip(prompts, np.cumsum(gaps).tolist(), strict=True):
                await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
                asked.append(await asker.ask(prompt))
                print(f"\r{len(asked)} of {len(prompts)} asked", end="", file=sys.stderr, flush=True)
            await asyncio.gather(*(asker.ended(query_id) for query_id in asked))
            await asyncio.sleep(SETTLE_S)
            qos = msgspec.json.decode((await nc.request("calm.knowledge.qos", b"{}", timeout=5)).data, type=m.Qos)
            print(file=sys.stderr)
        finally:
            await nc.close()
            await bus.close()
    assert models.policy is not None
    return asker.live, asked, Known(dict(models.cards), models.policy, state, qos)


def simulate(live: Live, asked: list[str], known: Known) -> tuple[Result, list[str]]:
    """Step 4."""
    answered = [
        recorded.Answered(
            live.at[i], live.route[i], live.answer[i]["usage"]["tokens_in"], live.answer[i]["usage"]["tokens_out"]
        )
        for i in asked
    ]
    overhead_s = float(np.median([live.answer[i]["timings"]["overhead_s"] for i in asked]))
    built = recorded.build(answered, known.cards, known.workers, known.qos, known.policy, overhead_s)
    return recorded.simulate(built), list(built.fleet.names)


def compare(live: Live, asked: list[str], result: Result, names: list[str]) -> list[tuple[str, float, float, float]]:
    """(what, live, simulated, difference): relative for latency, absolute for shares."""
    latency = float(np.mean([live.latency[i] for i in asked]))
    hits = float(np.mean([live.answer[i]["timings"]["load_s"] < HIT_S for i in asked]))
    simulated = float(result.latency_s.mean())
    rows = [("mean latency, s", latency, simulated, simulated / latency - 1.0)]
    rows.append(("residency hits", hits, float(result.hit.mean()), float(result.hit.mean()) - hits))
    for column, name in enumerate(names):
        share = float(np.mean([live.answer[i]["artifact"] == name for i in asked]))
        mine = float(np.mean(result.model == column))
        rows.append((f"share of {name}", share, mine, mine - share))
    joules = float(np.mean([live.answer[i]["energy"]["joules"] for i in asked]))
    rows.append(("joules a query", joules, float(result.energy_j.mean()), float(result.energy_j.mean()) / joules - 1.0))
    return rows


def parts(live: Live, asked: list[str]) -> list[list[Any]]:
    """Where the live time went, on average."""
    keys = ("queue_s", "load_s", "prefill_s", "decode_s", "overhead_s")
    return [[key, float(np.mean([live.answer[i]["timings"][key] for i in asked]))] for key in keys]


def profile(known: Known) -> str:
    """A measured profile, as TOML."""
    lines = ['name = "measured"', f'description = "{known.workers[0].device.name}"', "shared = true", ""]
    specs = {card.artifact.name: card.artifact for card in known.cards.values()}
    for a in known.qos.artifacts:
        if a.artifact in specs and a.count:
            u = cost.unit_costs(specs[a.artifact], known.workers[0].device, a)
            figures = {
                "prefill_s": u.prefill_s, "tpot_s": u.tpot_s, "slope": cost.BATCH_SLOPE, "load_s": u.load_s,
                "prefill_j": u.prefill_j, "decode_j": u.decode_j, "load_j": u.load_j,
            }  # fmt: skip
            lines += [f'[artifacts."{a.artifact}"]', *(f"{key} = {value:.6g}" for key, value in figures.items()), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=Path, required=True, help="JSON lines with `prompt` or `question`; .gz too")
    parser.add_argument("--count", type=int, default=80)
    parser.add_argument("--rate", type=float, default=0.8, help="arrivals per second")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--fleet", default="embedded")
    parser.add_argument("--memory", default="", help="budget of each worker")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", type=Path, help="write what was measured as a profile")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    live, asked, known = asyncio.run(record(arguments))
    lost = [i for i in asked if i not in live.answer or i not in live.route]
    if lost:
        print(f"{len(lost)} queries were not answered", file=sys.stderr)
        sys.exit(1)
    result, names = simulate(live, asked, known)
    rows = compare(live, asked, result, names)
    print_machine(machine())
    print_table("live and simulated", ("figure", "live", "simulated", "difference"), rows)
    print_table("live seconds, on average", ("part", "s"), parts(live, asked))
    print(f"loads in the simulation: {result.loads}")
    if arguments.profile:
        arguments.profile.write_text(profile(known), encoding="utf-8")
    if arguments.json:
        write_json(arguments.json, {"benchmark": "fidelity", "machine": machine(), "rows": rows})
    sys.exit(0 if all(abs(row[3]) <= WITHIN for row in rows[:-1]) else 1)


if __name__ == "__main__":
    main()
