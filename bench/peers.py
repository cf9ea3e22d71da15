"""The peers on the same model, prompt and lengths: onnxruntime-genai on its own int8 build, and llama.cpp.

Peers are installed for benchmarks only, into an environment of their own:

    python -m venv .calm/peers && .calm/peers/bin/pip install onnxruntime-genai xllamacpp
    .calm/peers/bin/pip install torch==2.13.0 transformers onnx onnx-ir    # only to build the int8 model
    python -m bench.peers --export .calm/hf [--model smollm2-135m]         # the GGUF's weights as a Hugging Face folder
    .calm/peers/bin/python -m onnxruntime_genai.models.builder -m .calm/hf -o .calm/genai-int8 -p int8 -e cpu -c .calm/c
    python -m bench.peers --q8 .calm/q8.gguf                               # the same weights in Q8_0, for llama.cpp
    python -m bench.engine --parts peers [--json FILE]

Its own int8 build has the very weights of the GGUF file, rounded by its own model builder. llama.cpp reads the GGUF as
it is, and, once `--q8 .calm/q8.gguf` has written it, the same weights in Q8_0: the quicker of the two is to compare
with. Prompts have the same lengths for everyone, and no answer ends early. Each peer lives in a process of its own,
which is asked over a pipe, measures once, and sleeps while others are measured; what is not there is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

PEERS = Path(".calm")
"""Where the commands above put everything; `bench.engine` looks there."""

_TIMEOUT_S = 120.0
Rate = Callable[[], float]
"""Measures once; tokens per second, of all sequences together."""
Open = Callable[[str, int, int, int], Rate]
"""Of a task (`decode` or `prefill`), sequences, prompt tokens and tokens to decode: what measures it."""


def genai(folder: str, threads: int, task: str, rows: int, prompt: list[int], tokens: int) -> Rate:
    """onnxruntime-genai's generator, greedy."""
    import onnxruntime_genai as og  # noqa: PLC0415 lives in the peers' environment alone

    config = og.Config(folder)
    options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)
    most = len(prompt) + tokens + 8

    def rate() -> float:
        settings = og.GeneratorParams(model)
        settings.set_search_options(max_length=most, batch_size=rows, do_sample=False, min_length=most)
        generator = og.Generator(model, settings)
        began = time.perf_counter()
        generator.append_tokens(prompt if rows == 1 else [prompt] * rows)
        generator.generate_next_token()
        if task == "prefill":
            return rows * len(prompt) / (time.perf_counter() - began)
        began = time.perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        seconds = time.perf_counter() - began
        done = len(generator.get_sequence(0)) - len(prompt) - 1
        if done != tokens:
            raise RuntimeError(f"{done} of {tokens} tokens came")
        return rows * tokens / seconds

    return rate


def llama_cpp(file: str, threads: int, task: str, rows: int, prompt: list[int], tokens: int) -> Rate:
    """llama.cpp's server inside xllamacpp, by its own timings of each sequence."""
    import xllamacpp  # noqa: PLC0415 lives in the peers' environment alone

    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.n_parallel = rows
    settings.n_ctx = rows * (len(prompt) + tokens + 32)
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(settings)
    ask = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
    pool = ThreadPoolExecutor(rows)

    def rate() -> float:
        answers = list(pool.map(server.handle_completions, [dict(ask) for _ in range(rows)]))
        timings = [answer["timings"] for answer in answers]
        return float(sum(t["prompt_per_second" if task == "prefill" else "predicted_per_second"] for t in timings))

    return rate


PEER = {"onnxruntime-genai": genai, "llama.cpp": llama_cpp, "llama.cpp Q8_0": llama_cpp}


class Asked:
    """Whatever is measured, in a process of its own. Use it as a context manager.

    Raises:
        RuntimeError: it ended, or did not answer in time; with the last line of what it said.
    """

    def __init__(self, name: str, command: list[str], unset: Sequence[str] = ()) -> None:
        """`unset`: environment variables that it is not to inherit."""
        self.name = name
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 closed with the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, bufsize=1,
            env={name: value for name, value in os.environ.items() if name not in unset},
        )  # fmt: skip

    @classmethod
    def peer(cls, python: Path, peer: str, model: str, threads: int) -> Asked:
        command = [str(python), str(Path(__file__).resolve()), "--serve", json.dumps([peer, model, threads])]
        return cls(peer, command, unset=[name for name in os.environ if name.startswith("ORT_GQA_")])  # ours alone

    @property
    def pid(self) -> int:
        return self._process.pid

    def rate(self, task: str, *, rows: int, prompt_tokens: int, tokens: int) -> float:
        """One measurement of `task` (`decode` or `prefill`), tokens per second in all. The first of a task opens the
        model."""
        asked, answers = self._process.stdin, self._process.stdout
        assert asked is not None and answers is not None
        line = ""
        try:
            asked.write(json.dumps([task, rows, prompt_tokens, tokens]) + "\n")
            asked.flush()
            with selectors.DefaultSelector() as ready:
                ready.register(answers, selectors.EVENT_READ)
                line = answers.readline() if ready.select(_TIMEOUT_S) else ""
        except OSError:
            pass  # told below
        if not line:
            self._said.seek(0)
            said = self._said.read().strip().splitlines() or ["no output"]
            raise RuntimeError(f"{self.name} did not answer: {said[-1]}")
        return float(json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()  # the end of its input ends it
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()


def default_models(folder: Path, store: Path, model: str) -> dict[str, str]:
    """Those in `folder`, as the commands above leave them, and the store's GGUF."""
    found = {
        "onnxruntime-genai": folder / "genai-int8",
        "llama.cpp": store / model / "source.gguf",
        "llama.cpp Q8_0": folder / "q8.gguf",
    }
    return {peer: str(path) for peer, path in found.items() if path.exists()}


def _prompt(tokens: int) -> list[int]:
    """Distinct tokens without a random generator, so that every environment reads the very same prompt."""
    return [1000 + (i * 7919) % 19000 for i in range(tokens)]


def serve(opens: Open) -> None:
    """Measure what each line of the input asks for; a number comes back. One task's model is open at a time."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    current: list[Any] = []
    rate: Rate | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        if rate is None or asked != current:
            rate, current = None, asked
            rate = opens(*asked)
        answers.write(f"{rate()}\n")
    os._exit(0)  # llama.cpp's server has threads that are not ended otherwise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="the GGUF's weights as a Hugging Face folder")
    parser.add_argument("--q8", type=Path, metavar="FILE", help="write the GGUF's weights in Q8_0, for llama.cpp")
    parser.add_argument("--model", default="smollm2-135m")
    arguments = parser.parse_args()
    if arguments.serve:
        peer, model, threads = json.loads(arguments.serve)
        serve(
            lambda task, rows, prompt_tokens, tokens: PEER[peer](
                model, threads, task, rows, _prompt(prompt_tokens), tokens
            )
        )
        return
    from bench import peer_models  # noqa: PLC0415 the peers' environment has no CALM
    from shared.settings import Settings  # noqa: PLC0415

    gguf = Settings.from_env().models_path / arguments.model / "source.gguf"
    if arguments.export:
        peer_models.export(gguf, arguments.export)
    elif arguments.q8:
        peer_models.requantise(gguf, arguments.q8)
    else:
        parser.error("say --export FOLDER or --q8 FILE; `python -m bench.engine --parts peers` measures")


if __name__ == "__main__":
    main()
