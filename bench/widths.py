"""What a step over several tokens of one sequence costs: whether verifying drafted tokens can pay.

`python -m bench.widths [--json FILE]`: seconds of a step that reads 1, 2, 4, 8 tokens behind `--held` others, for each
variant, with the logits of every position where the graph can give them, else of the last. A step over k+1 tokens that
accepts `a` drafted ones gives 1+a tokens: drafting pays when the gain is above the ratio printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import machine, print_machine, print_table, write_json
from services.workers.engine.runner import SharedKvRunner
from services.workers.engine.session import open_session
from shared.messages import Device
from shared.models.store import ModelStore
from shared.settings import Settings


def measure(arguments: argparse.Namespace, variant: str) -> dict[str, float]:
    """Median seconds of a step, by its number of tokens; widths in turn, so that all meet the same machine."""
    store = ModelStore(arguments.store or Settings.from_env().models_path)
    device = Device(kind="cpu", name="cpu", threads=arguments.threads)
    file = store.path(arguments.model) / store.variant(arguments.model, variant).path / "model.onnx"
    runner = SharedKvRunner(open_session(file, device, arguments.threads), 1, arguments.held + 64, device)
    random = np.random.default_rng(0)
    tokens = [int(t) for t in random.integers(1000, 20000, arguments.held + 64)]
    runner.prefill(0, tokens[: arguments.held], 0)
    seconds: dict[int, list[float]] = {width: [] for width in arguments.widths}
    for _ in range(arguments.repeats):
        for width in arguments.widths:
            began = time.perf_counter()
            runner.prefill(0, tokens[arguments.held : arguments.held + width], arguments.held)
            seconds[width].append(time.perf_counter() - began)
    return {str(width): statistics.median(times) for width, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--variants", nargs="+", default=["fp32", "int8", "int4"])
    parser.add_argument("--store", type=Path, help="model store; the user's own when left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--held", type=int, default=256, help="tokens that lie in the cache already")
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "widths", "machine": machine()}
    print_machine(result["machine"])
    result["seconds"] = {variant: measure(arguments, variant) for variant in arguments.variants}
    rows = []
    for variant, seconds in result["seconds"].items():
        one = seconds[str(arguments.widths[0])]
        rows.append([variant, *(f"{1000 * s:.2f} ({s / one:.2f})" for s in seconds.values())])
    print_table("milliseconds of a step (times that of one token)", ("variant", *map(str, arguments.widths)), rows)
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
