"""What a model costs in memory, what an evict gives back, what processes share, and how long loads take.

`python -m bench.memory [--json FILE]`: real workers, engine processes as a worker starts them, a real broker, and the
kernel's own figures (proportional set size: a page that n processes share counts 1/n in each). The memory of workers is
that of every process they have: supervisors, engines, spares, and the nursery that engines are forked from.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.report import machine, print_machine, print_table, write_json
from services.workers.children import Child
from services.workers.cradle import Cradle, possible
from services.workers.engine.cache import HostCache
from services.workers.engine.loader import give_back
from services.workers.engine.schedule import Release
from services.workers.protocol import Ready, Start
from shared import messages as m
from shared import subjects
from shared.broker import Broker
from shared.bus import Bus
from shared.errors import BusUnavailable
from shared.models.store import ModelStore
from shared.settings import Settings

TIMEOUT_S = 60.0
SETTLE_S = 2.0
"""After a load: what it needed for the while is given back by then."""
MB = 1e6
ALONE = {"CALM_WEIGHTS_CACHE": "off", "CALM_ENGINE_START": "spawn"}
"""Settings under which processes share no more than any two of the same program do."""


class Bench:
    """Engine processes over one artifact, with a broker of their own."""

    def __init__(self, settings: Settings, spec: m.ArtifactSpec, threads: int) -> None:
        self.settings = settings
        self.spec = spec
        self.device = m.Device(kind="cpu", name="cpu", threads=threads)
        self.name = 0
        self.cradle = Cradle() if settings.engine_start == "fork" and possible() else None

    async def new(self) -> Child:
        """A new engine process, as a worker on a CPU gets one."""
        return await Child.fork(self.cradle, self.spec.model) if self.cradle is not None else await Child.spawn()

    async def spare(self) -> Child:
        """A started engine that has imported everything and waits."""
        child = await self.new()
        before = -1.0
        while True:  # it says nothing until it is told something: it waits when it uses no more processor time
            await asyncio.sleep(0.3)
            now = psutil.Process(child.pid).cpu_times().user
            if now == before and (now > 0 or self.cradle is not None):
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
    seconds: dict[str, list[float]] = {
        "process_s": [],
        "new_s": [],
        "cold_s": [],
        "standby_s": [],
        "evict_s": [],
        "given_back": [],
    }
    standby: list[int] = []
    for _ in range(repeats):
        fresh = await Child.spawn()
        seconds["process_s"].append((await bench.load(fresh))[0])  # the start of a process of its own included
        await fresh.drain(1.0)
        began = time.perf_counter()
        fresh = await bench.new()
        await bench.load(fresh)
        seconds["new_s"].append(time.perf_counter() - began)
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


async def workers(settings: Settings, bus: Bus, spec: m.ArtifactSpec, count: int, extra: dict[str, str]) -> list[float]:
    """Memory of one worker that serves the model, of two, and so on to `count`: all their processes."""
    marker = f"bench-{uuid.uuid4().hex}"
    environ = {
        **os.environ, **extra, "CALM_DEVICE": "cpu", "CALM_WORKER_MEMORY": str(2 * spec.footprint_bytes),
        "CALM_BENCH": marker,
    }  # fmt: skip
    totals: list[float] = []
    started: list[asyncio.subprocess.Process] = []
    try:
        for index in range(count):
            name = f"m{index}"
            started.append(
                await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "services.workers", env={**environ, "CALM_WORKER_ID": name},
                    stdout=subprocess.DEVNULL,
                )
            )  # fmt: skip
            await load_on(bus, name, spec)
            await asyncio.sleep(SETTLE_S)
            totals.append(float(sum(memory_of(p) for p in marked(marker))))
    finally:
        for process in started:
            process.terminate()
        await asyncio.gather(*(process.wait() for process in started))
    return totals


async def load_on(bus: Bus, worker: str, spec: m.ArtifactSpec) -> None:
    """Have a worker load an artifact, as an executor would, as soon as it listens."""
    command = m.Load(
        op_id=uuid.uuid4().hex, worker=worker, spec=spec, reason="bench", expires_at=time.time() + TIMEOUT_S
    )  # fmt: skip
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                reply = await bus.ask(subjects.worker_request(worker, "load"), command, m.WorkerReply, TIMEOUT_S)
                break
            except BusUnavailable:
                await asyncio.sleep(0.1)
    if not reply.ok:
        raise RuntimeError(f"{worker} did not load {spec.name}: {reply.failure}")


def marked(marker: str) -> Iterator[psutil.Process]:
    """Processes that were started, or forked from one that was started, with the marker in their environment."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("CALM_BENCH") == marker:
                yield process


def memory_of(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return int(process.memory_full_info().pss)
    return 0


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
            first, _ = await bench.load(child := await bench.new())  # packs the weights, once per host
            await child.drain(1.0)
            result["loads"] = {"first_on_host_s": first, **await loads(bench, arguments.repeats)}
            if bench.cradle is not None:
                bench.cradle.close()
            for name, extra in (("shared", {}), ("alone", ALONE)):
                result[name] = {"bytes": await workers(settings, bus, spec, arguments.workers, extra)}
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
    names = ("first on host", "spawned", "forked", "cold, process waiting", "from standby", "evict")
    keys = ("first_on_host_s", "process_s", "new_s", "cold_s", "standby_s", "evict_s")
    print_table("seconds", names, [[times[key] for key in keys]])
    print(
        f"memory: waiting {times['spare_bytes'] / MB:.0f} MB, loaded {times['loaded_bytes'] / MB:.0f} MB,"
        f" standby {times['standby_bytes'] / MB:.0f} MB; an evict gives back {times['given_back']:.3f}"
    )
    rows = []
    for name in ("shared", "alone"):
        totals = result[name]["bytes"]
        result[name]["ratio"] = totals[-1] / totals[0]
        rows.append([name, totals[0] / MB, totals[-1] / MB, totals[-1] / totals[0]])
    columns = ("processes", "one worker, MB", f"{arguments.workers} workers, MB", "ratio")
    print_table("workers with the same model on one host, all their processes", columns, rows)


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
