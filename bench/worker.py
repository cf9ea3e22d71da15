"""Decoding inside a running worker, with the whole system around it, against a bare loop over the same session.

`python -m bench.worker [--json FILE]`: one query at a time, whole and streamed, then several at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from pathlib import Path
from typing import Any

import nats
from nats.aio.client import Client

from bench import report
from bench.engine import Subject, bare
from bench.system import running

SEVERAL_EVERY = 3
"""Rounds to one in which several ask at once: that takes as long as several rounds."""
PROMPT = "Write a long story about a dragon and the number {}."


async def answered(nc: Client, number: int, args: argparse.Namespace, *, stream: bool) -> dict[str, Any] | None:
    """The final answer to one query; None when it ended too early to time."""
    query = {"prompt": PROMPT.format(number), "model": args.card, "max_tokens": args.tokens, "stream": stream}
    inbox = nc.new_inbox()
    replies = await nc.subscribe(inbox)
    await nc.publish("calm.query", json.dumps(query).encode(), reply=inbox)
    while (message := json.loads((await replies.next_msg(120)).data))["type"] == "chunk.v1":
        pass
    await replies.unsubscribe()
    if message["type"] != "answer.v1":
        raise RuntimeError(f"{message['code']}: {message['message']}")
    return message if message["usage"]["tokens_out"] > args.tokens // 3 else None


def rate(answer: dict[str, Any]) -> float:
    """Tokens per second after the first."""
    return float((answer["usage"]["tokens_out"] - 1) / answer["timings"]["decode_s"])


class Loop:
    """The bare loop over a session of its own, beside the running system, which then has nothing to do."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._subject = Subject(
            argparse.Namespace(store=None, model=args.model, variant=args.variant, threads=args.threads)
        )
        self._runner = self._subject.runner(1, 40 + args.tokens)
        self._tokens = args.tokens
        bare(self._runner, self._subject.prompt(40), 10, 1)  # touches the buffers

    def speed(self) -> float:
        """Tokens per second at one sequence."""
        return bare(self._runner, self._subject.prompt(40), self._tokens, 1)


async def live(args: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens per second of each way, a figure a round; the ways take turns, since the machine's speed drifts."""
    found: dict[str, list[float]] = {"bare": [], "whole": [], "streamed": [], "alone": [], "several": []}
    loop = Loop(args)
    async with running(workers=1, fleet="embedded") as url:
        nc = await nats.connect(url)
        await answered(nc, 0, args, stream=False)  # loads the model
        for number in range(args.repeats):
            found["bare"].append(loop.speed())
            whole = await until_long(nc, 10 * number + 1, args, stream=False)
            found["whole"].append(rate(whole))
            found["alone"].append(whole["usage"]["tokens_out"] / whole["timings"]["total_s"])
            found["streamed"].append(rate(await until_long(nc, 10 * number + 1, args, stream=True)))
            if number % SEVERAL_EVERY == 0:
                many = [answered(nc, 1000 + 10 * number + i, args, stream=False) for i in range(args.at_once)]
                kept = [a for a in await asyncio.gather(*many) if a is not None]
                last_s = max(a["timings"]["total_s"] for a in kept)
                found["several"].append(sum(a["usage"]["tokens_out"] for a in kept) / last_s)
        await nc.close()
    return found


async def until_long(nc: Client, number: int, args: argparse.Namespace, *, stream: bool) -> dict[str, Any]:
    """An answer that is long enough to time."""
    for attempt in range(10):
        if (answer := await answered(nc, number + attempt, args, stream=stream)) is not None:
            return answer
    raise RuntimeError("Ten answers in a row ended early; use another --card.")


def over(found: dict[str, list[float]], way: str) -> tuple[float, float, float]:
    """A way over the bare loop of the same round: median, least and most."""
    ratios = [one / base for one, base in zip(found[way], found["bare"], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", default="smollm2", help="card of the embedded fleet")
    parser.add_argument("--model", default="smollm2-135m", help="its model, for the bare loop")
    parser.add_argument("--variant", default="int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = asyncio.run(live(args))
    several = statistics.median(found["several"])
    rows: list[list[object]] = [["bare loop", statistics.median(found["bare"]), 1.0, "", ""]]
    for title, way in (("whole", "whole"), ("streamed", "streamed"), ("prompts and all", "alone")):
        rows.append([f"one at a time, {title}", statistics.median(found[way]), *over(found, way)])
    rows.append(
        [f"{args.at_once} at once, prompts and all", several, several / statistics.median(found["bare"]), "", ""]
    )
    facts = report.machine()
    report.print_machine(facts)
    columns = ["how", "tokens/s", "of the bare loop", "least", "most"]
    report.print_table(f"decoding in a running worker, {args.repeats} rounds", columns, rows)
    print(f"{args.at_once} at once: {several / statistics.median(found['alone']):.2f} times one at a time")
    if args.json:
        report.write_json(args.json, {"machine": facts, "rounds": found})


if __name__ == "__main__":
    main()
