"""The engine against a bare loop over the same session, against what memory allows, and against its peers.

`python -m bench.engine [--parts PART ...] [--json FILE]`: decoding at one and at several sequences with the share of
the memory-bandwidth limit, prefill, a long prompt that arrives among running streams (`stall`), a conversation's second
turn (`turn`), and all of it against `peers` in turns. Peers (onnxruntime-genai, llama.cpp) run when they are installed
(`bench/peers.py` says how); they are no dependencies of CALM.
"""

from __future__ import annotations

from shared import one_thread  # noqa: F401 as engines have it: before anything imports NumPy

# isort: split
import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import against, stalls
from bench import peers as peers_module
from bench.bandwidth import read_bytes_per_s
from bench.opened import driven, open_as_engine, random_tokens
from bench.report import machine, print_machine, print_table, write_json
from services.workers.engine.batcher import Batcher, Delta, Finished, Request
from services.workers.engine.runner import SharedKvRunner
from shared.messages import Sampling
from shared.models.store import ModelStore
from shared.settings import Settings

PARTS = ("decode", "prefill", "stall", "turn", "peers")


class Subject:
    """A stored model, opened once as engines open it, and what drives it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        store = ModelStore(arguments.store or Settings.from_env().models_path)
        self.variant = store.variant(arguments.model, arguments.variant)
        self.opened = open_as_engine(arguments.model, arguments.variant, arguments.store, arguments.threads)
        self.opened.text.stop_ids = frozenset()  # no answer may end early: what is measured is so many steps
        self.random = np.random.default_rng(0)

    def prompt(self, tokens: int) -> list[int]:
        """Random tokens, others each time: nothing of them lies in a cache."""
        return random_tokens(self.random, tokens)

    def runner(self, rows: int, context: int) -> SharedKvRunner:
        return SharedKvRunner(self.opened.session, rows, context, self.opened.device)

    def batcher(self, rows: int, context: int) -> Batcher:
        return driven(self.opened, rows, context)


def bare(runner: SharedKvRunner, prompt: list[int], tokens: int, rows: int) -> float:
    """Tokens per second of the plainest greedy loop: run, argmax, again; `rows` equal sequences at once."""
    logits = [runner.prefill(row, prompt, 0) for row in range(rows)]
    current = [int(np.argmax(one)) for one in logits]
    ahead = rows // 2  # the engine's rows are as far on average when its last prompt has been read
    began = time.perf_counter()
    for step in range(ahead, ahead + tokens):
        result = runner.decode(current, [len(prompt) + step] * rows)
        current = [int(t) for t in result.argmax(-1)]
    return rows * tokens / (time.perf_counter() - began)


def batched(batcher: Batcher, prompts: list[list[int]], tokens: int) -> float:
    """Tokens per second of the engine, decoding alone: from the last first token to the first end. Nobody streams, so
    that text is made at the end, as onnxruntime-genai's generator makes none."""
    rows = len(prompts)
    for row, prompt in enumerate(prompts):
        sampling = Sampling(max_tokens=tokens + rows + 1)
        batcher.add(Request(str(row), [], sampling, prompt=prompt, streamed=False))
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


def decoding(subject: Subject, count: int, arguments: argparse.Namespace) -> dict[str, float]:
    """The two loops in turn, `--repeats` times; medians."""
    context = arguments.prompt_tokens + arguments.tokens + count + 8
    runner = subject.runner(count, context)
    batcher = subject.batcher(count, context)
    bare(runner, subject.prompt(arguments.prompt_tokens), 4, count)  # touches the buffers
    pairs = []
    for _ in range(arguments.repeats):
        loop = bare(runner, subject.prompt(arguments.prompt_tokens), arguments.tokens, count)
        prompts = [subject.prompt(arguments.prompt_tokens) for _ in range(count)]
        pairs.append((loop, batched(batcher, prompts, arguments.tokens)))
    loop, engine = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(e / b for b, e in pairs)
    return {"bare_tokens_per_s": loop, "engine_tokens_per_s": engine, "ratio": ratio}


def prefill(subject: Subject, arguments: argparse.Namespace) -> dict[str, float]:
    """Prompt tokens per second: the session in one run, and the engine until the first token."""
    size = arguments.prefill_tokens
    runner = subject.runner(1, size + 8)
    batcher = subject.batcher(1, size + 8)
    whole, engine = [], []
    for turn in range(arguments.repeats + 1):
        prompt = subject.prompt(size)
        began = time.perf_counter()
        runner.prefill(0, prompt, 0)
        whole.append(size / (time.perf_counter() - began))
        batcher.add(Request(str(turn), [], Sampling(max_tokens=1), prompt=subject.prompt(size)))
        began = time.perf_counter()
        _ends(batcher)
        engine.append(size / (time.perf_counter() - began))
    one, other = statistics.median(whole[1:]), statistics.median(engine[1:])  # the first touches the buffers
    return {"tokens": size, "bare_tokens_per_s": one, "engine_tokens_per_s": other, "ratio": other / one}


def _ends(batcher: Batcher) -> list[Finished]:
    """Run until nothing is left to do."""
    ends: list[Finished] = []
    while batcher.active:
        ends += [e for e in batcher.step() if isinstance(e, Finished)]
    return ends


def second_turn(subject: Subject, tokens: int) -> dict[str, float]:
    """Time to the first token of a conversation's second turn, with what the first left in the cache and without."""
    context = 2 * tokens + 200
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(3):
        for warm in (True, False):
            batcher = subject.batcher(2, context)
            history = subject.prompt(tokens)
            batcher.add(Request("first", [], Sampling(max_tokens=16), prompt=history))
            said = next(e.tokens for e in _ends(batcher))
            begin = history if warm else subject.prompt(tokens)  # another conversation: nothing of it is cached
            batcher.add(Request("second", [], Sampling(max_tokens=1), prompt=[*begin, *said, *subject.prompt(20)]))
            began = time.perf_counter()
            _ends(batcher)
            seconds[warm].append(time.perf_counter() - began)
    warm_s, cold_s = (statistics.median(seconds[w]) for w in (True, False))
    return {"history_tokens": tokens, "cached_ttft_s": warm_s, "uncached_ttft_s": cold_s, "gain": cold_s / warm_s}


def serve(arguments: argparse.Namespace) -> None:
    """Measure the engine as its peers are measured, in a process of its own that is asked by lines."""
    subject = Subject(arguments)

    def opens(task: str, count: int, prompt_tokens: int, tokens: int) -> Callable[[], float]:
        context = prompt_tokens + tokens + count + 8
        batcher = subject.batcher(count, context)

        def read() -> float:
            batcher.add(Request("read", [], Sampling(max_tokens=1), prompt=subject.prompt(prompt_tokens)))
            began = time.perf_counter()
            _ends(batcher)
            return float(prompt_tokens / (time.perf_counter() - began))

        def decode() -> float:
            return batched(batcher, [subject.prompt(prompt_tokens) for _ in range(count)], tokens)

        return read if task == "prefill" else decode

    peers_module.serve(opens)


def peers(arguments: argparse.Namespace) -> dict[str, Any]:
    """The engine and the peers that are installed, in turns; empty without any."""
    python, threads = arguments.peers / "peers/bin/python", arguments.threads
    store = arguments.store or Settings.from_env().models_path
    models = peers_module.default_models(arguments.peers, store, arguments.model) if python.exists() else {}
    ours = [sys.executable, "-m", "bench.engine", "--serve", "--model", arguments.model, "--store", str(store)]
    ours += ["--threads", str(threads), "--variant"]
    also = [variant for variant in arguments.also if variant != arguments.variant]
    opens = [partial(peers_module.Asked, against.OURS, [*ours, arguments.variant])]
    opens += [partial(peers_module.Asked, f"{against.OURS} {variant}", [*ours, variant]) for variant in also]
    opens += [partial(peers_module.Asked.peer, python, peer, model, threads) for peer, model in models.items()]
    if not models:
        return {}
    return against.measure(
        opens, rows=arguments.rows, prompt_tokens=arguments.prompt_tokens, prefill_tokens=arguments.prefill_tokens,
        tokens=arguments.tokens, rounds=arguments.rounds, openings=arguments.openings,
    )  # fmt: skip


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"benchmark": "engine", "machine": machine(), "arguments": _plain(arguments)}
    print_machine(result["machine"])
    if arguments.parts != ["peers"]:
        alone(Subject(arguments), arguments, result)
    if "peers" in arguments.parts:
        result["peers"] = figures = peers(arguments)
        if figures:
            against.show(figures)
        else:
            print("\npeers: none installed (bench/peers.py says how)")
    return result


def alone(subject: Subject, arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """What concerns the engine alone, into `result`."""
    if "decode" in arguments.parts:
        result["decode"] = {str(count): decoding(subject, count, arguments) for count in arguments.rows}
        title = f"{arguments.model} {arguments.variant}, {arguments.threads} threads: decode, tokens/s in all"
        table = [[count, *values.values()] for count, values in result["decode"].items()]
        print_table(title, ("sequences", "bare loop", "engine", "engine / bare"), table)
        _print_gains(result["decode"], arguments.rows)
        speed = result["decode"][str(min(arguments.rows))]["engine_tokens_per_s"]
        result["bandwidth"] = bandwidth(subject.variant.weights_bytes, speed, arguments.threads)
    if "prefill" in arguments.parts:
        result["prefill"] = figures = prefill(subject, arguments)
        print_table("prefill, tokens/s", tuple(figures), [list(figures.values())])
    if "stall" in arguments.parts:
        case = stalls.case(
            arguments.model, arguments.variant, arguments.store, arguments.threads, streams=arguments.streams,
            long=arguments.long_prompt,
        )  # fmt: skip
        result["stall"] = stalls.measure(case, arguments.stalls)
    if "turn" in arguments.parts:
        result["second_turn"] = figures = second_turn(subject, 600)
        print_table("second turn of a conversation, time to first token", tuple(figures), [list(figures.values())])


def bandwidth(weights_bytes: int, tokens_per_s: float, threads: int) -> dict[str, float]:
    """What memory allows where each token reads all weights once, and the share of it that decoding reaches."""
    read = read_bytes_per_s(threads)
    limit = read / weights_bytes
    print(
        f"memory: {read / 1e9:.1f} GB/s read by {threads} threads, {weights_bytes / 1e6:.0f} MB of weights a token:"
        f" at most {limit:.0f} tokens/s; decoding reaches {tokens_per_s / limit:.2f} of that"
    )
    return {
        "read_bytes_per_s": read, "weights_bytes": weights_bytes, "limit_tokens_per_s": limit,
        "ratio": tokens_per_s / limit,
    }  # fmt: skip


def _print_gains(rows: dict[str, dict[str, float]], counts: list[int]) -> None:
    one = rows[str(counts[0])]
    for count in counts[1:]:
        many = rows[str(count)]
        many["gain"] = many["engine_tokens_per_s"] / one["engine_tokens_per_s"]
        many["bare_gain"] = many["bare_tokens_per_s"] / one["bare_tokens_per_s"]
        print(f"{count} at a time: {many['gain']:.2f} times one at a time (bare session: {many['bare_gain']:.2f})")


def _plain(arguments: argparse.Namespace) -> dict[str, Any]:
    return {k: v if isinstance(v, (int, str, list)) else str(v) for k, v in vars(arguments).items() if v is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--variant", default="int8")
    parser.add_argument("--also", nargs="*", default=[], metavar="VARIANT", help="further variants, against peers")
    parser.add_argument("--store", type=Path, help="model store; the user's own when left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--prefill-tokens", type=int, default=512, help="0: no prefill against peers")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--streams", type=int, default=7)
    parser.add_argument("--long-prompt", type=int, default=1500)
    parser.add_argument("--stalls", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="measure these alone")
    parser.add_argument("--rounds", type=int, default=4, help="of the engine and its peers in turns, each opening")
    parser.add_argument("--openings", type=int, default=3, help="how often the engine and its peers are opened anew")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--peers", type=Path, default=peers_module.PEERS, help="where bench/peers.py's commands put them"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments)
        return
    result = measure(arguments)
    if arguments.json:
        write_json(arguments.json, result)
    if not result.get("stall", {}).get("held", True):
        sys.exit(1)


if __name__ == "__main__":
    main()
