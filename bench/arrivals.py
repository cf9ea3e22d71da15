"""Short prompts arrive among running streams: how long they wait for their first token, and the streams for their next.

`python -m bench.arrivals [--json FILE]`: in each round `--streams` run, and one prompt of `--prompt-tokens` arrives, or
several at once (`--at-once`), at a random moment of a step. A first token counts when the engine hands it over. The
cases take turns round by round; the model is opened and driven as in an engine. Held: where one prompt arrives, the
usual round's longest gap between two tokens of a stream (the median of the rounds; what else runs on a machine makes
single steps longer) is under `bench.stalls`'s limit times the median gap before; the exit status is 1 where it is not.
Of several, those that are read first decode beside the streams while the others are read, which is a slower step.
"""

from __future__ import annotations

from shared import one_thread  # noqa: F401 as engines have it: before anything imports NumPy

# isort: split
import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.opened import add_arguments, driven, open_as_engine, random_tokens
from bench.report import machine, print_machine, print_table, write_json
from bench.stalls import STALL_LIMIT
from services.workers.engine.batcher import Batcher, Event, Request
from shared.messages import Sampling

BEFORE = 16
"""Steps of the streams alone before anything arrives; the first few, which follow their own prompts, do not count."""
ROOM = 400
"""Tokens that a stream may come to have in a round."""


class Case:
    """So many streams, so many prompts at once."""

    def __init__(self, batcher: Batcher, streams: int, at_once: int) -> None:
        self._batcher = batcher
        self.streams = streams
        self.at_once = at_once
        self.first_s: list[float] = []
        """Of each prompt that arrived, until its first token."""
        self.longest: list[float] = []
        """Of each round, the longest gap over the median before."""
        self.median_s: list[float] = []
        """Of each round, the median gap before."""

    def once(self, prompt_tokens: int, random: np.random.Generator) -> None:
        """One round."""
        batcher = self._batcher
        for stream in range(self.streams):
            batcher.add(Request(f"s{stream}", [], Sampling(max_tokens=ROOM), prompt=random_tokens(random, 32)))
        while any(not s.tokens for s in batcher._sequences.values()):
            batcher.step()
        before = [self._step()[0] for _ in range(BEFORE)][BEFORE // 4 :]
        usual_s = statistics.median(before)
        arrived_s = time.perf_counter() + float(random.random()) * usual_s
        self._step()  # they arrive while it runs
        waiting = {f"a{number}" for number in range(self.at_once)}
        for name in sorted(waiting):
            batcher.add(Request(name, [], Sampling(max_tokens=ROOM), prompt=random_tokens(random, prompt_tokens)))
        gaps = []
        while waiting:
            gap_s, told = self._step()
            gaps.append(gap_s)
            for name, at_s in told.items():
                if name in waiting:
                    waiting.remove(name)
                    self.first_s.append(at_s - arrived_s)
        self.longest.append(max(gaps) / usual_s)
        self.median_s.append(usual_s)
        batcher.clear()

    def _step(self) -> tuple[float, dict[str, float]]:
        """Seconds of a step, and when each sequence's first event of it was handed over."""
        told: dict[str, float] = {}

        def tell(events: list[Event]) -> None:
            now_s = time.perf_counter()
            for event in events:
                told.setdefault(event.id, now_s)

        began = time.perf_counter()
        tell(self._batcher.step(tell))
        return time.perf_counter() - began, told

    def figures(self) -> dict[str, float]:
        return {
            "streams": self.streams, "at_once": self.at_once, "rounds": len(self.longest),
            "ttft_p50_s": statistics.median(self.first_s), "ttft_p95_s": float(np.percentile(self.first_s, 95)),
            "gap_before_s": statistics.median(self.median_s), "longest_over_median": statistics.median(self.longest),
            "longest_over_median_p95": float(np.percentile(self.longest, 95)),
        }  # fmt: skip


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    opened = open_as_engine(arguments.model, arguments.variant, arguments.store, arguments.threads)
    opened.text.stop_ids = frozenset()
    rows = max(arguments.streams) + max(arguments.at_once)
    batcher = driven(opened, rows, arguments.prompt_tokens + ROOM + 8)
    cases = [Case(batcher, *pair) for pair in itertools.product(arguments.streams, arguments.at_once)]
    random = np.random.default_rng(0)
    for case in cases:
        case.once(arguments.prompt_tokens, random)  # touches the weights, and learns the pace
    cases = [Case(batcher, case.streams, case.at_once) for case in cases]
    for _ in range(arguments.rounds):
        for case in cases:
            case.once(arguments.prompt_tokens, random)
    figures = [case.figures() for case in cases]
    title = f"prompts of {arguments.prompt_tokens} tokens among running streams: seconds; gaps over the median before"
    print_table(title, tuple(figures[0]), [list(each.values()) for each in figures])
    held = all(each["longest_over_median"] < STALL_LIMIT for each in figures if each["at_once"] == 1)
    verdict = "held" if held else "NOT held"
    print(f"one at a time, usual longest gap under {STALL_LIMIT:.0f} times the median before: {verdict}")
    return {"prompt_tokens": arguments.prompt_tokens, "cases": figures, "held": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 7])
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    about = machine()
    print_machine(about)
    result = measure(arguments)
    if arguments.json:
        write_json(arguments.json, {"benchmark": "arrivals", "machine": about, **result})
    if not result["held"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
