"""Is the simulator faithful? One short trace, live on an embedded fleet and simulated with that machine's own figures.

`python -m bench.fidelity --queries FILE [--count 80] [--rate 0.8] [--workers 1] [--profile FILE] [--json FILE]`

1. The system starts and is asked `--warm-up` questions of each model by name, one at a time: it learns its unit costs.
2. Those are read from its knowledge base (and written as a measured profile with `--profile`).
3. The trace runs live: Poisson arrivals, any model, at most `--max-tokens` tokens each.
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
from dataclasses import dataclass, field
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
from services.simulator.engine import READY, Result, Simulation, Workload
from services.simulator.fleet import SimFleet, SimModel
from services.simulator.planned import Options, Planned, warm_utilities
from services.simulator.profile import UnitCosts
from services.simulator.routers import Scored
from shared import codec, subjects
from shared import messages as m
from shared.models.fleet_file import load_fleet

WITHIN = 0.15
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


async def workers(nc: Client) -> list[m.WorkerState]:
    """The live workers, as they announce themselves."""
    bucket = await nc.jetstream().key_value("calm_fleet")
    entries = [await bucket.get(key) for key in await bucket.keys()]
    return [codec.unpack(e.value, m.WorkerState) for e in entries if e.value and e.key.startswith("worker.")]


async def record(arguments: argparse.Namespace) -> tuple[Live, list[str], m.Qos, list[m.WorkerState], list[float]]:
    """Steps 1 to 3."""
    fleet = load_fleet(arguments.fleet)
    prompts = read_prompts(arguments.queries, arguments.count)
    async with running(workers=arguments.workers, fleet=arguments.fleet, memory=arguments.memory) as url:
        nc = await nats.connect(url)
        try:
            asker = Asker(nc, arguments.max_tokens)
            await asker.start()
            one_each = {card.variant: card.name for card in fleet.cards}
            for name in one_each.values():
                for prompt in prompts[: arguments.warm_up]:
                    await asker.ended(await asker.ask(prompt, name))
            overhead = [a["timings"]["overhead_s"] for a in asker.live.answer.values()]
            await asyncio.sleep(2.0)  # the QoS figures of the last answers
            qos = msgspec.json.decode((await nc.request("calm.knowledge.qos", b"{}", timeout=5)).data, type=m.Qos)
            state = await workers(nc)
            gaps = np.random.default_rng(arguments.seed).exponential(1.0 / arguments.rate, len(prompts))
            asked: list[str] = []
            start = time.perf_counter()
            for prompt, at in zip(prompts, np.cumsum(gaps).tolist(), strict=True):
                await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
                asked.append(await asker.ask(prompt))
                print(f"\r{len(asked)} of {len(prompts)} asked", end="", file=sys.stderr, flush=True)
            await asyncio.gather(*(asker.ended(query_id) for query_id in asked))
            print(file=sys.stderr)
        finally:
            await nc.close()
    return asker.live, asked, qos, state, overhead


def simulate(
    live: Live, asked: list[str], qos: m.Qos, state: list[m.WorkerState], overhead: list[float], fleet_name: str
) -> tuple[Result, list[str]]:
    """Step 4."""
    fleet_file = load_fleet(fleet_name)
    specs = {c.artifact for i in asked for c in live.route[i].candidates}
    learned = {a.artifact: a for a in qos.artifacts}
    names = sorted(specs)
    sizes = {e.artifact: e for w in state for e in w.engines}
    unit: list[tuple[UnitCosts, ...]] = []
    footprint: list[int] = []
    for name in names:
        row, a = [], learned[name]
        for w in state:
            spec = m.ArtifactSpec(name=name, model=name, variant="", weights_bytes=1, kv_bytes_per_token=0, slots=8,
                                  context=1)  # fmt: skip
            u = cost.unit_costs(spec, w.device, a)
            row.append(UnitCosts(u.prefill_s, u.tpot_s, cost.BATCH_SLOPE, u.load_s, u.prefill_j, u.decode_j, u.load_j,
                                 (0.0, u.decode_j)))  # fmt: skip
        unit.append(tuple(row))
        footprint.append(sizes[name].footprint_bytes if name in sizes else FOOTPRINTS.get(name, 10**9))
    budgets = tuple(w.budget_bytes for w in state)
    sim_fleet = SimFleet(
        name=fleet_name, models=tuple(SimModel(name=n, parameters_b=1.0, memory=f, slots=8) for n, f in
                                      zip(names, footprint, strict=True)),
        workers=tuple(w.worker for w in state), budget_bytes=budgets, footprint_bytes=tuple(footprint),
        unit=tuple(unit), fits=np.less_equal.outer(np.array(footprint), np.array(budgets)), shared=True,
        overhead_s=float(np.median(overhead)),
    )  # fmt: skip
    n, k = len(asked), len(names)
    quality, predicted = np.full((n, k), -np.inf), np.full((n, k), 64.0)
    tokens_in, tokens_out = np.zeros(n), np.zeros((n, k))
    for i, query_id in enumerate(asked):
        usage = live.answer[query_id]["usage"]
        tokens_in[i], tokens_out[i] = usage["tokens_in"], usage["tokens_out"]
        for c in live.route[query_id].candidates:
            column = names.index(c.artifact)
            if c.excluded is None and c.quality > quality[i, column]:
                quality[i, column], predicted[i, column] = c.quality, c.terms["tokens_out"]
    weights = next(iter(live.route[i].weights for i in asked))
    policy = m.Policy(
        fleet=fleet_name, w_quality=weights["w_q"], w_latency=weights["w_l"], w_energy=weights["w_e"],
        latency_slo_s=fleet_file.qos.latency_slo_s, energy_ref_j=fleet_file.qos.energy_ref_j,
    )  # fmt: skip
    start = live.at[asked[0]]
    work = Workload(np.array([live.at[i] - start for i in asked]), np.arange(n), tokens_in, tokens_out, np.ones((n, k)))
    warm = warm_utilities(sim_fleet, np.where(np.isfinite(quality), quality, -10.0), tokens_in, predicted, policy)
    resident = [[names.index(e.artifact) for e in w.engines if e.state == "ready"] for w in state]
    planned = _Resident(
        resident, lambda i, _m: warm[i],
        [policy.w_energy * unit[c][0].load_j / policy.energy_ref_j for c in range(k)], work.arrival_s,
        second_cost=policy.w_latency * 0.5 / (np.log(2.0) * policy.latency_slo_s),
        options=Options(
            min_residence_s=fleet_file.residency.min_residence_s, max_wait_s=fleet_file.residency.max_wait_s, tick_s=0.5
        ),
    )  # fmt: skip
    simulation = Simulation(sim_fleet, work, Scored(quality, tokens_in, predicted, policy), planned)
    simulation.scoring.shared = (False,) * len(state)  # as live: what is learned contains the sharing
    return simulation.run(), names


FOOTPRINTS: dict[str, int] = {}
"""By artifact, as seen while they were resident."""


class _Resident(Planned):
    """Starts with what was resident live."""

    def __init__(self, resident: list[list[int]], *more: Any, **named: Any) -> None:
        super().__init__(*more, order=(), **named)
        self._resident = resident

    def start(self, sim: Simulation) -> None:
        super().start(sim)
        for worker, models in enumerate(self._resident):
            for model in models:
                placed = sim.place(model, worker)
                assert placed
                assert sim.engines[worker][model].state == READY


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


def profile(qos: m.Qos, names: list[str], state: list[m.WorkerState]) -> str:
    """A measured profile, as TOML."""
    lines = ['name = "measured"', f'description = "{state[0].device.name}"', "shared = true", ""]
    for a in qos.artifacts:
        if a.artifact in names and a.count:
            spec = m.ArtifactSpec(name=a.artifact, model="", variant="", weights_bytes=1, kv_bytes_per_token=0, slots=8,
                                  context=1)  # fmt: skip
            u = cost.unit_costs(spec, state[0].device, a)
            figures = {"prefill_s": u.prefill_s, "tpot_s": u.tpot_s, "slope": cost.BATCH_SLOPE, "load_s": u.load_s,
                       "prefill_j": u.prefill_j, "decode_j": u.decode_j, "load_j": u.load_j}  # fmt: skip
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
    live, asked, qos, state, overhead = asyncio.run(record(arguments))
    lost = [i for i in asked if i not in live.answer or i not in live.route]
    if lost:
        print(f"{len(lost)} queries were not answered", file=sys.stderr)
        sys.exit(1)
    result, names = simulate(live, asked, qos, state, overhead, arguments.fleet)
    rows = compare(live, asked, result, names)
    print_machine(machine())
    print_table("live and simulated", ("figure", "live", "simulated", "difference"), rows)
    print(f"loads in the simulation: {result.loads}")
    if arguments.profile:
        arguments.profile.write_text(profile(qos, names, state), encoding="utf-8")
    if arguments.json:
        write_json(arguments.json, {"benchmark": "fidelity", "machine": machine(), "rows": rows})
    sys.exit(0 if all(abs(row[3]) <= WITHIN for row in rows[:-1]) else 1)


if __name__ == "__main__":
    main()
