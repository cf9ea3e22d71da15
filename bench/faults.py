"""Faults: kills processes with SIGKILL while they hold queries, and tells how long their queries then took.

`python -m bench.faults --queries FILE [--rounds 3] [--json FILE]`
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from bench.accounting import Asked, totals
from bench.e2e import read_prompts
from bench.report import machine, percentiles, print_machine, print_table, write_json
from bench.system import running
from shared import codec, subjects
from shared import messages as m

IN_FLIGHT = 8
GENERATING_S = 30.0
"""The victim must be seen generating within this long."""


class Fleet:
    """Who is alive, by heartbeat: process id and instance of every service."""

    def __init__(self) -> None:
        self.pids: dict[tuple[str, str], int] = {}
        self.changed = asyncio.Event()

    async def on_beat(self, message: Msg) -> None:
        beat = codec.unpack(message.data, m.Heartbeat)
        if beat.state == "ready":
            self.pids[(beat.service, beat.instance)] = beat.pid
            self.changed.set()

    async def wait_for(self, service: str, count: int) -> dict[str, int]:
        """Instances of a service with their process ids, once there are `count` of them."""
        async with asyncio.timeout(60):
            while True:
                found = {name: pid for (kind, name), pid in self.pids.items() if kind == service}
                if len(found) >= count:
                    return found
                self.changed.clear()
                await self.changed.wait()


async def one_round(nc: Client, fleet: Fleet, prompts: list[str], victim: str, max_tokens: int) -> dict[str, Any]:
    """Ask, wait until answers are being generated, kill one process of the service `victim`, wait for every end."""
    inbox = nc.new_inbox()
    asked: dict[str, Asked] = {}
    ended: dict[str, asyncio.Event] = {}
    streaming = asyncio.Event()

    async def on_message(message: Msg) -> None:
        body, query_id = json.loads(message.data), message.subject.rsplit(".", 1)[1]
        if asked[query_id].take(body, time.perf_counter()):
            ended[query_id].set()
        if sum(a.first_s is not None and a.finals == 0 for a in asked.values()) >= len(asked) // 2:
            streaming.set()

    subscription = await nc.subscribe(f"{inbox}.*", cb=on_message)
    for number, prompt in enumerate(prompts):
        query_id = f"{victim}{number}"
        asked[query_id], ended[query_id] = Asked(query_id, time.perf_counter()), asyncio.Event()
        query = {"prompt": prompt, "stream": True, "max_tokens": max_tokens, "deadline_s": 120.0}
        await nc.publish("calm.query", json.dumps(query).encode(), reply=f"{inbox}.{query_id}")
    async with asyncio.timeout(GENERATING_S):
        await streaming.wait()
    instances = await fleet.wait_for(victim, 1)
    name, pid = sorted(instances.items())[0]
    fleet.pids.pop((victim, name))
    killed_at = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(130):
            await asyncio.gather(*(event.wait() for event in ended.values()))
    await asyncio.sleep(0.5)  # a doubled end would come now
    await subscription.unsubscribe()
    after = [a.sent_at + a.final_s - killed_at for a in asked.values() if a.final_s is not None]
    again = [
        a.sent_at + a.final_s - killed_at
        for a in asked.values()
        if a.final_s is not None and a.answer is not None and a.answer["attempt"] > 1
    ]
    return {"killed": victim, **totals(list(asked.values())), "after_kill_s": after, "moved_s": again}


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    prompts = read_prompts(arguments.queries, IN_FLIGHT)
    rounds: list[dict[str, Any]] = []
    fleet = Fleet()
    async with running(workers=2, fleet=arguments.fleet) as url:
        nc = await nats.connect(url)
        try:
            await nc.subscribe(subjects.health("*"), cb=fleet.on_beat)
            for _ in range(arguments.rounds):
                for victim in ("worker", "monitor", "analyzer", "planner", "executor"):
                    await fleet.wait_for("worker", 2)
                    await fleet.wait_for(victim, 1)
                    rounds.append(await one_round(nc, fleet, prompts, victim, arguments.max_tokens))
        finally:
            await nc.close()
    return {"benchmark": "faults", "machine": machine(), "rounds": rounds}


def show(result: dict[str, Any]) -> None:
    print_machine(result["machine"])
    rows = []
    for victim in dict.fromkeys(r["killed"] for r in result["rounds"]):
        rounds = [r for r in result["rounds"] if r["killed"] == victim]
        times = [t for r in rounds for t in r["after_kill_s"]]
        moved = [t for r in rounds for t in r["moved_s"]]
        rows.append(
            [
                victim,
                *(sum(r[k] for r in rounds) for k in ("sent", "answered", "failed", "lost", "duplicated", "restarted")),
                percentiles(times).get("p50", float("nan")),
                max(times, default=float("nan")),
                len(moved),
                max(moved, default=float("nan")),
            ]
        )
    columns = ("killed", "sent", "answered", "failed", "lost", "doubled", "restarted")
    print_table("queries in hand when a process was killed", (*columns, "p50 s", "max s", "moved", "max moved s"), rows)
    print("seconds count from the kill to the answer; `moved` were generated anew by another engine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=Path, required=True, help="JSON lines with `prompt` or `question`; .gz too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--fleet", default="embedded")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = asyncio.run(run(arguments))
    show(result)
    if arguments.json:
        write_json(arguments.json, result)
    sys.exit(1 if any(r["lost"] or r["duplicated"] for r in result["rounds"]) else 0)


if __name__ == "__main__":
    main()
