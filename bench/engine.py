"""Decode speed of the engine against a bare loop over the same session, at one and at several sequences.

`python -m bench.decode --model smollm2-135m --variant int8 --threads 2`
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import machine, print_machine, print_table, write_json
from services.workers.engine.batcher import Batcher, Delta, Finished, Request
from services.workers.engine.energy import choose_meter
from services.workers.engine.runner import SharedKvRunner
from services.workers.engine.session import open_session
from services.workers.engine.text import Text
from shared.messages import Device, Sampling
from shared.models.store import ModelStore
from shared.settings import Settings


def bare(runner: SharedKvRunner, prompt: list[int], tokens: int, rows: int) -> float:
    """Tokens per second of the plainest greedy loop: run, argmax, again; `rows` equal sequences at once."""
    logits = [runner.prefill(row, prompt, 0) for row in range(rows)]
    current = [int(np.argmax(one)) for one in logits]
    began = time.perf_counter()
    for step in range(tokens):
        result = runner.decode(current, [len(prompt) + step] * rows)
        current = [int(t) for t in result.argmax(-1)]
    return rows * tokens / (time.perf_counter() - began)


def batched(batcher: Batcher, prompt: list[int], tokens: int, rows: int) -> float:
    """Tokens per second of the engine, decode alone: from the last first token to the first end."""
    for row in range(rows):
        # No stop token may end it early: the speed of `tokens` steps is what is measured.
        batcher.add(Request(str(row), [], Sampling(max_tokens=tokens + rows + 1), prompt=prompt))
    started: set[str] = set()
    while len(started) < rows:  # prompts are read one after the other while others decode already
        started |= {e.id for e in batcher.step() if isinstance(e, Delta)}
    began, steps, ended = time.perf_counter(), 0, False
    while not ended:
        ended = any(isinstance(e, Finished) for e in batcher.step())
        steps += 1
    speed = rows * steps / (time.perf_counter() - began)
    batcher.clear()
    return speed


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Alternate the two, `--repeats` times, and take medians."""
    settings = Settings.from_env()
    store = ModelStore(arguments.store or settings.models_path)
    manifest = store.get(arguments.model)
    folder = store.path(arguments.model)
    variant = store.variant(arguments.model, arguments.variant)
    device = Device(kind="cpu", name="cpu", threads=arguments.threads)
    context = arguments.prompt_tokens + arguments.tokens + max(arguments.rows) + 8
    session = open_session(folder / variant.path / "model.onnx", device, arguments.threads)
    text = Text(folder, manifest.tokenizer)
    text.stop_ids = frozenset()
    prompt = [int(t) for t in np.random.default_rng(0).integers(1000, 20000, arguments.prompt_tokens)]
    rows: list[list[Any]] = []
    result: dict[str, Any] = {"benchmark": "decode", "machine": machine(), "arguments": _plain(arguments), "rows": {}}
    for count in arguments.rows:
        runner = SharedKvRunner(session, count, context, device)
        meter = choose_meter(device, settings.power_idle_w, settings.power_core_w)
        batcher = Batcher(runner, text, slots=count, context=context, meter=meter, clock=time.perf_counter)
        bare(runner, prompt, 4, count)  # touches the buffers
        pairs = [
            (bare(runner, prompt, arguments.tokens, count), batched(batcher, prompt, arguments.tokens, count))
            for _ in range(arguments.repeats)
        ]
        loop, engine = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(e / b for b, e in pairs)
        result["rows"][str(count)] = {"bare_tokens_per_s": loop, "engine_tokens_per_s": engine, "ratio": ratio}
        rows.append([count, loop, engine, ratio])
    print_machine(result["machine"])
    title = f"{arguments.model} {arguments.variant}, {arguments.threads} threads: decode, tokens/s in all"
    print_table(title, ("sequences", "bare loop", "engine", "engine / bare"), rows)
    one = result["rows"][str(arguments.rows[0])]
    for count in arguments.rows[1:]:
        many = result["rows"][str(count)]
        gain = many["engine_tokens_per_s"] / one["engine_tokens_per_s"]
        limit = many["bare_tokens_per_s"] / one["bare_tokens_per_s"]
        print(f"{count} at a time: {gain:.2f} times one at a time (bare session: {limit:.2f})")
        many["gain"], many["bare_gain"] = gain, limit
    return result


def _plain(arguments: argparse.Namespace) -> dict[str, Any]:
    return {k: v if isinstance(v, (int, str, list)) else str(v) for k, v in vars(arguments).items() if v is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--variant", default="int8")
    parser.add_argument("--store", type=Path, help="model store; the user's own when left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments)
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
