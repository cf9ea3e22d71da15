"""The engine against its peers, in turns: `python -m bench.engine --parts peers`."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from bench.peers import Asked
from bench.report import print_table
from bench.rounds import Rounds, compare

OURS = "ours"
"""The variant that is wanted to reach the ratios below; others of ours have its name after this."""
WANTED = {"onnxruntime-genai": {"decode": 1.0, "prefill": 1.0}, "llama.cpp": {"decode": 1.25}}
"""Ratios to the peers that are wanted at one sequence; decoding several, `WANTED_AT_MANY` of each."""
WANTED_AT_MANY = 1.1


def measure(
    opens: Sequence[Callable[[], Asked]],
    *,
    rows: list[int],
    prompt_tokens: int,
    prefill_tokens: int,
    tokens: int,
    rounds: int,
    openings: int,
) -> dict[str, Any]:
    """By task, the rates of all whose processes `opens` start, and our ratios to them; empty without peers.

    Everything is opened anew `openings` times and measured in `rounds` turns each: where a process's memory happens to
    lie makes it up to a tenth quicker or slower, for as long as it lives. Of llama.cpp, which reads two files, the
    quicker is compared with. One that does not answer is told on stderr and left out.
    """
    tasks = [("decode", count, prompt_tokens) for count in rows]
    tasks += [("prefill", 1, prefill_tokens)] if prefill_tokens else []
    done = {task: Rounds() for task in tasks}
    missing: set[str] = set()
    for _ in range(openings):
        with ExitStack() as stack:
            asked = [one for one in (stack.enter_context(start()) for start in opens) if one.name not in missing]
            for task in tasks:
                kind, count, read = task
                measures = {
                    one.name: partial(one.rate, kind, rows=count, prompt_tokens=read, tokens=tokens) for one in asked
                }
                for name in list(measures):
                    try:
                        measures[name]()  # opens the model and touches its buffers
                    except RuntimeError as error:
                        print(error, file=sys.stderr)
                        missing.add(name)
                        del measures[name]
                done[task].interleave(measures, rounds, {one.name: one.pid for one in asked if one.name in measures})
    figures = {}
    for (kind, count, _), result in done.items():
        rates = {name: rates for name, rates in result.rates.items() if name not in missing}
        families: dict[str, list[str]] = {}
        for name in rates:
            families.setdefault(name.split(" ")[0], []).append(name)
        own = families.pop(OURS, [])
        if OURS not in own or not families:
            return {}
        ratios = {}
        for subject in own:
            for family, members in families.items():
                ratio = compare(rates, subject, members)
                ratio["subject"] = subject
                ratio["wanted"] = WANTED_AT_MANY if count > 1 else WANTED.get(family, {}).get(kind)
                ratios[f"{subject} / {family}"] = ratio
        figures[kind if kind == "prefill" else f"decode at {count}"] = {
            "tokens_per_s": {name: statistics.median(of) for name, of in rates.items()}, "rates": rates,
            "ratios": ratios, "others_busy_cores": result.busy_s / result.measured_s,
        }  # fmt: skip
    return figures


def show(figures: dict[str, Any]) -> None:
    """Print what `measure` gave."""
    subjects = list(next(iter(figures.values()))["tokens_per_s"])
    rows = [[task, *by["tokens_per_s"].values()] for task, by in figures.items()]
    print_table("in turns, tokens/s in all, medians", ("", *subjects), rows)
    rows = [
        [
            f"{task}, {ratio['subject']} / {ratio['peer']}",
            ratio["ratio"],
            *ratio["quartiles"],
            ratio["wanted"] or "",
            len(ratio["ratios"]),
        ]
        for task, by in figures.items()
        for ratio in by["ratios"].values()
    ]
    columns = ("", "median", "first quartile", "third", "wanted", "rounds")
    print_table("ours over the peer's (of llama.cpp the quicker file), round by round", columns, rows)
    busiest = max(by["others_busy_cores"] for by in figures.values())
    print(f"while one was measured, the others' processes kept {busiest:.3f} cores busy")
