"""What a model costs in memory, what an evict gives back, what processes share, and how long loads take.

`python -m bench.memory [--json FILE]`: engine processes as a worker starts them, a real broker, and the kernel's own
figures (proportional set size: a page that n processes share counts 1/n in each).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.report import machine, print_machine, print_table, write_json
from services.workers.children import Child
from services.workers.engine.cache import HostCache
from services.workers.engine.loader import give_back
from services.workers.engine.schedule import Release
from services.workers.protocol import Ready, Start
from shared import messages as m
from shared.broker import Broker
from shared.bus import Bus
from shared.models.store import ModelStore
from shared.settings import Settings

TIMEOUT_S = 60.0
SETTLE_S = 8.0
"""A worker has started and registered by then."""
MB = 1e6


class Bench:
    """Engine processes over one artifact, with a broker of their own."""

    def __init__(self, settings: Settings, spec: m.ArtifactSpec, threads: int) -> None:
        self.settings = settings
        self.spec = spec
        self.device = m.Device(kind="cpu", name="cpu", threads=threads)
        self.name = 0

    async def spare(self) -> Child:
        """A started engine that has imported everything and waits."""
        child = await Child.spawn()
        before = -1.0
        while True:  # it says nothing until it is told something: it waits when it uses no more processor time
            await asyncio.sleep(0.3)
            now = psutil.Process(child.pid).cpu_times().user
            if now == before and now > 0:
                return child
            before = now

    async def load(self, child: Child) -> tuple[float, Ready]:
        """Seconds until it serves, as the supervisor sees it."""
        self.name += 1
        began = time.perf_counter()
        await child.start(
            Start(worker=f"w{self.name}", spec=self.spec, device=self.device, power_w=1.0), lambda _state: None
        )
        ready = await child.wait_ready(TIMEOUT_S)
        return time.perf_counter() - began, ready


def kv_bytes(store: ModelStore, spec: m.ArtifactSpec) -> dict[str, float]:
    """Bytes of one slot by arithmetic, and as the kernel counts them when a slot is written and released."""
    shape = store.get(spec.model).architecture
    names = [f"{layer}.{side}" for layer in range(shape.layers) for side in ("key", "value")]
    size = (shape.kv_heads, spec.context, shape.head_size)
    process = psutil.Process()
    give_back()
    before = process.memory_full_info().uss
    cache = HostCache(names, 1, [size] * len(names), np.float32, m.Device(kind="cpu", name="cpu"))
    empty = process.memory_full_info().uss
    for array in cache._arrays.values():
        array[:] = 1
    give_back()
    full = process.memory_full_info().uss
    cache.apply(Release(0, 0))
    released = process.memory_full_info().uss
    return {
        "stated_bytes": float(spec.kv_bytes_per_token * spec.context), "empty_bytes": float(empty - before),
        "full_bytes": float(full - before), "given_back": (full - released) / (full - empty),
    }  # fmt: skip


async def loads(bench: Bench, repeats: int) -> dict[str, float]:
    """Medians of load times, and what evicting gives back."""
    seconds: dict[str, list[float]] = {"process_s": [], "cold_s": [], "standby_s": [], "evict_s": [], "given_back": []}
    standby: list[int] = []
    for _ in range(repeats):
        fresh = await Child.spawn()
        seconds["process_s"].append((await bench.load(fresh))[0])  # the start of the process included
        await fresh.drain(1.0)

        child = await bench.spare()
        idle = child.memory_bytes()
        seconds["cold_s"].append((await bench.load(child))[0])
        loaded = child.memory_bytes()
        standby.append(await child.park(5.0))
        seconds["standby_s"].append((await bench.load(child))[0])
        began = time.perf_counter()
        await child.drain(5.0)
        seconds["evict_s"].append(time.perf_counter() - began)
        seconds["given_back"].append((loaded - child.memory_bytes()) / loaded)
    figures = {name: statistics.median(values) for name, values in seconds.items()}
    return {**figures, "spare_bytes": float(idle), "loaded_bytes": float(loaded), "standby_bytes": float(standby[-1])}


async def sharing(bench: Bench, processes: int, *, shared: bool) -> dict[str, float]:
    """Memory of one engine alone, and of several with the same model, all of it."""
    os.environ["CALM_WEIGHTS_CACHE"] = str(bench.settings.weights_path) if shared else "off"
    children: list[Child] = []
    totals: list[float] = []
    for _ in range(processes):
        child = await Child.spawn()
        await bench.load(child)
        children.append(child)
        totals.append(float(sum(c.memory_bytes() for c in children)))
    await asyncio.gather(*(child.drain(1.0) for child in children))
    return {"one_bytes": totals[0], "all_bytes": totals[-1], "ratio": totals[-1] / totals[0]}


async def workers(settings: Settings, count: int) -> float:
    """Memory of so many worker supervisors without engines, measured once they have settled."""
    environ = {**os.environ, "CALM_SPARE_ENGINES": "0"}
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.workers",
            env={**environ, "CALM_WORKER_ID": f"m{i}", "CALM_HOME": str(settings.home), "CALM_DEVICE": "cpu"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for i in range(count)
    ]  # fmt: skip
    await asyncio.sleep(SETTLE_S)
    total = float(sum(psutil.Process(p.pid).memory_full_info().pss for p in processes))
    for process in processes:
        process.terminate()
    await asyncio.gather(*(process.wait() for process in processes))
    return total


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"benchmark": "memory", "machine": machine()}
    print_machine(result["machine"])
    with tempfile.TemporaryDirectory() as folder:
        broker = await Broker.start(Path(folder) / "nats")
        own = Settings.from_env()
        home = Path(folder) / "home"
        settings = replace(own, nats_url=broker.url, home=home, models_dir=arguments.store or own.models_path)
        os.environ |= {
            "CALM_NATS_URL": broker.url, "CALM_HOME": str(home), "CALM_MODELS_DIR": str(settings.models_path),
            "CALM_LOG_LEVEL": "error",
        }  # fmt: skip
        bus = await Bus.connect(settings, "bench")
        await bus.ensure()
        store = ModelStore(settings.models_path)
        variant = store.variant(arguments.model, arguments.variant)
        spec = store.get(arguments.model).artifact(
            variant, slots=arguments.slots, context=arguments.context, overhead_bytes=0
        )
        try:
            bench = Bench(settings, spec, arguments.threads)
            result["weights_bytes"] = variant.weights_bytes
            result["kv_slot"] = kv_bytes(store, spec)
            first, _ = await bench.load(child := await Child.spawn())  # packs the weights, once per host
            await child.drain(1.0)
            result["loads"] = {"first_on_host_s": first, **await loads(bench, arguments.repeats)}
            result["shared"] = await sharing(bench, arguments.workers, shared=True)
            result["unshared"] = await sharing(bench, arguments.workers, shared=False)
            one, many = await workers(settings, 1), await workers(settings, arguments.workers)
            result["supervisors"] = {"one_bytes": one, "all_bytes": many}
        finally:
            await bus.close()
            await broker.stop()
    show(result, arguments)
    return result


def show(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    kv, times = result["kv_slot"], result["loads"]
    title = f"\n{arguments.model} {arguments.variant}, {arguments.context} tokens a slot"
    print(f"{title}: weights {result['weights_bytes'] / MB:.0f} MB, a KV slot {kv['stated_bytes'] / MB:.1f} MB")
    print(
        f"a KV slot as measured: {kv['empty_bytes'] / MB:.1f} MB empty, {kv['full_bytes'] / MB:.1f} MB full,"
        f" {kv['given_back']:.3f} of it given back"
    )
    names = ("first on host", "process start included", "cold, from a spare", "from standby", "evict")
    keys = ("first_on_host_s", "process_s", "cold_s", "standby_s", "evict_s")
    print_table("seconds", names, [[times[key] for key in keys]])
    print(
        f"memory: spare {times['spare_bytes'] / MB:.0f} MB, loaded {times['loaded_bytes'] / MB:.0f} MB,"
        f" standby {times['standby_bytes'] / MB:.0f} MB; an evict gives back {times['given_back']:.3f}"
    )
    extra = result["supervisors"]
    rows = []
    for name in ("shared", "unshared"):
        figures = result[name]
        one, many = figures["one_bytes"] + extra["one_bytes"], figures["all_bytes"] + extra["all_bytes"]
        figures["with_supervisors_ratio"] = many / one
        rows.append([name, figures["one_bytes"] / MB, figures["all_bytes"] / MB, figures["ratio"], many / one])
    columns = ("weights", "one engine, MB", f"{arguments.workers} engines, MB", "ratio", "ratio of whole workers")
    print_table("engines with the same model on one host", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--variant", default="int8")
    parser.add_argument("--store", type=Path, help="model store; the user's own when left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = asyncio.run(measure(arguments))
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
