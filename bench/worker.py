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


def in_all(answers: list[dict[str, Any]]) -> int:
    """Tokens of these answers."""
    return sum(a["usage"]["tokens_out"] for a in answers)


async def live(args: argparse.Namespace) -> dict[str, float]:
    rates: dict[bool, list[float]] = {False: [], True: []}
    alone: list[dict[str, Any]] = []
    async with running(workers=1, fleet="embedded") as url:
        nc = await nats.connect(url)
        await answered(nc, 0, args, stream=False)  # loads the model
        for number in range(args.repeats):
            for stream in (False, True):
                if (one := await answered(nc, 1 + number, args, stream=stream)) is not None:
                    rates[stream].append(rate(one))
                    alone += [] if stream else [one]
        together = await asyncio.gather(*(answered(nc, 100 + i, args, stream=False) for i in range(args.at_once)))
        kept = [a for a in together if a is not None]
        await nc.close()
    return {
        "whole": statistics.median(rates[False]),
        "streamed": statistics.median(rates[True]),
        "alone_in_all": in_all(alone) / sum(a["timings"]["total_s"] for a in alone),
        "several_in_all": in_all(kept) / max(a["timings"]["total_s"] for a in kept),
    }


def loop(args: argparse.Namespace) -> float:
    """The bare loop's tokens per second at one sequence."""
    subject = Subject(argparse.Namespace(store=None, model=args.model, variant=args.variant, threads=args.threads))
    runner = subject.runner(1, 40 + args.tokens)
    bare(runner, subject.prompt(40), 10, 1)
    return statistics.median(bare(runner, subject.prompt(40), args.tokens, 1) for _ in range(args.repeats))


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
    before = loop(args)
    rates = asyncio.run(live(args))
    alone = (before + loop(args)) / 2
    rows: list[list[object]] = [
        ["bare loop", alone, 1.0],
        ["one at a time, whole", rates["whole"], rates["whole"] / alone],
        ["one at a time, streamed", rates["streamed"], rates["streamed"] / alone],
        ["one at a time, prompts and all", rates["alone_in_all"], rates["alone_in_all"] / alone],
        [f"{args.at_once} at once, prompts and all", rates["several_in_all"], rates["several_in_all"] / alone],
    ]
    facts = report.machine()
    report.print_machine(facts)
    report.print_table("decoding in a running worker", ["how", "tokens/s", "of the bare loop"], rows)
    print(f"{args.at_once} at once: {rates['several_in_all'] / rates['alone_in_all']:.2f} times one at a time")
    if args.json:
        report.write_json(args.json, {"machine": facts, "bare": alone, **rates})


if __name__ == "__main__":
    main()
