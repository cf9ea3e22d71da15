"""How fast the simulator is: `python -m bench.sim.speed [--queries 20000]`.

Synthetic queries on models of 4 to 9 B parameters, all resident, at about half of the fleet's capacity; quality and
length are given beforehand, as they are when a whole trace is predicted in one go. The time is that of the event loop,
routing decisions included.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from bench.report import machine, print_machine, print_table, write_json
from services.simulator.engine import Simulation, Workload
from services.simulator.fleet import File, Head, SimModel, SimWorker, build
from services.simulator.profile import load_profile
from services.simulator.residency import Fixed
from services.simulator.routers import Scored
from shared import messages as m


def once(models: int, workers: int, queries: int, rate_per_s: float, seed: int = 0) -> tuple[float, float]:
    """(queries per second of wall time, mean simulated latency in seconds)."""
    rng = np.random.default_rng(seed)
    names = [f"model-{i}" for i in range(models)]
    memory = 18 * max(3, -(-models // workers))
    file = File(
        fleet=Head(name="speed", profile="h100"),
        models=[SimModel(name=name, parameters_b=float(rng.uniform(4, 9)), memory="18 GB") for name in names],
        workers=[SimWorker(name="worker", count=workers, memory=f"{memory} GB")],
    )
    fleet = build(file, load_profile("h100"), names)
    quality = rng.uniform(0.2, 0.6, (queries, models))
    tokens = rng.gamma(2.0, 60.0, (queries, models)) + 1.0
    work = Workload(
        arrival_s=np.cumsum(rng.exponential(1.0 / rate_per_s, queries)), row=np.arange(queries),
        tokens_in=rng.uniform(50, 400, queries), tokens_out=tokens, score=quality,
    )  # fmt: skip
    policy = m.Policy(fleet="speed", w_latency=0.1, w_energy=0.02)
    simulation = Simulation(fleet, work, Scored(quality, work.tokens_in, tokens, policy), Fixed())
    began = time.perf_counter()
    result = simulation.run()
    return queries / (time.perf_counter() - began), float(result.latency_s.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cases = [(10, 4, arguments.queries, 8.0), (50, 20, arguments.queries, 40.0), (200, 1000, 2_000, 2000.0)]
    rows = [[f"{k} models, {w} workers", n, *once(k, w, n, rate)] for k, w, n, rate in cases]
    print_machine(machine())
    print_table("speed", ("fleet", "queries", "queries/s of wall time", "mean latency s"), rows)
    if arguments.json:
        write_json(arguments.json, {"benchmark": "sim-speed", "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
