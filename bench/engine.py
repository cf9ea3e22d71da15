"""The engine against a bare loop over the same session, against what memory allows, and against its peers.

`python -m bench.engine [--json FILE]`: decoding at one and at several sequences, prefill, the share of the
memory-bandwidth limit, a long prompt that arrives among running streams, and a conversation's second turn. Peers
(onnxruntime-genai, llama.cpp) run when they are installed; they are no dependencies of CALM.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from bench import peers as peers_module
from bench.bandwidth import read_bytes_per_s
from bench.report import machine, print_machine, print_table, write_json
from services.workers.engine.batcher import Batcher, Delta, Finished, Request
from services.workers.engine.energy import choose_meter
from services.workers.engine.runner import SharedKvRunner
from services.workers.engine.session import open_session
from services.workers.engine.text import Text
from shared.messages import Device, Sampling
from shared.models.store import ModelStore
from shared.settings import Settings

STALL_LIMIT = 4.0
LEAST = {"decode at one": {"onnxruntime-genai": 1.0, "llama.cpp": 1.25}, "prefill": {"onnxruntime-genai": 1.0}}
"""Ratios to the peers that are wanted; at several sequences 1.1 of each."""
LEAST_AT_MANY = 1.1


class Subject:
    """A stored model, opened once, and what drives it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.settings = Settings.from_env()
        store = ModelStore(arguments.store or self.settings.models_path)
        self.folder = store.path(arguments.model)
        self.variant = store.variant(arguments.model, arguments.variant)
        self.device = Device(kind="cpu", name="cpu", threads=arguments.threads)
        file = self.folder / self.variant.path / "model.onnx"
        self.session: ort.InferenceSession = open_session(file, self.device, arguments.threads)
        self.text = Text(self.folder, store.get(arguments.model).tokenizer)
        self.text.stop_ids = frozenset()  # no answer may end early: the speed of so many steps is what is measured
        self.random = np.random.default_rng(0)

    def prompt(self, tokens: int) -> list[int]:
        """Random tokens, others each time: nothing of them lies in a cache."""
        return [int(t) for t in self.random.integers(1000, 20000, tokens)]

    def runner(self, rows: int, context: int) -> SharedKvRunner:
        return SharedKvRunner(self.session, rows, context, self.device)

    def batcher(self, runner: SharedKvRunner, rows: int, context: int) -> Batcher:
        meter = choose_meter(self.device, self.settings.power_idle_w, self.settings.power_core_w)
        return Batcher(runner, self.text, slots=rows, context=context, meter=meter, clock=time.perf_counter)


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
    """Tokens per second of the engine, decoding alone: from the last first token to the first end."""
    rows = len(prompts)
    for row, prompt in enumerate(prompts):
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


def decoding(subject: Subject, count: int, arguments: argparse.Namespace) -> dict[str, float]:
    """The two loops in turn, `--repeats` times; medians."""
    context = arguments.prompt_tokens + arguments.tokens + count + 8
    runner = subject.runner(count, context)
    batcher = subject.batcher(runner, count, context)
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
    batcher = subject.batcher(runner, 1, size + 8)
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


def stall(subject: Subject, streams: int, long: int) -> dict[str, float]:
    """A prompt of `long` tokens arrives among running streams: their gaps between tokens, in seconds."""
    context = long + 400
    runner = subject.runner(streams + 1, context)
    batcher = subject.batcher(runner, streams + 1, context)
    for row in range(streams):
        batcher.add(Request(f"s{row}", [], Sampling(max_tokens=300), prompt=subject.prompt(32)))
    last: dict[str, float] = {}
    gaps: list[float] = []
    before: list[float] = []
    steps, first_at, arrived_at = 0, 0.0, 0.0
    while first_at == 0.0 or steps < 40:
        if steps == 40:
            before, gaps = gaps, []
            arrived_at = time.perf_counter()
            batcher.add(Request("long", [], Sampling(max_tokens=4), prompt=subject.prompt(long)))
        events = batcher.step()
        now = time.perf_counter()
        steps += 1
        advanced = {e.id for e in events} | set(last)  # a token may be no text yet; every step gives each one
        for sequence in advanced - {"long"}:
            if sequence in last and steps > streams + 4:
                gaps.append(now - last[sequence])
            last[sequence] = now
        if any(e.id == "long" for e in events):
            first_at = now
    batcher.clear()
    median = statistics.median(before)
    return {
        "streams": streams, "prompt_tokens": long, "median_gap_before_s": median,
        "median_gap_s": statistics.median(gaps), "p95_gap_s": statistics.quantiles(gaps, n=20)[-1],
        "longest_gap_s": max(gaps),
        "longest_over_median": max(gaps) / median, "ttft_s": first_at - arrived_at,
    }  # fmt: skip


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
            batcher = subject.batcher(subject.runner(2, context), 2, context)
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


def peers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of the peers that are installed, as `bench.peers` gives them; empty without."""
    models = peers_module.default_models(arguments.peers, arguments.store)
    figures: dict[str, Any] = peers_module.measure(
        threads=arguments.threads, prompt_tokens=arguments.prompt_tokens, tokens=arguments.tokens, rows=arguments.rows,
        prefill_tokens=arguments.prefill_tokens, python=arguments.peers / "peers/bin/python", models=models,
    )  # fmt: skip
    if figures:
        peers_module.print_figures(figures, "peers, tokens/s", arguments.prefill_tokens)
    return figures


def against_peers(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Our figures over each peer's, of llama.cpp's builds the quicker one's, and what is wanted."""
    figures = result["peers"]
    rows = sorted(result["decode"], key=int)
    ours = {f"decode at {'one' if row == '1' else row}": result["decode"][row]["engine_tokens_per_s"] for row in rows}
    ours["prefill"] = result["prefill"]["engine_tokens_per_s"]
    ratios = []
    for task, row in zip(ours, [*rows, "prefill"], strict=True):
        best: dict[str, float] = {}
        for peer, by in figures.items():
            theirs = by[row]["tokens_per_s" if row == "prefill" else "decode_tokens_per_s"]
            family = peer.split(" ")[0]
            best[family] = max(best.get(family, 0.0), theirs)
        for family, theirs in best.items():
            least = LEAST.get(task, {}).get(family)
            if row not in ("1", "prefill"):
                least = LEAST_AT_MANY
            ratios.append({"task": task, "peer": family, "ratio": ours[task] / theirs, "wanted": least})
    return ratios


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    subject = Subject(arguments)
    result: dict[str, Any] = {"benchmark": "engine", "machine": machine(), "arguments": _plain(arguments)}
    print_machine(result["machine"])
    result["decode"] = {str(count): decoding(subject, count, arguments) for count in arguments.rows}
    title = f"{arguments.model} {arguments.variant}, {arguments.threads} threads: decode, tokens/s in all"
    table = [[count, *values.values()] for count, values in result["decode"].items()]
    print_table(title, ("sequences", "bare loop", "engine", "engine / bare"), table)
    _print_gains(result["decode"], arguments.rows)

    bandwidth = read_bytes_per_s(arguments.threads)
    limit = bandwidth / subject.variant.weights_bytes
    speed = result["decode"][str(min(arguments.rows))]["engine_tokens_per_s"]
    result["bandwidth"] = {
        "read_bytes_per_s": bandwidth, "weights_bytes": subject.variant.weights_bytes, "limit_tokens_per_s": limit,
        "ratio": speed / limit,
    }  # fmt: skip
    size = subject.variant.weights_bytes / 1e6
    print(
        f"memory: {bandwidth / 1e9:.1f} GB/s read by {arguments.threads} threads, {size:.0f} MB of weights a token:"
        f" at most {limit:.0f} tokens/s; decoding reaches {speed / limit:.2f} of that"
    )

    result["prefill"] = figures = prefill(subject, arguments)
    print_table("prefill, tokens/s", tuple(figures), [list(figures.values())])
    stalls = [stall(subject, arguments.streams, arguments.long_prompt) for _ in range(arguments.stalls)]
    result["stall"] = stalls
    print_table("a long prompt among running streams, seconds", tuple(stalls[0]), [list(s.values()) for s in stalls])
    held = sum(s["longest_over_median"] < STALL_LIMIT for s in stalls)
    print(f"longest gap under {STALL_LIMIT:.0f} times the median before the prompt came: {held} of {len(stalls)} times")
    result["second_turn"] = figures = second_turn(subject, 600)
    print_table("second turn of a conversation, time to first token", tuple(figures), [list(figures.values())])

    result["peers"] = peers(arguments)
    if not result["peers"]:
        print("\npeers: none installed (bench/peers.py says how)")
        return result
    result["against_peers"] = ratios = against_peers(result)
    table = [[f"{r['task']}, {r['peer']}", r["ratio"], r["wanted"] or ""] for r in ratios]
    print_table("ours over the peer's (of llama.cpp the quicker file)", ("", "ratio", "wanted"), table)
    return result


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
    parser.add_argument("--store", type=Path, help="model store; the user's own when left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--streams", type=int, default=7)
    parser.add_argument("--long-prompt", type=int, default=1500)
    parser.add_argument("--stalls", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--peers", type=Path, default=peers_module.PEERS, help="where bench/peers.py's commands put them"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments)
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
