"""Tiny random models for tests: real files of the real formats, small enough to convert and run in a blink."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from shared.models.gguf_import import import_gguf
from shared.models.manifest import Manifest

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MERGES = (
    "t h", "Ġ t", "Ġ a", "h e", "Ġt he", "i n", "r e", "o n", "e r", "a n", "Ġ s", "o r", "e n", "Ġ w", "e s", "Ġ o",
    "i s", "Ġa n", "Ġan d", "i t", "Ġ c", "o u", "Ġ b", "a t", "Ġ f", "in g", "l l", "e d", "Ġ m", "Ġ p", "Ġ i",
    "Ġi s", "Ġo f", "Ġ d", "l e", "Ġt o", "a r", "Ġ in", "y ou", "Ġ you",
)  # fmt: skip


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens (specials, then the 256 bytes, then merged pieces) and merges of the tiny byte-level BPE."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *bytes_]
    merges = [m for m in _MERGES if all(part in bytes_ or part in _made() for part in m.split(" "))]
    tokens += [m.replace(" ", "") for m in merges]
    return tokens, merges


def _made() -> set[str]:
    return {m.replace(" ", "") for m in _MERGES}


def write_tiny_gguf(
    path: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    feed_forward: int = 96,
    context: int = 256,
    seed: int = 0,
    tied: bool = False,
    rope_factors: bool = False,
    tensor_type: str = "F32",
    chat_template: str | None = CHAT_TEMPLATE,
    fields: dict[str, Any] | None = None,
    tensors: dict[str, NDArray[np.float32]] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """A random llama-family GGUF with a byte-level BPE tokenizer of about 300 tokens; returns `path`.

    `hidden` and `feed_forward` must be multiples of 32. `tied` leaves the output head out; `rope_factors` adds a
    Llama 3 `rope_freqs` tensor; `tensor_type` (`F32`, `F16`, `Q8_0` ...) is that of the matrices. `fields`
    (strings, floats, ints, bools by full key; None removes a standard one) and `tensors` add to or replace what is
    written, `without` leaves tensors out: for files that an importer must refuse.
    """
    random = np.random.default_rng(seed)
    tokens, merges = vocabulary()
    head_size = hidden // heads
    values: dict[str, Any] = {
        "llama.context_length": context,
        "llama.embedding_length": hidden,
        "llama.block_count": layers,
        "llama.feed_forward_length": feed_forward,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": head_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": chat_template,
        "general.license": "apache-2.0",
        **(fields or {}),
    }
    writer = GGUFWriter(path, values.pop("general.architecture", "llama"))
    for key, value in values.items():
        _add(writer, key, value)
    types = [int(TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL) for token in tokens]
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        values: NDArray[np.float32] = (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
        return values

    def gain() -> NDArray[np.float32]:
        values: NDArray[np.float32] = (1 + 0.1 * random.standard_normal(hidden)).astype(np.float32)
        return values

    made = {"token_embd.weight": random.standard_normal((len(tokens), hidden)).astype(np.float32)}
    for index in range(layers):
        made |= {
            f"blk.{index}.attn_norm.weight": gain(),
            f"blk.{index}.attn_q.weight": matrix(hidden, hidden),
            f"blk.{index}.attn_k.weight": matrix(kv_heads * head_size, hidden),
            f"blk.{index}.attn_v.weight": matrix(kv_heads * head_size, hidden),
            f"blk.{index}.attn_output.weight": matrix(hidden, hidden),
            f"blk.{index}.ffn_norm.weight": gain(),
            f"blk.{index}.ffn_gate.weight": matrix(feed_forward, hidden),
            f"blk.{index}.ffn_up.weight": matrix(feed_forward, hidden),
            f"blk.{index}.ffn_down.weight": matrix(hidden, feed_forward),
        }
    made["output_norm.weight"] = gain()
    if not tied:
        made["output.weight"] = matrix(len(tokens), hidden) * 3
    if rope_factors:
        made["rope_freqs.weight"] = np.linspace(1, 8, head_size // 2, dtype=np.float32)
    kind = GGMLQuantizationType[tensor_type]
    for name, tensor in (made | (tensors or {})).items():
        if name in without:
            continue
        if tensor.ndim == 1 or tensor_type == "F32":
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            return
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


_WORDS = (
    "a an the and of to in is it you that was for on are with as his they be at one have this from or had by hot but "
    "some what there we can out other were all your when up use word how said each she which do their time if will "
    "way about many then them would write like so these her long make thing see him two has look more day could go "
    "come did my sound no most number who over know water than call first people may down side been now find"
)


def tiny_fp32(folder: Path, context: int) -> Manifest:
    """A tiny model in fp32, imported into `folder` itself: its graph is `fp32/model.onnx`."""
    gguf = write_tiny_gguf(folder / "tiny.gguf", context=context)
    return import_gguf(gguf, folder, name="t", licence="", source="", variants=["fp32"])


def write_tiny_embedder(
    path: Path, *, layers: int = 2, hidden: int = 64, heads: int = 4, positions: int = 128, seed: int = 0
) -> Path:
    """A random sentence embedder of the BERT family: config, safetensors, WordPiece tokenizer, pooling."""
    random = np.random.default_rng(seed)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = list(
        dict.fromkeys(
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_WORDS.split(), *letters, *(f"##{c}" for c in letters), *".,?!"]
        )
    )
    inner = 2 * hidden
    weights: dict[str, NDArray[np.float32]] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        weights[f"{name}.weight"] = (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def linear(name: str, rows: int, columns: int) -> None:
        matrix(name, rows, columns)
        weights[f"{name}.bias"] = (0.1 * random.standard_normal(rows)).astype(np.float32)

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = (1 + 0.1 * random.standard_normal(hidden)).astype(np.float32)
        weights[f"{name}.bias"] = (0.1 * random.standard_normal(hidden)).astype(np.float32)

    for table, rows in (("word", len(tokens)), ("position", positions), ("token_type", 2)):
        matrix(f"embeddings.{table}_embeddings", rows, hidden)
    norm("embeddings.LayerNorm")
    for index in range(layers):
        p = f"encoder.layer.{index}"
        for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            linear(f"{p}.{part}", hidden, hidden)
        norm(f"{p}.attention.output.LayerNorm")
        linear(f"{p}.intermediate.dense", inner, hidden)
        linear(f"{p}.output.dense", hidden, inner)
        norm(f"{p}.output.LayerNorm")

    (path / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": hidden, "pooling_mode_mean_tokens": True})
    )
    (path / "config.json").write_text(
        json.dumps({
            "model_type": "bert", "hidden_act": "gelu", "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "intermediate_size": inner, "max_position_embeddings": positions,
            "layer_norm_eps": 1e-12, "vocab_size": len(tokens),
        })
    )  # fmt: skip
    write_safetensors(path / "model.safetensors", weights)
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def write_safetensors(path: Path, tensors: dict[str, NDArray[np.float32]]) -> None:
    """Float32 tensors in the safetensors format: header length, JSON header, raw data."""
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).tobytes())
