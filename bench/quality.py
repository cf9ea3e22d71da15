"""Quality, size and speed of a model's variants: how far each one's next-token distribution is from fp32's.

`python -m bench.quality [--model smollm2-135m] [--variants fp32 int8 int4] [--json FILE]`

Every variant reads the texts in `bench/texts` (prose, exposition, code, mathematics, dialogue; written for this) one
token at a time at batch 1, which is the path that decoding takes, and is compared with fp32 at every position: KL
divergence in nats, and how often both think the same token most likely. Speeds are of the bare session, the variants
taking turns in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bench.bandwidth import read_bytes_per_s
from bench.report import machine, print_machine, print_table, write_json
from services.workers.engine.runner import SharedKvRunner
from services.workers.engine.session import open_session
from shared.messages import Device
from shared.models.store import ModelStore
from shared.settings import Settings

TEXTS = Path(__file__).parent / "texts"
REFERENCE = "fp32"

Floats = NDArray[np.float32]


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
        file.stem: tokenizer.encode(file.read_text(), add_special_tokens=False).ids[: arguments.limit]
        for file in sorted(TEXTS.glob("*.txt"))
    }
    names = [REFERENCE, *(v for v in arguments.variants if v != REFERENCE)]
    device = Device(kind="cpu", name="cpu", threads=arguments.threads)
    context = max(*(len(t) for t in texts.values()), arguments.prompt_tokens + arguments.tokens) + 8
    runners, sizes = {}, {}
    for name in names:
        variant = store.variant(arguments.model, name)
        session = open_session(folder / variant.path / "model.onnx", device, arguments.threads)
        runners[name], sizes[name] = SharedKvRunner(session, 1, context, device), variant.weights_bytes
    scores: dict[str, dict[str, list[tuple[float, bool]]]] = {name: {} for name in names}
    for title, tokens in texts.items():
        reference = list(forced(runners[REFERENCE], tokens))
        for name in names[1:]:
            pairs = zip(reference, forced(runners[name], tokens), strict=True)
            scores[name][title] = [compare(one, other) for one, other in pairs]
        scores[REFERENCE][title] = [(0.0, True)] * len(tokens)
    prompt = next(iter(texts.values()))[: arguments.prompt_tokens]
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(arguments.repeats):
        for name in names:
            rates[name].append(speed(runners[name], prompt, arguments.tokens))
    bandwidth = read_bytes_per_s(arguments.threads)
    result: dict[str, Any] = {"benchmark": "quality", "machine": machine(), "arguments": _plain(arguments)}
    result["tokens"] = {title: len(tokens) for title, tokens in texts.items()}
    result["bandwidth_bytes_per_s"] = bandwidth
    result["variants"] = {}
    for name in names:
        every = [pair for pairs in scores[name].values() for pair in pairs]
        prefill, decode = (statistics.median(side) for side in zip(*rates[name], strict=True))
        result["variants"][name] = {
            "kl": statistics.fmean(kl for kl, _ in every),
            "top1": statistics.fmean(same for _, same in every),
            "top1_by_text": {t: statistics.fmean(same for _, same in pairs) for t, pairs in scores[name].items()},
            "weights_bytes": sizes[name],
            "prefill_tokens_per_s": prefill,
            "decode_tokens_per_s": decode,
            "bandwidth_share": decode * sizes[name] / bandwidth,
        }
    report(arguments, result)
    return result


def report(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    print_machine(result["machine"])
    rows = [
        [name, v["kl"], v["top1"], v["weights_bytes"] / 1e6, v["prefill_tokens_per_s"], v["decode_tokens_per_s"],
         v["bandwidth_share"]]
        for name, v in result["variants"].items()
    ]  # fmt: skip
    count = sum(result["tokens"].values())
    print_table(
        f"{arguments.model}: {count} teacher-forced tokens against fp32; speeds at {arguments.threads} threads",
        ("variant", "KL, nats", "top-1", "MB", "prefill/s", "decode/s", "of bandwidth"),
        rows,
    )
    rate = result["bandwidth_bytes_per_s"] / 1e9
    print(
        f"of bandwidth: bytes of the variant x tokens/s over the {rate:.1f} GB/s that {arguments.threads} threads read"
    )


def _plain(arguments: argparse.Namespace) -> dict[str, Any]:
    return {k: v if isinstance(v, (int, str, list)) else str(v) for k, v in vars(arguments).items() if v is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--variants", nargs="+", default=["fp32", "int8", "int4"])
    parser.add_argument("--store", type=Path, help="model store; the user's own when left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=int, help="tokens of each text at most")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments)
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
