"""The tiny models: a transformers configuration each, and weights out of a seed."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

VOCAB = 96


@dataclass(frozen=True)
class Case:
    name: str
    model_type: str
    """transformers' name of the architecture."""
    config: dict[str, Any] = field(default_factory=dict)
    """What differs from `_COMMON`, in transformers' words."""
    tokens: int = 48
    """Length of the sequence that is compared; beyond every window."""
    capacity: int = 64
    """Tokens that the KV cache can hold."""
    biases: bool = False
    """q, k and v have biases."""

    @property
    def settings(self) -> dict[str, Any]:
        return {**_COMMON, **self.config}

    @property
    def ids(self) -> list[int]:
        """The sequence."""
        random = np.random.default_rng(zlib.crc32(f"{self.name} ids".encode()))
        return [int(i) for i in random.integers(3, VOCAB, self.tokens)]

    @property
    def head_size(self) -> int:
        s = self.settings
        return int(s.get("head_dim") or s["hidden_size"] // s["num_attention_heads"])


_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LONG = {
    "original_max_position_embeddings": 24,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 1.8],
        "long_factor": [1.1, 1.4, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
    },
}
_GEMMA = {"head_dim": 32, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}

CASES = (
    Case("llama", "llama"),
    Case(
        "llama3-rope",
        "llama",
        {
            "tie_word_embeddings": True,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    Case("llama-linear-rope", "llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    Case("llama-biases", "llama", {"attention_bias": True}, biases=True),
    Case("llama-far", "llama", {"max_position_embeddings": 300_000, "rope_theta": 1e6}),  # rotated by nodes
    Case("mistral-window", "mistral", {"sliding_window": 8, "head_dim": 32}),
    Case("qwen2", "qwen2", {"rope_theta": 1e6}, biases=True),
    Case("qwen2-tied", "qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}, biases=True),
    Case("qwen3", "qwen3", {"head_dim": 32, "rope_theta": 1e6}),
    Case("qwen3-tied", "qwen3", {"head_dim": 16, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    Case("phi3-window", "phi3", {"sliding_window": 12, "num_key_value_heads": 4}),
    Case("phi3-long-below", "phi3", _LONG, tokens=24, capacity=24),
    Case("phi3-long-above", "phi3", _LONG),
    Case("phi4-partial", "phi3", {"partial_rotary_factor": 0.75, "num_attention_heads": 1, "num_key_value_heads": 1}),
    Case(
        "phi4-partial-long",
        "phi3",
        {**_LONG, "partial_rotary_factor": 0.5, "num_attention_heads": 2, "tie_word_embeddings": True},
    ),
    Case("gemma", "gemma", {**_GEMMA, "num_key_value_heads": 1}),
    Case(
        "gemma2",
        "gemma2",
        {
            **_GEMMA, "num_hidden_layers": 4, "sliding_window": 8, "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
        },
    ),
    Case(
        "gemma2-27b-scale",
        "gemma2",
        {
            **_GEMMA, "intermediate_size": 32, "num_hidden_layers": 46, "sliding_window": 16,
            "head_dim": 16, "num_attention_heads": 2, "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        },
    ),
    Case(
        "gemma3",
        "gemma3_text",
        {
            **_GEMMA, "num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 32, "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
)  # fmt: skip


def weights(case: Case) -> dict[str, Floats]:
    """The model's parameters under transformers' names, [out, in], out of a seed that is the case's name."""
    random = np.random.default_rng(zlib.crc32(case.name.encode()))
    s, kind = case.settings, case.model_type
    hidden, inner, size = s["hidden_size"], s["intermediate_size"], case.head_size
    heads, kv_heads = s["num_attention_heads"] * size, s["num_key_value_heads"] * size
    gemma = kind.startswith("gemma")
    made: dict[str, Floats] = {}

    def matrix(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        made[f"{name}.weight"] = (random.standard_normal((rows, columns)) * scale / np.sqrt(columns)).astype(np.float32)

    def gain(name: str, width: int) -> None:
        # transformers' Gemma adds 1 to its norms' weights when it runs
        made[f"{name}.weight"] = (0.2 * random.standard_normal(width) + (0.0 if gemma else 1.0)).astype(np.float32)

    matrix("model.embed_tokens", VOCAB, hidden, np.sqrt(hidden) / (4 if gemma else 1))
    for index in range(s["num_hidden_layers"]):
        p = f"model.layers.{index}"
        gain(f"{p}.input_layernorm", hidden)
        if kind == "phi3":
            matrix(f"{p}.self_attn.qkv_proj", heads + 2 * kv_heads, hidden)
            matrix(f"{p}.mlp.gate_up_proj", 2 * inner, hidden)
        else:
            for side, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                matrix(f"{p}.self_attn.{side}_proj", rows, hidden)
                if case.biases:
                    made[f"{p}.self_attn.{side}_proj.bias"] = random.standard_normal(rows).astype(np.float32)
            matrix(f"{p}.mlp.gate_proj", inner, hidden)
            matrix(f"{p}.mlp.up_proj", inner, hidden)
        matrix(f"{p}.self_attn.o_proj", hidden, heads)
        if s.get("attention_bias"):  # of llama: the output has one too
            made[f"{p}.self_attn.o_proj.bias"] = random.standard_normal(hidden).astype(np.float32)
        matrix(f"{p}.mlp.down_proj", hidden, inner)
        gain(f"{p}.post_attention_layernorm", hidden)
        if kind in ("gemma2", "gemma3_text"):
            gain(f"{p}.pre_feedforward_layernorm", hidden)
            gain(f"{p}.post_feedforward_layernorm", hidden)
        if kind in ("qwen3", "gemma3_text"):
            gain(f"{p}.self_attn.q_norm", size)
            gain(f"{p}.self_attn.k_norm", size)
    gain("model.norm", hidden)
    if not s["tie_word_embeddings"]:
        matrix("lm_head", VOCAB, hidden, 3.0)
    return made


def fingerprint(parameters: dict[str, Floats]) -> str:
    """A hash of all parameters: tells a changed random generator from a wrong graph."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        digest.update(name.encode() + parameters[name].tobytes())
    return digest.hexdigest()
