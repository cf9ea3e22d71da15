"""What LoRA adapters cost: `python -m bench.adapters`.

One stored model, decoded without adapters and with several of them in its graph, rows mixed: tokens per second in all,
and the bytes beside what as many merged models would take. Adapters are random: speed does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from services.workers.engine.lora import AdaptedRunner, Stack, adapted
from services.workers.engine.runner import SharedKvRunner
from services.workers.engine.session import open_session
from shared.messages import Device
from shared.models.lora import Adapter, Pair, widths
from shared.models.manifest import Architecture
from shared.models.store import ModelStore
from shared.settings import Settings, format_bytes


def random_adapter(a: Architecture, rank: int, seed: int) -> Adapter:
    """q, k, v and the attention's output of every layer."""
    random = np.random.default_rng(seed)

    def pair(rows: int, columns: int, ranks: int) -> Pair:
        return Pair(
            random.standard_normal((rows, ranks)).astype(np.float32),
            (random.standard_normal((ranks, columns)) / 1000).astype(np.float32),
        )

    inner = a.heads * a.head_size
    made = {f"layer{i}.qkv": pair(a.hidden, sum(widths(".qkv", a)), 3 * rank) for i in range(a.layers)}
    return made | {f"layer{i}.attn_output": pair(inner, a.hidden, rank) for i in range(a.layers)}


def decode(runner: SharedKvRunner, rows: int, stack: Stack | None, count: int, tokens: int) -> float:
    """Tokens per second over `tokens` steps of `rows` rows, each behind 64 tokens; row n uses adapter n modulo."""
    if stack is not None:
        stack.select([1 + row % count for row in range(rows)])
    lengths = [64] * rows
    runner.decode([9] * rows, lengths)
    began = time.perf_counter()
    for step in range(tokens):
        runner.decode([9] * rows, [n + step for n in lengths])
    return rows * tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--variant", default="int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    store = ModelStore(Settings.from_env().models_path)
    file = store.variant_path(asked.model, asked.variant) / "model.onnx"
    architecture = store.get(asked.model).architecture
    device = Device(kind="cpu", name="cpu", threads=asked.threads)
    most, context = max(asked.rows), 64 + asked.tokens + 2
    stacks: dict[int, Stack | None] = {0: None}
    runners = {0: SharedKvRunner(open_session(file, device, asked.threads), most, context, device)}
    for count in asked.adapters:
        stack = Stack({f"a{n}": random_adapter(architecture, asked.rank, n) for n in range(count)})
        session = open_session(file, device, asked.threads, graph=adapted(file, stack))
        stacks[count], runners[count] = stack, AdaptedRunner(session, most, context, device, stack)
    found: dict[tuple[int, int], list[float]] = {}
    for _ in range(asked.rounds):  # in turn, so that what else the machine does meets all alike
        for rows in asked.rows:
            for count, runner in runners.items():
                rate = decode(runner, rows, stacks[count], count, asked.tokens)
                found.setdefault((rows, count), []).append(rate)
    base_bytes = store.variant(asked.model, asked.variant).weights_bytes
    results = []
    print(f"{asked.model} {asked.variant} ({format_bytes(base_bytes)}), rank {asked.rank}, {asked.threads} threads")
    print(f"{'rows':>5}{'adapters':>10}{'tokens/s':>10}{'of base':>9}{'bytes added':>14}{'merged models':>15}")
    for (rows, count), rates in found.items():
        rate, base = statistics.median(rates), statistics.median(found[rows, 0])
        stack_ = stacks[count]
        added = stack_.weights_bytes if stack_ is not None else 0
        results.append(
            {"rows": rows, "adapters": count, "tokens_per_s": rate, "of_base": rate / base, "adapter_bytes": added}
        )
        whole = format_bytes(base_bytes * count)
        print(f"{rows:5}{count:10}{rate:10.0f}{rate / base:9.2f}{format_bytes(added):>14}{whole:>15}")
    if asked.json is not None:
        asked.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
