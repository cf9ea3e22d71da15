"""What the HTTP gateway adds to a query: the same client asks over NATS and over HTTP, in turns.

`python -m bench.http --rounds 300`
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import quantiles
from typing import Any

import nats
from aiohttp import ClientSession
from nats.aio.client import Client
from nats.aio.msg import Msg

from bench.report import machine, percentiles, print_machine, print_table, write_json
from bench.system import running
from shared import codec, subjects
from shared import messages as m
from shared.runtime import run_loop

DESCRIPTION = {
    "whole": "one answer of one token, until it is there",
    "first": "a stream, until its first text",
    "end": "the same stream of 6 tokens, until its end",
}
STREAM_TOKENS = 6
WARM_UP = 20
Ask = Callable[[str, bool], Awaitable[tuple[float, float]]]
"""From a prompt, and whether to stream: seconds to the first text and to the end."""


class OverNats:
    """A plain NATS client. With `named` its queries have ids, as those of the gateway have, which must be able to
    cancel them: the intake then looks whether the query is known."""

    def __init__(self, nc: Client, model: str, *, named: bool) -> None:
        self._nc = nc
        self._model = model
        self._named = named
        self._inbox = nc.new_inbox()
        self._tokens = itertools.count()
        self._waiting: dict[str, asyncio.Queue[Msg]] = {}

    async def start(self) -> None:
        async def on_message(message: Msg) -> None:
            self._waiting[message.subject.rpartition(".")[2]].put_nowait(message)

        await self._nc.subscribe(f"{self._inbox}.*", cb=on_message)

    async def ask(self, prompt: str, stream: bool) -> tuple[float, float]:
        token = str(next(self._tokens))
        replies = self._waiting[token] = asyncio.Queue()
        query: dict[str, Any] = {
            "messages": [{"role": "user", "content": prompt}], "model": self._model, "stream": stream,
            "max_tokens": STREAM_TOKENS if stream else 1,
        }  # fmt: skip
        if self._named:
            query["id"] = uuid.uuid4().hex
        began, first = time.perf_counter(), 0.0
        await self._nc.publish("calm.query", json.dumps(query).encode(), reply=f"{self._inbox}.{token}")
        while True:
            reply = json.loads((await replies.get()).data)
            first = first or time.perf_counter() - began
            if reply["type"] == "answer.v1":
                del self._waiting[token]
                return first, time.perf_counter() - began
            if reply["type"] == "error.v1":
                raise RuntimeError(reply["message"])


class OverHttp:
    """A plain HTTP client that keeps its connection."""

    def __init__(self, http: ClientSession, model: str) -> None:
        self._http = http
        self._model = model

    async def ask(self, prompt: str, stream: bool) -> tuple[float, float]:
        query = {
            "messages": [{"role": "user", "content": prompt}], "model": self._model, "stream": stream,
            "max_tokens": STREAM_TOKENS if stream else 1,
        }  # fmt: skip
        began, first = time.perf_counter(), 0.0
        async with self._http.post("/v1/chat/completions", json=query) as response:
            if response.status != 200:
                raise RuntimeError(await response.text())
            if stream:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        json.loads(line.removeprefix(b"data: "))
                        first = first or time.perf_counter() - began
            else:
                json.loads(await response.read())
        ended = time.perf_counter() - began
        return first or ended, ended


async def address(nc: Client) -> str:
    """Where the gateway listens, as its heartbeat says."""
    found: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def on_beat(message: Msg) -> None:
        beat = codec.unpack(message.data, m.Heartbeat)
        if beat.detail and not found.done():
            found.set_result(beat.detail)

    subscription = await nc.subscribe(subjects.health("gateway"), cb=on_beat)
    url = await asyncio.wait_for(found, 10)
    await subscription.unsubscribe()
    return url


async def turns(asks: dict[str, Ask], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Everyone in turns, each round in another order; by way and figure, seconds of each round. No two prompts are the
    same or begin alike, so that none is read from the cache of another."""
    taken: dict[str, dict[str, list[float]]] = {way: {"whole": [], "first": [], "end": []} for way in asks}
    ways = list(asks)
    for number in range(-WARM_UP, rounds):
        for turn in range(len(ways)):
            way = ways[(number + turn) % len(ways)]
            prompt = f"{uuid.uuid4().hex[:8]}: name one colour of the rainbow."
            _, whole = await asks[way](prompt, False)
            first, end = await asks[way](f"{uuid.uuid4().hex[:8]}: describe the sea in a few words.", True)
            if number >= 0:
                for name, seconds in (("whole", whole), ("first", first), ("end", end)):
                    taken[way][name].append(seconds)
        print(f"\r{max(0, number + 1)}/{rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return taken


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start the system with a gateway, and ask."""
    async with contextlib.AsyncExitStack() as stack:
        url = await stack.enter_async_context(running(workers=1, fleet=arguments.fleet, http=True))
        nc = await nats.connect(url)
        stack.push_async_callback(nc.close)
        http = await stack.enter_async_context(ClientSession(await address(nc)))
        over = {
            "NATS": OverNats(nc, arguments.model, named=False),
            "NATS, with id": OverNats(nc, arguments.model, named=True),
        }
        for one in over.values():
            await one.start()
        asks: dict[str, Ask] = {
            **{way: one.ask for way, one in over.items()},
            "HTTP": OverHttp(http, arguments.model).ask,
        }
        taken = await turns(asks, arguments.rounds)
    figures = {way: {name: percentiles(values) for name, values in of.items()} for way, of in taken.items()}
    added = {way: {name: added_by(of[name], taken["NATS"][name]) for name in of} for way, of in taken.items()}
    return {"benchmark": "http", "machine": machine(), "rounds": arguments.rounds, "figures": figures, "added": added}


def added_by(values: list[float], base: list[float]) -> list[float]:
    """Quartiles of what each round took longer than the same round over NATS, in seconds."""
    return quantiles((value - other for value, other in zip(values, base, strict=True)), n=4)


def show(result: dict[str, Any]) -> None:
    """Print the result as a table, in milliseconds."""
    print_machine(result["machine"])
    rows = []
    for name, text in DESCRIPTION.items():
        for way, of in result["figures"].items():
            low, middle, high = (1e3 * value for value in result["added"][way][name])
            added = ["", ""] if way == "NATS" else [middle, f"{low:.2f} to {high:.2f}"]
            rows.append([f"{text}: {way}", 1e3 * of[name]["p50"], 1e3 * of[name]["p95"], *added])
    columns = ("ms, one query at a time", "p50", "p95", "added, median of rounds", "quartiles")
    print_table(f"{result['rounds']} rounds", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--fleet", default="embedded")
    parser.add_argument("--model", default="smollm2", help="a card; with routing both ways would have other models")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    result = run_loop(run(arguments))
    show(result)
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
