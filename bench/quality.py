"""Quality, size and speed of a model's variants: how far each one's next-token distribution is from fp32's.

`python -m bench.quality [--texts FILE ...] [--parts quality speed] [--json FILE]`

Every variant reads the texts in `bench/texts` (prose, exposition, code, mathematics, dialogue; written for this), or
those of `--texts` (plain, or questions and answers in JSON lines), one token at a time at batch 1, which is the path
that decoding takes, and is compared with fp32 at every position: KL divergence in nats, and how often both think the
same token most likely. Speeds are of the bare session, the variants taking turns round by round; what is compared is
each round's ratio. The exit status is 1 where int4 misses what is wanted of it.
"""

from __future__ import annotations

from shared import one_thread  # noqa: F401 as engines have it: before anything imports NumPy

# isort: split
import argparse
import gzip
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bench.bandwidth import read_bytes_per_s
from bench.opened import open_as_engine
from bench.report import machine, print_machine, print_table, write_json
from services.workers.engine.runner import SharedKvRunner
from shared.models.store import ModelStore
from shared.settings import Settings

TEXTS = Path(__file__).parent / "texts"
REFERENCE = "fp32"
PARTS = ("quality", "speed")
SMALL, LARGE = "int4", "int8"
LEAST_TOP1, MOST_BYTES = 0.90, 0.75
"""Wanted of `SMALL`: agreement with fp32, and bytes over those of `LARGE`, than which it is to decode quicker."""

Floats = NDArray[np.float32]


def read_texts(paths: list[Path], count: int) -> dict[str, list[str]]:
    """Texts by file name: a plain file is one, a file of JSON lines (plain or gzipped) `count` of its rows, spread
    evenly over it: `question` and `answer`, or `prompt`."""
    texts: dict[str, list[str]] = {}
    for path in paths:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            if not path.name.removesuffix(".gz").endswith(".jsonl"):
                texts[path.stem] = [file.read()]
                continue
            rows = [json.loads(line) for line in file]
        chosen = [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else rows
        texts[path.name] = [_text(row) for row in chosen]
    return texts


def _text(row: dict[str, str]) -> str:
    """A row's words; the letters that name its options, and what marks a result, are no language and stay."""
    return "\n".join(row[key] for key in ("prompt", "question", "answer") if row.get(key))


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """Log-probabilities over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def compare(reference: Floats, other: Floats) -> tuple[float, bool]:
    """KL(reference || other) in nats of two logit vectors [vocab], and whether their most likely tokens agree."""
    p, q = log_softmax(reference), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum()), int(reference.argmax()) == int(other.argmax())


def forced(runner: SharedKvRunner, tokens: list[int]) -> Iterator[Floats]:
    """Logits [vocab] after each token of a text, read one at a time."""
    for place, token in enumerate(tokens):
        yield runner.decode([token], [place])[0].copy()


def speed(runner: SharedKvRunner, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Prefill and greedy decode of one sequence, tokens per second."""
    began = time.perf_counter()
    logits = runner.prefill(0, prompt, 0)
    read = time.perf_counter() - began
    current = int(logits.argmax())
    began = time.perf_counter()
    for step in range(tokens):
        current = int(runner.decode([current], [len(prompt) + step])[0].argmax())
    return len(prompt) / read, tokens / (time.perf_counter() - began)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    store = ModelStore(arguments.store or Settings.from_env().models_path)
    folder, manifest = store.path(arguments.model), store.get(arguments.model)
    tokenizer = Tokenizer.from_file(str(folder / manifest.tokenizer.file))
    texts = {
        title: [tokenizer.encode(text, add_special_tokens=False).ids[: arguments.limit] for text in each]
        for title, each in read_texts(arguments.texts, arguments.count).items()
    }
    names = [REFERENCE, *(v for v in arguments.variants if v != REFERENCE)]
    longest = max(len(tokens) for each in texts.values() for tokens in each)
    context = max(longest, arguments.prompt_tokens + arguments.tokens) + 8
    runners, sizes = {}, {}
    for name in names:
        opened = open_as_engine(arguments.model, name, arguments.store, arguments.threads)
        runners[name] = SharedKvRunner(opened.session, 1, context, opened.device)
        sizes[name] = store.variant(arguments.model, name).weights_bytes
    result: dict[str, Any] = {"benchmark": "quality", "machine": machine(), "arguments": _plain(arguments)}
    print_machine(result["machine"])
    result["weights_bytes"] = sizes
    if "quality" in arguments.parts:
        result["tokens"] = {title: sum(map(len, each)) for title, each in texts.items()}
        result["quality"] = {name: agreement(runners, name, texts) for name in names[1:]}
        _print_quality(arguments.model, result)
    if "speed" in arguments.parts:
        every = itertools.chain.from_iterable(tokens for each in texts.values() for tokens in each)
        prompt = list(itertools.islice(every, arguments.prompt_tokens))
        result["speed"] = speeds({n: runners[n] for n in names}, prompt, arguments.tokens, arguments.repeats)
        result["bandwidth_bytes_per_s"] = read_bytes_per_s(arguments.threads)
        _print_speed(arguments.threads, result)
    result["held"] = verdict(result)
    return result


def agreement(runners: dict[str, SharedKvRunner], name: str, texts: dict[str, list[list[int]]]) -> dict[str, Any]:
    """KL and top-1 agreement of variant `name` with fp32, over all tokens and by title."""
    scores: dict[str, list[tuple[float, bool]]] = {title: [] for title in texts}
    for title, each in texts.items():
        for tokens in each:
            pairs = zip(forced(runners[REFERENCE], tokens), forced(runners[name], tokens), strict=True)
            scores[title] += [compare(one, other) for one, other in pairs]
    every = [pair for pairs in scores.values() for pair in pairs]
    return {
        "kl": statistics.fmean(kl for kl, _ in every),
        "top1": statistics.fmean(same for _, same in every),
        "top1_by_text": {title: statistics.fmean(same for _, same in pairs) for title, pairs in scores.items()},
    }


def speeds(runners: dict[str, SharedKvRunner], prompt: list[int], tokens: int, rounds: int) -> dict[str, Any]:
    """Each variant's rates in `rounds` rounds after one that is dropped, each begun by another variant; tokens/s."""
    names = list(runners)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            rate = speed(runners[name], prompt, tokens)
            if number:
                rates[name].append(rate)
    prefills, decodes = ({n: [r[side] for r in rates[n]] for n in names} for side in (0, 1))
    ratios: list[float] = []
    if SMALL in rates and LARGE in rates:
        ratios = sorted(s / t for s, t in zip(decodes[SMALL], decodes[LARGE], strict=True))
    return {
        "prefill_tokens_per_s": {name: statistics.median(each) for name, each in prefills.items()},
        "decode_tokens_per_s": {name: statistics.median(each) for name, each in decodes.items()},
        "rounds": rounds, "small_over_large": ratios,
    }  # fmt: skip


def verdict(result: dict[str, Any]) -> bool:
    """What is wanted of `SMALL`, said line by line; whether all that was measured of it holds."""
    sizes, lines = result["weights_bytes"], []
    if SMALL not in sizes or LARGE not in sizes:
        return True
    share = sizes[SMALL] / sizes[LARGE]
    lines.append((share <= MOST_BYTES, f"{share:.3f} of {LARGE}'s bytes (wanted: {MOST_BYTES} at most)"))
    if "quality" in result:
        top1 = result["quality"][SMALL]["top1"]
        lines.append((top1 >= LEAST_TOP1, f"top-1 agreement {top1:.3f} (wanted: {LEAST_TOP1:.2f})"))
    if "speed" in result:
        ratios = result["speed"]["small_over_large"]
        middle, quicker = statistics.median(ratios), sum(ratio > 1 for ratio in ratios)
        inner = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        lines.append((
            middle > 1,
            f"decodes {middle:.3f} times as fast as {LARGE}, in half of the rounds {inner[0]:.3f} to {inner[1]:.3f},"
            f" in all {ratios[0]:.3f} to {ratios[-1]:.3f}; quicker in {quicker} of {len(ratios)}",
        ))  # fmt: skip
    for held, line in lines:
        print(f"{SMALL}: {line}: {'held' if held else 'NOT held'}")
    return all(held for held, _ in lines)


def _print_quality(model: str, result: dict[str, Any]) -> None:
    titles = list(result["tokens"])
    rows = [
        [name, q["kl"], q["top1"], *(q["top1_by_text"][t] for t in titles), result["weights_bytes"][name] / 1e6]
        for name, q in result["quality"].items()
    ]
    title = f"{model}: {sum(result['tokens'].values())} teacher-forced tokens against fp32"
    print_table(title, ("variant", "KL, nats", "top-1", *(f"in {t}" for t in titles), "MB"), rows)


def _print_speed(threads: int, result: dict[str, Any]) -> None:
    rate, speed = result["bandwidth_bytes_per_s"], result["speed"]
    rows = [
        [name, speed["prefill_tokens_per_s"][name], decode, decode * result["weights_bytes"][name] / rate]
        for name, decode in speed["decode_tokens_per_s"].items()
    ]
    title = f"speeds at {threads} threads, medians of {speed['rounds']} rounds"
    print_table(title, ("variant", "prefill/s", "decode/s", "of bandwidth"), rows)
    print(f"of bandwidth: bytes x tokens/s over the {rate / 1e9:.1f} GB/s that {threads} threads read")


def _plain(arguments: argparse.Namespace) -> dict[str, Any]:
    plain = {k: v if isinstance(v, (int, str)) else str(v) for k, v in vars(arguments).items() if v is not None}
    return plain | {"texts": [str(path) for path in arguments.texts]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--variants", nargs="+", default=["fp32", "int8", "int4"])
    parser.add_argument("--store", type=Path, help="model store; the user's own when left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=int, help="tokens of each text at most")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=12, help="rounds of the speeds")
    parser.add_argument("--texts", type=Path, nargs="+", default=sorted(TEXTS.glob("*.txt")))
    parser.add_argument("--count", type=int, default=20, help="rows of each file of JSON lines")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="measure these alone")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments)
    if arguments.json:
        write_json(arguments.json, result)
    if not result["held"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
