"""The gateway by itself: behind it a monitor that answers at once, so that nothing else takes time.

`python -m bench.http_echo --rounds 2000`
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nats
from aiohttp import ClientSession, TCPConnector
from nats.aio.msg import Msg

from bench.http import Ask, OverHttp, OverNats, added_by, address
from bench.report import machine, percentiles, print_machine, print_table, write_json
from shared import codec, subjects
from shared import messages as m
from shared.broker import Broker
from shared.bus import Bus
from shared.runtime import run_loop
from shared.settings import Settings

MODEL = "echo"
WARM_UP = 200
TEXT = "The capital of France is Paris."


async def answer_at_once(url: str) -> None:
    """Play monitor and fleet: one card, one worker, and the same answer to every query, as one chunk if streamed."""
    bus = await Bus.connect(Settings(nats_url=url), "echo")
    await bus.ensure()
    spec = m.ArtifactSpec(
        name="echo-int8", model="echo", variant="int8", weights_bytes=1, kv_bytes_per_token=1, slots=1, context=1024
    )
    state = m.WorkerState(worker="echo", host="", device=m.Device(kind="cpu", name="none"), budget_bytes=1)

    async def on_query(message: Msg) -> None:
        query = codec.from_json(message.data, m.Query)
        query_id = query.id or "unnamed"
        if query.stream:
            chunk = m.Chunk(id=query_id, seq=0, attempt=1, text=TEXT, model=MODEL)
            await bus.reply(message.reply, chunk, "json")
        await bus.reply(message.reply, _answer(query_id), "json")

    await bus.subscribe(subjects.QUERY, on_query)
    await bus.kv_put(subjects.BUCKET_MODELS, subjects.POLICY_KEY, m.Policy(fleet="echo"))
    await bus.kv_put(subjects.BUCKET_MODELS, MODEL, m.Card(name=MODEL, artifact=spec, description=""))
    while True:
        await bus.kv_put(subjects.BUCKET_FLEET, subjects.fleet_key("echo"), state)
        await asyncio.sleep(1.0)


def _answer(query_id: str) -> m.Answer:
    return m.Answer(
        id=query_id, text=TEXT, model=MODEL, artifact="echo-int8", worker="echo", attempt=1, finish_reason="stop",
        why="echo has the best utility for general: 0.408 (quality 0.42, about 0.3 s and 6 J), before none",
        usage=m.Usage(tokens_in=20, tokens_out=8), energy=m.Energy(joules=4.2, source="model"),
        timings=m.Timings(queue_s=0.0, load_s=0.0, prefill_s=0.1, decode_s=0.2, overhead_s=0.005, total_s=0.305),
        confidence=m.Confidence(mean_logprob=-0.1, min_logprob=-1.0, mean_entropy=0.2),
    )  # fmt: skip


@contextlib.asynccontextmanager
async def started() -> AsyncIterator[tuple[str, ClientSession]]:
    """A broker, the player and a gateway; the broker's URL and an HTTP client."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="calm-bench-")))
        broker = await Broker.start(folder)
        stack.push_async_callback(broker.stop)
        environment = {**os.environ, "CALM_NATS_URL": broker.url, "CALM_HTTP": "127.0.0.1:0", "CALM_LOG_LEVEL": "error"}
        for module in (["bench.http_echo", "--play", broker.url], ["services.gateway"]):
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-m", *module, env=environment, stderr=subprocess.DEVNULL
            )
            stack.push_async_callback(child.wait)
            stack.callback(child.terminate)
        nc = await nats.connect(broker.url)
        stack.push_async_callback(nc.close)
        http = await stack.enter_async_context(
            ClientSession(await address(nc), connector=TCPConnector(limit=0))
        )  # fmt: skip
        async with asyncio.timeout(20):
            while True:
                async with http.get("/ready") as response:
                    if response.status == 200:
                        break
                await asyncio.sleep(0.1)  # the gateway looks at the fleet by itself
        yield broker.url, http


async def one_at_a_time(asks: dict[str, Ask], rounds: int) -> dict[str, list[float]]:
    """Seconds of each whole and each streamed answer, in turns."""
    taken: dict[str, list[float]] = {}
    for number in range(-WARM_UP, rounds):
        for stream in (False, True):
            for way, ask in asks.items():
                first, end = await ask("hello there", stream)
                if number >= 0:
                    taken.setdefault(f"{way}, first text" if stream else f"{way}, whole", []).append(
                        first if stream else end
                    )
    return taken


async def at_once(ask: Ask, count: int, in_flight: int) -> float:
    """Answers a second in a closed loop."""
    left = iter(range(count))

    async def loop() -> None:
        for _ in left:
            await ask("hello there", False)

    began = time.perf_counter()
    await asyncio.gather(*(loop() for _ in range(in_flight)))
    return count / (time.perf_counter() - began)


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    async with started() as (url, http):
        nc = await nats.connect(url)
        over_nats = OverNats(nc, MODEL, named=True)
        await over_nats.start()
        asks: dict[str, Ask] = {"NATS": over_nats.ask, "HTTP": OverHttp(http, MODEL).ask}
        taken = await one_at_a_time(asks, arguments.rounds)
        rates = {way: [await at_once(ask, arguments.rounds * 2, arguments.in_flight) for _ in range(3)]
                 for way, ask in asks.items()}  # fmt: skip
        await nc.close()
    added = {
        what: added_by(taken[f"HTTP, {what}"], taken[f"NATS, {what}"]) for what in ("whole", "first text")
    }  # fmt: skip
    return {
        "benchmark": "http_echo", "machine": machine(), "rounds": arguments.rounds, "in_flight": arguments.in_flight,
        "figures": {name: percentiles(values) for name, values in taken.items()}, "added": added, "rates": rates,
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """Print the result as tables."""
    print_machine(result["machine"])
    rows = [[name, 1e3 * of["p50"], 1e3 * of["p95"], 1e3 * of["p99"]] for name, of in sorted(result["figures"].items())]
    print_table(f"{result['rounds']} rounds, one query at a time, ms", ("", "p50", "p95", "p99"), rows)
    rows = [[what, *(1e3 * value for value in of)] for what, of in result["added"].items()]
    print_table("added by HTTP in the same round, ms", ("", "p25", "p50", "p75"), rows)
    rows = [[way, *sorted(of)] for way, of in result["rates"].items()]
    print_table(f"answers a second, {result['in_flight']} in flight, three times", ("", "low", "middle", "high"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--play", metavar="URL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.play:
        asyncio.run(answer_at_once(arguments.play))
        return
    result = run_loop(run(arguments))
    show(result)
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
