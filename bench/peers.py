"""The peers on the same model, prompt and lengths: onnxruntime-genai on its own int8 build, and llama.cpp.

Peers are installed for benchmarks only, into an environment of their own:

    python -m venv .calm/peers && .calm/peers/bin/pip install onnxruntime-genai xllamacpp
    .calm/peers/bin/pip install torch==2.13.0 transformers onnx onnx-ir    # only to build the int8 model
    python -m bench.peers --export .calm/hf [--model smollm2-135m]         # the GGUF's weights as a Hugging Face folder
    .calm/peers/bin/python -m onnxruntime_genai.models.builder -m .calm/hf -o .calm/genai-int8 -p int8 -e cpu -c .calm/c
    python -m bench.peers --q8 .calm/q8.gguf                               # the same weights in Q8_0, for llama.cpp
    python -m bench.peers [--json FILE]

Its own int8 build has the very weights of the GGUF file, rounded by its own model builder. llama.cpp reads the GGUF as
it is, and, once `--q8 .calm/q8.gguf` has written it, the same weights in Q8_0: the quicker of the two is to compare
with. Prompts have the same lengths for everyone: decoding starts behind `--prompt-tokens`, and prefill is measured on
`--prefill-tokens`. Each peer runs in a process of its own; what is not there is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PEERS = Path(".calm")
"""Where the commands above put everything; `bench.engine` looks there."""

_TIMEOUT_S = 600.0


def genai(folder: str, threads: int, prompt: list[int], tokens: int, rows: int, repeats: int) -> dict[str, float]:
    """onnxruntime-genai's generator, greedy: prefill and decode of `rows` equal prompts, tokens/s in all."""
    import onnxruntime_genai as og  # noqa: PLC0415 lives in the peers' environment alone

    config = og.Config(folder)
    options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)
    reads, steps = [], []
    for _ in range(repeats + 1):
        settings = og.GeneratorParams(model)
        settings.set_search_options(max_length=len(prompt) + tokens + 8, batch_size=rows, do_sample=False, min_length=0)
        generator = og.Generator(model, settings)
        began = time.perf_counter()
        generator.append_tokens(prompt if rows == 1 else [prompt] * rows)
        generator.generate_next_token()
        reads.append(rows * len(prompt) / (time.perf_counter() - began))
        began, done = time.perf_counter(), 0
        for _step in range(tokens):
            if generator.is_done():  # an end token: what has been done counts
                break
            generator.generate_next_token()
            done += 1
        steps.append(rows * done / (time.perf_counter() - began))
        del generator
    return {"prefill_tokens_per_s": statistics.median(reads[1:]), "decode_tokens_per_s": statistics.median(steps[1:])}


def llama_cpp(file: str, threads: int, prompt: list[int], tokens: int, rows: int, repeats: int) -> dict[str, float]:
    """llama.cpp's server inside xllamacpp, by its own timings; at several sequences by the clock, decode and all."""
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

    import xllamacpp  # noqa: PLC0415 lives in the peers' environment alone

    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.n_parallel = rows
    settings.n_ctx = rows * (len(prompt) + tokens + 32)
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(settings)
    ask = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
    reads, steps = [], []
    with ThreadPoolExecutor(rows) as pool:
        for _ in range(repeats + 1):
            answers = list(pool.map(server.handle_completions, [dict(ask) for _ in range(rows)]))
            timings = [answer["timings"] for answer in answers]
            reads.append(statistics.median(t["prompt_per_second"] for t in timings))
            steps.append(sum(t["predicted_per_second"] for t in timings))
    return {"prefill_tokens_per_s": statistics.median(reads[1:]), "decode_tokens_per_s": statistics.median(steps[1:])}


PEER = {"onnxruntime-genai": genai, "llama.cpp": llama_cpp, "llama.cpp Q8_0": llama_cpp}


def measure(
    *,
    threads: int,
    prompt_tokens: int,
    tokens: int,
    rows: list[int],
    prefill_tokens: int = 512,
    repeats: int = 5,
    python: Path = PEERS / "peers/bin/python",
    models: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Figures by peer and number of sequences; of those that are installed and have their model."""
    if not python.exists():
        return {}
    figures: dict[str, Any] = {}
    for peer, model in (models or default_models()).items():
        job = {
            "peer": peer, "model": model, "threads": threads, "prompt_tokens": prompt_tokens, "tokens": tokens,
            "rows": rows, "prefill_tokens": prefill_tokens, "repeats": repeats,
        }  # fmt: skip
        command = [str(python), str(Path(__file__).resolve()), "--job", json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        line = done.stdout.strip().splitlines()[-1:] if done.returncode == 0 else []
        if line:
            figures[peer] = json.loads(line[0])
        else:
            print(f"{peer} did not run: {(done.stderr.strip().splitlines() or ['no output'])[-1]}", file=sys.stderr)
    return figures


def print_figures(figures: dict[str, Any], title: str, prefill_tokens: int) -> None:
    """One line for each peer: decode by number of sequences, and prefill."""
    from bench.report import print_table  # noqa: PLC0415 the peers' environment has no CALM

    counts = [count for count in next(iter(figures.values()), {}) if count != "prefill"]
    rows = [
        [peer, *(by[count]["decode_tokens_per_s"] for count in counts), by["prefill"]["tokens_per_s"]]
        for peer, by in figures.items()
    ]
    columns = ("peer", *(f"decode/s in all, {count}" for count in counts), f"prefill/s, {prefill_tokens}")
    print_table(title, columns, rows)


def default_models(folder: Path = PEERS, store: Path | None = None) -> dict[str, str]:
    """Those in `folder`, as the commands above leave them, and the store's GGUF."""
    from shared.settings import Settings  # noqa: PLC0415 the peers' environment has no CALM

    found = {"onnxruntime-genai": folder / "genai-int8"}
    found["llama.cpp"] = (store or Settings.from_env().models_path) / "smollm2-135m" / "source.gguf"
    found["llama.cpp Q8_0"] = folder / "q8.gguf"
    return {peer: str(path) for peer, path in found.items() if path.exists()}


def export(gguf: Path, folder: Path) -> None:
    """Write a llama-family GGUF as a Hugging Face folder of float32 weights."""
    import shutil  # noqa: PLC0415

    import numpy as np  # noqa: PLC0415

    from shared.models.families.weights import Rows, Weights  # noqa: PLC0415
    from shared.models.gguf_import import GgufModel  # noqa: PLC0415

    model = GgufModel(gguf)
    a, fields, weights = model.architecture, model.file.fields, Weights(model.file, model.spec)
    tensors = {
        "model.embed_tokens.weight": weights.need("token_embd.weight"),
        "model.norm.weight": weights.need("output_norm.weight").ravel(),
    }
    own = model.file.weight("output.weight")
    if own is not None:
        tensors["lm_head.weight"] = own
    for index in range(a.layers):
        p, blk = f"model.layers.{index}", f"blk.{index}"
        qkv = weights.matrix(weights.qkv(index))
        ends = np.cumsum([a.heads, a.kv_heads]) * a.head_size
        for name, part in zip("qkv", np.split(qkv, ends), strict=True):
            tensors[f"{p}.self_attn.{name}_proj.weight"] = part
        tensors[f"{p}.self_attn.o_proj.weight"] = weights.matrix([Rows(f"{blk}.attn_output")])
        tensors[f"{p}.mlp.gate_proj.weight"] = weights.matrix(weights.gate(index))
        tensors[f"{p}.mlp.up_proj.weight"] = weights.matrix(weights.up(index))
        tensors[f"{p}.mlp.down_proj.weight"] = weights.matrix([Rows(f"{blk}.ffn_down")])
        tensors[f"{p}.input_layernorm.weight"] = weights.need(f"{blk}.attn_norm.weight").ravel()
        tensors[f"{p}.post_attention_layernorm.weight"] = weights.need(f"{blk}.ffn_norm.weight").ravel()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": "float32",
        "hidden_size": a.hidden, "intermediate_size": len(tensors["model.layers.0.mlp.up_proj.weight"]),
        "num_hidden_layers": a.layers, "num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_size, "vocab_size": a.vocab, "max_position_embeddings": a.context,
        "rms_norm_eps": model.spec.epsilon, "rope_theta": float(fields.get("llama.rope.freq_base", 1e4)),
        "tie_word_embeddings": own is None, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    ends_at = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(ends_at))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    shutil.copy(gguf.parent / "tokenizer.json", folder / "tokenizer.json")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, value in tensors.items():
        header[name] = {"dtype": "F32", "shape": value.shape, "data_offsets": [place, place + value.nbytes]}
        place += value.nbytes
    head = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for value in tensors.values():
            file.write(np.ascontiguousarray(value, "<f4").tobytes())


def requantise(gguf: Path, target: Path) -> None:
    """Write the file's weights in Q8_0, as far as their rows are whole blocks; all else as it is.

    Bytes of the same metadata: what llama.cpp reads differs in the storage of its matrices alone.
    """
    import numpy as np  # noqa: PLC0415
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, quants  # noqa: PLC0415

    reader = GGUFReader(gguf)
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
    for tensor in reader.tensors:
        values = np.asarray(quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if values.ndim == 2 and values.shape[-1] % 32 == 0:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor.name, quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _prompt(tokens: int) -> list[int]:
    """Distinct tokens without a random generator, so that every environment reads the very same prompt."""
    return [1000 + (i * 7919) % 19000 for i in range(tokens)]


def _job(job: dict[str, Any]) -> None:
    run = PEER[job["peer"]]
    model, threads, repeats = job["model"], job["threads"], job["repeats"]
    figures = {}
    for rows in job["rows"]:
        figures[str(rows)] = run(model, threads, _prompt(job["prompt_tokens"]), job["tokens"], rows, repeats)
        del figures[str(rows)]["prefill_tokens_per_s"]
    long = run(model, threads, _prompt(job["prefill_tokens"]), 1, 1, repeats)
    figures["prefill"] = {"tokens": job["prefill_tokens"], "tokens_per_s": long["prefill_tokens_per_s"]}
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--export", type=Path, metavar="FOLDER")
    parser.add_argument("--q8", type=Path, metavar="FILE", help="write the GGUF's weights in Q8_0, for llama.cpp")
    parser.add_argument("--llama-q8", type=Path, default=PEERS / "q8.gguf")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--python", type=Path, default=PEERS / "peers/bin/python")
    parser.add_argument("--genai", type=Path, default=PEERS / "genai-int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.job:
        _job(json.loads(arguments.job))
        return
    from bench.report import machine, print_machine, write_json  # noqa: PLC0415
    from shared.settings import Settings  # noqa: PLC0415

    gguf = Settings.from_env().models_path / arguments.model / "source.gguf"
    if arguments.export:
        export(gguf, arguments.export)
        return
    if arguments.q8:
        requantise(gguf, arguments.q8)
        return
    found = {"onnxruntime-genai": arguments.genai, "llama.cpp": gguf, "llama.cpp Q8_0": arguments.llama_q8}
    models = {peer: str(path) for peer, path in found.items() if path.exists()}
    figures = measure(
        threads=arguments.threads, prompt_tokens=arguments.prompt_tokens, tokens=arguments.tokens,
        rows=arguments.rows, prefill_tokens=arguments.prefill_tokens, repeats=arguments.repeats,
        python=arguments.python, models=models,
    )  # fmt: skip
    facts = machine()
    print_machine(facts)
    print_figures(figures, f"{arguments.model}, {arguments.threads} threads", arguments.prefill_tokens)
    if arguments.json:
        write_json(arguments.json, {"benchmark": "peers", "machine": facts, "figures": figures})


if __name__ == "__main__":
    main()
