"""Tiny random Hugging Face checkpoints, written without torch: config, safetensors, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests import tiny


def write_tiny_checkpoint(
    path: Path,
    *,
    family: str = "llama",
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    feed_forward: int = 96,
    context: int = 256,
    tied: bool = False,
    shards: int = 1,
    seed: int = 0,
    config: dict[str, Any] | None = None,
) -> Path:
    """A random `llama`, `qwen2` (biases on q, k and v) or `qwen3` (norms on q and k) of about 300 tokens."""
    random = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    tokens = write_tokenizer(path)
    head_size = hidden // heads
    weights: dict[str, NDArray[np.float32]] = {}

    def matrix(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        weights[f"{name}.weight"] = (scale * random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(
            np.float32
        )

    def vector(name: str, size: int, around: float = 1.0) -> None:
        weights[name] = (around + 0.1 * random.standard_normal(size)).astype(np.float32)

    matrix("model.embed_tokens", len(tokens), hidden, scale=8.0)
    for index in range(layers):
        p = f"model.layers.{index}"
        vector(f"{p}.input_layernorm.weight", hidden)
        vector(f"{p}.post_attention_layernorm.weight", hidden)
        for side, rows in (("q", hidden), ("k", kv_heads * head_size), ("v", kv_heads * head_size)):
            matrix(f"{p}.self_attn.{side}_proj", rows, hidden)
            if family == "qwen2":
                vector(f"{p}.self_attn.{side}_proj.bias", rows, around=0.0)
            if family == "qwen3" and side != "v":
                vector(f"{p}.self_attn.{side}_norm.weight", head_size)
        matrix(f"{p}.self_attn.o_proj", hidden, hidden)
        matrix(f"{p}.mlp.gate_proj", feed_forward, hidden)
        matrix(f"{p}.mlp.up_proj", feed_forward, hidden)
        matrix(f"{p}.mlp.down_proj", hidden, feed_forward)
    vector("model.norm.weight", hidden)
    if not tied:
        matrix("lm_head", len(tokens), hidden, scale=3.0)
    values = {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}.get(family, "Qwen3ForCausalLM")],
        "model_type": family, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_size, "intermediate_size": feed_forward,
        "max_position_embeddings": context, "vocab_size": len(tokens), "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": tied, "bos_token_id": tokens.index("<|im_start|>"),
        "eos_token_id": tokens.index("<|im_end|>"), "torch_dtype": "float32", **(config or {}),
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(values))
    names = list(weights)
    files = {
        f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors": names[i::shards]
        for i in range(shards)
    }
    for file, held in files.items():
        tiny.write_safetensors(path / file, {name: weights[name] for name in held})
    if shards > 1:
        index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def write_tokenizer(path: Path) -> list[str]:
    """A byte-level BPE as `tokenizer.json`, with its configuration and a chat template; returns its tokens."""
    tokens, merges = tiny.vocabulary()
    tokenizer = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[tuple(m.split(" ")) for m in merges])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tiny.SPECIAL])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "chat_template": tiny.CHAT_TEMPLATE,
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = {"eos_token_id": [tokens.index("<|im_end|>")], "bos_token_id": tokens.index("<|im_start|>")}
    (path / "generation_config.json").write_text(json.dumps(generation))
    return tokens
