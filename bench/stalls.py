"""A long prompt arrives among running streams: how long they wait for their next token.

`python -m bench.stalls [--runs 8] [--json FILE]`, and a part of `python -m bench.engine`. The engine is opened as a
worker opens it, over shared weights. Held: in every run the longest gap between two tokens of a stream is under
`STALL_LIMIT` times the median gap before the prompt came; the exit status is 1 where it is not.

Something else that takes a core makes a step as much longer: where the system tells how long the engine waited for one,
the longest gap of the steps in which it hardly did is given as well ("undisturbed").
"""

from __future__ import annotations

from shared import one_thread  # noqa: F401 as engines have it: before anything imports NumPy

# isort: split
import argparse
import contextlib
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.opened import add_arguments, driven, open_as_engine, random_tokens
from bench.report import machine, print_machine, print_table, write_json
from services.workers.engine.batcher import Batcher, Request
from services.workers.engine.loader import Opened
from shared.messages import Sampling

STALL_LIMIT = 4.0
BEFORE = 40
"""Steps before the prompt comes; of them those count that come after the streams' own prompts."""
UNDISTURBED_S = 0.001
"""Waited for cores by all threads together, in one step."""
_ROOM = 400


@dataclass(frozen=True)
class Case:
    """`streams` run when a prompt of `long` tokens arrives."""

    streams: int
    long: int
    opened: Opened

    def batcher(self) -> Batcher:
        return driven(self.opened, self.streams + 1, self.long + _ROOM)


def case(model: str, variant: str, store: Path | None, threads: int, *, streams: int, long: int) -> Case:
    """The model opened with rows for the streams and the prompt; no answer ends by itself."""
    opened = open_as_engine(model, variant, store, threads)
    opened.text.stop_ids = frozenset()
    return Case(streams, long, opened)


def waited_s() -> float:
    """For how long this process's threads were ready to run and had no core, since they began; 0 where unknown."""
    total = 0
    for schedstat in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            total += int(schedstat.read_text().split()[1])
    return total / 1e9


def once(case: Case, random: np.random.Generator) -> dict[str, float]:
    """One run; times in seconds."""

    batcher = case.batcher()
    batcher.add(Request("alone", [], Sampling(max_tokens=1), prompt=random_tokens(random, case.long)))
    began = time.perf_counter()
    while batcher.active:
        batcher.step()
    alone_s = time.perf_counter() - began
    for row in range(case.streams):
        batcher.add(Request(f"s{row}", [], Sampling(max_tokens=case.long), prompt=random_tokens(random, 32)))
    gaps: list[float] = []  # every step gives each stream a token
    waits: list[float] = []
    first, steps, came_at = False, 0, 0.0
    while not first:
        if steps == BEFORE:
            before, gaps, waits, came_at = gaps[case.streams + 4 :], [], [], time.perf_counter()
            batcher.add(Request("long", [], Sampling(max_tokens=4), prompt=random_tokens(random, case.long)))
        waited, began = waited_s(), time.perf_counter()
        events = batcher.step()
        gaps.append(time.perf_counter() - began)
        waits.append(waited_s() - waited)
        steps += 1
        first = any(e.id == "long" for e in events)
    ttft_s = time.perf_counter() - came_at
    batcher.clear()
    median = statistics.median(before)
    calm = [gap for gap, wait in zip(gaps, waits, strict=True) if wait < UNDISTURBED_S]
    return {
        "median_gap_before_s": median, "median_gap_s": statistics.median(gaps),
        "p95_gap_s": statistics.quantiles(gaps, n=20)[-1], "longest_gap_s": max(gaps),
        "longest_over_median": max(gaps) / median, "undisturbed_over_median": max(calm, default=0.0) / median,
        "undisturbed_steps": len(calm) / len(gaps), "ttft_s": ttft_s, "ttft_alone_s": alone_s,
    }  # fmt: skip


def measure(case: Case, runs: int) -> dict[str, Any]:
    """`runs` runs after one that is dropped (it touches the weights), printed; whether the bound held in all."""
    random = np.random.default_rng(0)
    once(case, random)
    results = [once(case, random) for _ in range(runs)]
    title = f"a prompt of {case.long} tokens among {case.streams} running streams, seconds"
    print_table(title, tuple(results[0]), [list(r.values()) for r in results])
    ratios = sorted(r["longest_over_median"] for r in results)
    held = ratios[-1] < STALL_LIMIT
    under = sum(ratio < STALL_LIMIT for ratio in ratios)
    print(
        f"longest gap over the median before: {ratios[0]:.2f} to {ratios[-1]:.2f}, median"
        f" {statistics.median(ratios):.2f}; under {STALL_LIMIT:.0f} in {under} of {runs} runs:"
        f" {'held' if held else 'NOT held'}"
    )
    calm = sorted(r["undisturbed_over_median"] for r in results)
    print(f"of the steps in which no thread waited for a core: {calm[0]:.2f} to {calm[-1]:.2f}")
    return {
        "streams": case.streams, "prompt_tokens": case.long, "joint": case.opened.joint is not None, "runs": results,
        "lowest": ratios[0], "median": statistics.median(ratios), "highest": ratios[-1], "held": held,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--streams", type=int, default=7)
    parser.add_argument("--long-prompt", type=int, default=1500)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    about = machine()
    print_machine(about)
    subject = case(a.model, a.variant, a.store, a.threads, streams=a.streams, long=a.long_prompt)
    result = measure(subject, a.runs)
    if a.json:
        write_json(a.json, {"benchmark": "stalls", "machine": about, **result})
    if not result["held"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
