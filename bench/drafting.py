"""Whether verifying guessed tokens pays: what a step over several tokens costs, and what prompt lookup gains.

`python -m bench.drafting [--json FILE]`: seconds of a step that reads several tokens behind `--held` others and
gives the logits behind each, for each variant; then tokens per second of whole answers with `prompt_lookup` and
without, in turn, for tasks whose answers repeat their prompts and for some whose answers do not.
"""

from __future__ import annotations

from shared import one_thread  # noqa: F401 as engines have it: before anything imports NumPy

# isort: split
import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.opened import driven, open_as_engine, random_tokens
from bench.report import machine, print_machine, print_table, write_json
from services.workers.engine.batcher import Finished, Request
from services.workers.engine.runner import SharedKvRunner
from shared.messages import ChatMessage, Sampling

_TEXT = (
    "The harbour master, Mr. Ellingham, wrote to the council on Tuesday. He said that the eastern pier had been"
    " damaged by the storm of 14 March, that repairs would cost 48,500 pounds, and that the ferry to Saint Agnes could"
    " not run before the first week of May. The council will discuss the letter on 2 April."
)
_CODE = (
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n\n"
    "def variance(values):\n    centre = mean(values)\n    return mean([(value - centre) ** 2 for value in values])\n"
)
TASKS = {
    "repeat": f"Repeat the following text word for word.\n\n{_TEXT}",
    "edit": f"Correct the spelling of this text and change nothing else.\n\n{_TEXT.replace('damaged', 'damagd')}",
    "code": f"Rewrite this Python code with the name `values` changed to `numbers`.\n\n{_CODE}",
    "sum up": f"Sum up the following text in two sentences.\n\n{_TEXT}",
    "explain": "Explain photosynthesis in simple words.",
    "advise": "Give me three tips for staying healthy.",
}


class Subject:
    """A variant of the stored model, opened once as engines open it."""

    def __init__(self, arguments: argparse.Namespace, variant: str) -> None:
        self.opened = open_as_engine(arguments.model, variant, arguments.store, arguments.threads)
        self._arguments = arguments

    def widths(self) -> dict[str, float]:
        """Median seconds of a step, by its number of tokens; widths in turn, so that all meet the same machine."""
        held, widths = self._arguments.held, self._arguments.widths
        runner = SharedKvRunner(self.opened.session, 1, held + 64, self.opened.device)
        tokens = random_tokens(np.random.default_rng(0), held + 64)
        runner.prefill(0, tokens[:held], 0)
        seconds: dict[int, list[float]] = {width: [] for width in widths}
        for _ in range(self._arguments.steps):
            for width in widths:
                began = time.perf_counter()
                runner.verify(0, tokens[held : held + width], held)
                seconds[width].append(time.perf_counter() - began)
        return {str(width): statistics.median(times) for width, times in seconds.items()}

    def answers(self) -> dict[str, dict[str, float]]:
        """For each task, tokens per second without and with guessing, behind the first token."""
        result = {}
        for task, prompt in TASKS.items():
            speeds: dict[bool, list[float]] = {False: [], True: []}
            ends: dict[bool, Finished] = {}
            for _ in range(self._arguments.repeats):
                for lookup in (False, True):
                    ends[lookup], speed = self._answer(prompt, lookup)
                    speeds[lookup].append(speed)
            plain, guessed = (statistics.median(speeds[lookup]) for lookup in (False, True))
            end = ends[True]
            result[task] = {
                "plain_tokens_per_s": plain, "lookup_tokens_per_s": guessed, "gain": guessed / plain,
                "tokens": float(len(end.tokens)), "drafted": float(end.tokens_drafted),
                "accepted": float(end.tokens_accepted), "same": float(end.tokens == ends[False].tokens),
            }  # fmt: skip
        return result

    def _answer(self, prompt: str, lookup: bool) -> tuple[Finished, float]:
        engine = driven(self.opened, 1, 1024)
        sampling = Sampling(max_tokens=self._arguments.tokens)
        engine.add(Request("a", [ChatMessage(role="user", content=prompt)], sampling, prompt_lookup=lookup))
        while True:
            for event in engine.step():
                if isinstance(event, Finished):
                    return event, (len(event.tokens) - 1) / (event.ended_at - event.first_token_at)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"benchmark": "drafting", "machine": machine(), "widths_s": {}, "answers": {}}
    print_machine(result["machine"])
    for variant in arguments.variants:
        subject = Subject(arguments, variant)
        result["widths_s"][variant] = seconds = subject.widths()
        one = seconds[str(arguments.widths[0])]
        cells = [f"{1000 * s:.2f} ({s / one:.2f})" for s in seconds.values()]
        print_table(f"{variant}: milliseconds of a step (times that of one token)", tuple(seconds), [cells])
        result["answers"][variant] = answers = subject.answers()
        rows = [[task, *figures.values()] for task, figures in answers.items()]
        print_table(f"{variant}: answers", ("task", *next(iter(answers.values()))), rows)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--variants", nargs="+", default=["fp32", "int8", "int4"])
    parser.add_argument("--store", type=Path, help="model store; the user's own when left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--held", type=int, default=256, help="tokens that lie in the cache already")
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 11])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments)
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
