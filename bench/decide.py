"""What decisions cost: `python -m bench.decide [--cards 200] [--workers 50] [--residency-workers 1000]`.

A route decision as the planner takes it, with learned quality, exploration and explanation; and a residency pass with a
forecast. The fleet changes between any two decisions: queues grow and shrink, engines start and stop.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench.report import machine, percentiles, print_machine, print_table, write_json
from services.planner.decide import learned as learning
from services.planner.decide import residency, routing
from services.planner.decide.demand import Demand
from services.planner.decide.learned import Learned
from services.planner.decide.rooms import Forecast
from services.planner.decide.standing import Standings
from shared import messages as m
from shared.learn import features
from shared.learn.live import START, Learner, first_quality
from shared.runtime import settle_memory

GB = 10**9
HIDDEN = 384
DOMAINS = tuple(f"domain-{i}" for i in range(14))


def fleet(cards: int, workers: int, rng: np.random.Generator) -> tuple[dict[str, m.Card], list[m.WorkerState]]:
    """Cards with an artifact each, and workers that hold three of them."""
    made: dict[str, m.Card] = {}
    for i in range(cards):
        spec = m.ArtifactSpec(
            name=f"model-{i}-int8", model=f"model-{i}", variant="int8", weights_bytes=int(rng.uniform(1, 4) * GB),
            kv_bytes_per_token=1000, slots=16, context=4096,
        )  # fmt: skip
        domains = {d: float(rng.uniform(0.2, 0.8)) for d in DOMAINS}
        made[f"card-{i}"] = m.Card(name=f"card-{i}", artifact=spec, description=f"Model {i}", domains=domains)
    specs = [card.artifact for card in made.values()]
    device = m.Device(kind="cuda", name="gpu", memory_bytes=16 * GB)
    states = []
    for w in range(workers):
        held = rng.choice(cards, 3, replace=False)
        engines = [
            m.EngineState(artifact=specs[i].name, state="ready", footprint_bytes=specs[i].footprint_bytes, slots=16)
            for i in held
        ]
        states.append(
            m.WorkerState(worker=f"worker-{w}", host="h", device=device, budget_bytes=14 * GB, engines=engines)
        )
    return made, states


def taught(cards: Sequence[str], rng: np.random.Generator) -> Learned:
    """What is learned of the cards from answers to queries at random, a third of them judged."""
    learner = Learner(cards)
    first = rng.standard_normal((START, HIDDEN + len(features.FORM)))
    for row in first:
        learner.seen(row)
    learner.begin(first_quality(learner.cards, first, len(features.FORM)))
    for i in range(300):
        x, card = rng.standard_normal((1, first.shape[1]))[0], cards[int(rng.integers(len(cards)))]
        learner.heard(card, x, bool(rng.random() < 0.9), str(i), int(rng.integers(20, 400)))
        if i % 3 == 0:
            learner.judged(card, x, 0.5, float(rng.random() < 0.5), str(i))
    return Learned(learner, version=1)


def routes(cards: int, workers: int, count: int, rng: np.random.Generator) -> dict[str, list[float]]:
    """Seconds of each route decision: until the query goes on, in wall time and in this thread's CPU time; the
    candidates' terms, which are made once it has; and both."""
    made, states = fleet(cards, workers, rng)
    policy = m.Policy(fleet="bench")
    qos = m.Qos()
    standings, learned = Standings(), taught(list(made), rng)
    share = rng.dirichlet([0.3] * len(DOMAINS), count)
    spent, worked, explained = [], [], []
    for i in range(count):
        w = int(rng.integers(workers))
        engines = [msgspec.structs.replace(e, active=int(rng.integers(0, 16))) for e in states[w].engines]
        states[w] = msgspec.structs.replace(states[w], engines=engines)
        waiting = {f"model-{k}-int8": int(rng.integers(0, 40)) for k in rng.integers(0, cards, 40)}
        profile = m.Profile(
            domains=dict(zip(DOMAINS, share[i].tolist(), strict=True)),
            affinity={name: float(x) for name, x in zip(made, rng.uniform(0, 0.5, cards), strict=True)},
            tokens_in={f"model-{k}": 200 for k in range(cards)},
            embedding=rng.standard_normal(HIDDEN).astype("<f4").tobytes(),
            form=features.packed("What is it? (A) one (B) two"),
        )
        query = m.Query(prompt="x", expect=m.ExpectNumber())
        accepted = m.Accepted(query=query, query_id=str(i), deadline_at=1e12)
        analyzed = m.Analyzed(accepted=accepted, profile=profile)
        state = routing.State(
            cards=made, policy=policy, workers=list(states), qos=qos, waiting=waiting, standings=standings,
            learned=learned,
        )  # fmt: skip
        used, began = time.thread_time(), time.perf_counter()
        chance = routing.Chance(rng.standard_normal(learning.normals(learned, cards)), rng.random())
        choice = routing.choose(analyzed, state, 0.0, chance)
        chosen = time.perf_counter()
        worked.append(time.thread_time() - used)
        spent.append(chosen - began)
        route = choice.explained()
        explained.append(time.perf_counter() - chosen)
        assert len(route.candidates) == cards
        assert learned.learner is None or "readable" in route.candidates[0].terms
    both = [a + b for a, b in zip(spent, explained, strict=True)]
    name = f"route, {cards} cards x {workers} workers"
    return {
        name: spent[5:], f"{name}, CPU time": worked[5:], "its candidates explained, afterwards": explained[5:],
        "both": both[5:],
    }  # fmt: skip


def passes(cards: int, workers: int, count: int, rng: np.random.Generator) -> list[float]:
    """Seconds of each residency pass, half of the artifacts waited for."""
    made, states = fleet(cards, workers, rng)
    specs = {card.artifact.name: card.artifact for card in made.values()}
    names = list(specs)
    spent = []
    for _ in range(count):
        demand = {
            a: Demand(
                int(rng.integers(0, 30)), 100.0 if rng.random() < 0.5 else None, float(rng.exponential(1.0)), 190.0
            )
            for a in names
        }
        forecast = Forecast(
            artifacts={a: i for i, a in enumerate(names)}, utilities=rng.uniform(0, 1, (512, cards)),
            rates=np.full(512, 0.05),
        )  # fmt: skip
        began = time.perf_counter()
        residency.plan(
            workers=states, specs=specs, pinned=frozenset(), popularity={}, demand=demand, load_s={}, pending=[],
            held_back=frozenset(), policy=m.Policy(fleet="bench"), now=200.0, forecast=forecast,
        )  # fmt: skip
        spent.append(time.perf_counter() - began)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, default=200)
    parser.add_argument("--workers", type=int, default=50)
    parser.add_argument("--residency-workers", type=int, default=1000)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    settle_memory()  # as the planner does: what is made once is not what a decision costs
    found: dict[str, Any] = {
        **routes(arguments.cards, arguments.workers, arguments.count, rng),
        f"residency, {arguments.cards} cards x {arguments.residency_workers} workers": passes(
            arguments.cards, arguments.residency_workers, 10, rng
        ),
    }
    print_machine(machine())
    rows = [[name, len(s), *(f"{1e3 * v:.2f}" for v in percentiles(s).values())] for name, s in found.items()]
    print_table("milliseconds", ("decision", "runs", "p50", "p95", "p99"), rows)
    if arguments.json:
        write_json(arguments.json, {"benchmark": "decide", "machine": machine(),
                                    "seconds": {n: percentiles(s) for n, s in found.items()}})  # fmt: skip


if __name__ == "__main__":
    main()
