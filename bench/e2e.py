"""End to end: asks the questions of a file over `calm.query`, a plain NATS client, and accounts for every one.

`python -m bench.e2e --queries FILE --limit 200 --concurrency 16 --workers 2`
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from bench.accounting import Asked, figures, totals
from bench.report import machine, print_machine, print_table, write_json
from bench.system import running

LATE_S = 1.0
"""After the last answer, doubles are listened for this long."""


def read_prompts(path: Path, limit: int) -> list[str]:
    """The `prompt` or `question` of each line of a JSON-lines file, plain or gzipped."""
    opener = gzip.open if path.suffix == ".gz" else open
    prompts: list[str] = []
    with opener(path, "rt") as file:
        for line in file:
            row = json.loads(line)
            prompts.append(row.get("prompt") or row["question"])
            if len(prompts) == limit:
                break
    return prompts


async def ask_all(nc: Client, prompts: list[str], arguments: argparse.Namespace) -> tuple[list[Asked], float]:
    """A closed loop with a fixed number of queries in flight; what came of each, and the wall time."""
    inbox = nc.new_inbox()
    asked: dict[str, Asked] = {}
    ended: dict[str, asyncio.Event] = {}

    async def on_message(message: Msg) -> None:
        body = json.loads(message.data)
        query_id = message.subject.rsplit(".", 1)[1]
        if asked[query_id].take(body, time.perf_counter()):
            ended[query_id].set()

    subscription = await nc.subscribe(f"{inbox}.*", cb=on_message)
    slots = asyncio.Semaphore(arguments.concurrency)
    finished = 0

    async def one(prompt: str) -> None:
        nonlocal finished
        async with slots:
            query_id = uuid.uuid4().hex
            query = {
                "prompt": prompt, "stream": True, "max_tokens": arguments.max_tokens, "deadline_s": arguments.deadline
            }  # fmt: skip
            if arguments.model:
                query["model"] = arguments.model
            ended[query_id] = asyncio.Event()
            asked[query_id] = Asked(query_id, time.perf_counter())
            await nc.publish("calm.query", json.dumps(query).encode(), reply=f"{inbox}.{query_id}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(arguments.deadline + 10):
                    await ended[query_id].wait()
            finished += 1
            print(f"\r{finished}/{len(prompts)}", end="", file=sys.stderr, flush=True)

    began = time.perf_counter()
    await asyncio.gather(*(one(prompt) for prompt in prompts))
    wall_s = time.perf_counter() - began
    await asyncio.sleep(LATE_S)
    await subscription.unsubscribe()
    print(file=sys.stderr)
    return list(asked.values()), wall_s


async def counts(nc: Client) -> dict[str, Any]:
    """What the knowledge base says it has seen."""
    reply = await nc.request("calm.knowledge.counts", b"{}", timeout=5)
    result: dict[str, Any] = json.loads(reply.data)
    return result


async def agreement(nc: Client, before: dict[str, Any], asked: list[Asked]) -> dict[str, Any]:
    """Whether the knowledge base grew by just what happened, overall and by model."""
    wanted = totals(asked)
    answered: dict[str, int] = {}
    for a in asked:
        if a.answer:
            answered[a.answer["model"]] = answered.get(a.answer["model"], 0) + 1
    grown: dict[str, Any] = {}
    for _ in range(50):  # the recorder writes in batches: give it up to five seconds
        after = await counts(nc)
        grown = {k: after.get(k, 0) - before.get(k, 0) for k in ("accepted", "answered", "failed")}
        old = before.get("by_card", {})
        grown["by_card"] = {k: v - old.get(k, 0) for k, v in after.get("by_card", {}).items() if v != old.get(k, 0)}
        if grown["accepted"] == wanted["accepted"] and grown["by_card"] == answered:
            break
        await asyncio.sleep(0.1)
    agrees = grown["accepted"] == wanted["accepted"] and grown["by_card"] == answered
    return {"agrees": agrees, "knowledge": grown, "clients": {"accepted": wanted["accepted"], "by_card": answered}}


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start or find the system, ask, and put the result together."""
    prompts = read_prompts(arguments.queries, arguments.limit)
    async with contextlib.AsyncExitStack() as stack:
        url = arguments.nats or await stack.enter_async_context(
            running(workers=arguments.workers, fleet=arguments.fleet, memory=arguments.memory)
        )
        nc = await nats.connect(url)
        try:
            before = await counts(nc)
            asked, wall_s = await ask_all(nc, prompts, arguments)
            knowledge = await agreement(nc, before, asked)
        finally:
            await nc.close()
    by_model: dict[str, list[Asked]] = {}
    for a in asked:
        if a.answer:
            by_model.setdefault(a.answer["model"], []).append(a)
    return {
        "benchmark": "e2e",
        "arguments": {k: str(v) for k, v in vars(arguments).items() if v is not None},
        "machine": machine(),
        "wall_s": wall_s,
        **totals(asked),
        "all": figures(asked, wall_s),
        "models": {name: figures(group, wall_s) for name, group in sorted(by_model.items())},
        "knowledge": knowledge,
    }


def show(result: dict[str, Any]) -> None:
    """Print the result as tables."""
    print_machine(result["machine"])
    keys = ("sent", "accepted", "answered", "failed", "lost", "duplicated", "restarted")
    print_table("queries", keys, [[result[k] for k in keys]])
    if result["failures"]:
        print("failures:", result["failures"])
    rows = []
    for name, f in {"all": result["all"], **result["models"]}.items():
        for metric in ("latency_s", "ttft_s", "tpot_s", "overhead_s", "queue_s", "load_s"):
            p = f[metric]
            rows.append([name, metric, f["answered"], *(p.get(k, float("nan")) for k in ("p50", "p95", "p99"))])
    print_table("seconds", ("model", "metric", "answered", "p50", "p95", "p99"), rows)
    rates = [
        [name, f["tokens_per_s"], f["queries_per_s"], f["joules_per_query"], f["energy_source"]]
        for name, f in {"all": result["all"], **result["models"]}.items()
    ]
    print_table("rates and energy", ("model", "tokens/s", "queries/s", "J/query", "energy source"), rates)
    if "model" in result["all"]["energy_source"]:
        print("energy is estimated from stated powers (CALM_POWER_IDLE_W, CALM_POWER_CORE_W), not measured")
    state = "agrees with" if result["knowledge"]["agrees"] else "DIFFERS from"
    print(f"knowledge base {state} what the clients saw: {result['knowledge']['knowledge']}")
    print(f"wall time {result['wall_s']:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=Path, required=True, help="JSON lines with `prompt` or `question`; .gz too")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--model", help="ask one card and leave routing out")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--deadline", type=float, default=300.0)
    parser.add_argument("--fleet", default="embedded")
    parser.add_argument("--memory", default="", help="budget of each worker")
    parser.add_argument("--nats", help="use the system on this server instead of starting one")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = asyncio.run(run(arguments))
    show(result)
    if arguments.json:
        write_json(arguments.json, result)
    sys.exit(1 if result["lost"] or result["duplicated"] else 0)


if __name__ == "__main__":
    main()
