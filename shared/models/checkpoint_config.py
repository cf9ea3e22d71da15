"""A checkpoint's config.json in the words of GGUF metadata. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import UnsupportedModel

FAMILY_OF = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3",
    "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3",
}  # fmt: skip
"""GGUF's name of an architecture by transformers' `model_type`."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "phi3": {"rms_norm_eps": 1e-5},
    "gemma": {"head_dim": 256, "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {
        "head_dim": 256, "sliding_window": 4096, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "head_dim": 256, "sliding_window": 4096, "query_pre_attn_scalar": 256, "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
    },
}  # fmt: skip
"""What transformers takes where a file leaves a key out, as far as it differs from `_COMMON`."""
_COMMON: dict[str, Any] = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}
_REFUSED = ("quantization_config", "num_experts", "num_local_experts")


def fields_of(config: dict[str, Any]) -> dict[str, Any]:
    """GGUF metadata with the same meaning.

    Raises:
        UnsupportedModel: another family, or a setting that changes the model and has no counterpart.
    """
    kind = str(config.get("model_type", ""))
    if kind not in FAMILY_OF:
        raise UnsupportedModel(
            f"The checkpoint is of the type {kind!r}; graphs are built for {', '.join(FAMILY_OF)}.",
            "Use a GGUF or ONNX build of the model, or export it.",
        )
    for key in _REFUSED:
        if config.get(key):
            raise UnsupportedModel(
                f"`{key}` in config.json is not supported.", "Use a checkpoint in plain F32, F16 or BF16."
            )
    config = {**_COMMON, **_DEFAULTS.get(kind, {}), **config}
    _check_activation(kind, config)
    family = FAMILY_OF[kind]
    head_size = int(config.get("head_dim") or _need(config, "hidden_size") // _need(config, "num_attention_heads"))
    scaling = _scaling(config)
    values: dict[str, Any] = {
        "context_length": _need(config, "max_position_embeddings"),
        "embedding_length": _need(config, "hidden_size"),
        "block_count": _need(config, "num_hidden_layers"),
        "feed_forward_length": _need(config, "intermediate_size"),
        "attention.head_count": _need(config, "num_attention_heads"),
        "attention.head_count_kv": int(config.get("num_key_value_heads") or config["num_attention_heads"]),
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "rope.dimension_count": int(head_size * float(config.get("partial_rotary_factor") or 1.0)),
        "rope.freq_base": float(scaling.get("rope_theta", config["rope_theta"])),
    }
    if config.get("query_pre_attn_scalar"):
        values["attention.scale"] = float(config["query_pre_attn_scalar"]) ** -0.5
    for theirs, ours in (
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
        ("rope_local_base_freq", "rope.freq_base_swa"),
    ):
        if config.get(theirs):
            values[ours] = float(config[theirs])
    values |= _window(kind, config)
    match scaling_kind(scaling):
        case "linear":
            values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
        case "longrope":
            values["rope.scaling.type"] = "longrope"
            original = config.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
            values["rope.scaling.original_context_length"] = int(original or config["max_position_embeddings"])
            if scaling.get("attention_factor"):
                values["rope.scaling.attn_factor"] = float(scaling["attention_factor"])
        case "default" | "llama3":
            pass
        case other:
            raise UnsupportedModel(
                f"Rope scaling {other!r} is not supported.", "It is only needed for very long contexts: remove it."
            )
    return {"general.architecture": family, **{f"{family}.{key}": value for key, value in values.items()}}


def rope_tensors(config: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Tensors of rotation factors that a GGUF has and a checkpoint says in its configuration."""
    scaling = _scaling(config)
    kind = scaling_kind(scaling)
    if kind == "longrope":
        return {
            f"rope_factors_{length}.weight": np.array(scaling[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        }
    if kind != "llama3":
        return {}
    size = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    base = float(scaling.get("rope_theta", config.get("rope_theta", 10000.0)))
    waves = 2 * np.pi * base ** (np.arange(0, size, 2, dtype=np.float64) / size)
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    # Waves that are short beside the first context stay, long ones are stretched, those between are blended.
    blend = np.clip((float(scaling["original_max_position_embeddings"]) / waves - low) / (high - low), 0.0, 1.0)
    return {"rope_freqs.weight": (1.0 / ((1.0 - blend) / float(scaling["factor"]) + blend)).astype(np.float32)}


def scaling_kind(scaling: dict[str, Any]) -> str:
    """`default`, `linear`, `llama3`, `longrope`, or a name that is not known here."""
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    return "longrope" if kind == "su" else kind


def _scaling(config: dict[str, Any]) -> dict[str, Any]:
    """The rotation's settings; newer files call them `rope_parameters`, and have one set per kind of layer."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(found.get("full_attention"), dict):
        return dict(found["full_attention"])
    return dict(found)


def _window(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    window = config.get("sliding_window")
    if not window or (kind in ("qwen2", "qwen3") and not config.get("use_sliding_window")):
        return {}
    values: dict[str, Any] = {"attention.sliding_window": int(window)}
    types = config.get("layer_types")
    if isinstance(types, list):
        values["attention.sliding_window_pattern"] = [one == "sliding_attention" for one in types]
    elif config.get("sliding_window_pattern"):
        values["attention.sliding_window_pattern"] = int(config["sliding_window_pattern"])
    local = (config.get("rope_parameters") or {}).get("sliding_attention")
    if isinstance(local, dict) and "rope_theta" in local:
        values["rope.freq_base_swa"] = float(local["rope_theta"])
    return values


def _check_activation(kind: str, config: dict[str, Any]) -> None:
    expected = "gelu" if kind.startswith("gemma") else "silu"
    # The first Gemma says `gelu` and means the approximation; `hidden_activation` is what counts where it is given.
    said = config.get("hidden_activation") or config.get("hidden_act") or ""
    if kind == "gemma" and said == "gelu":
        return
    if said and _ACTIVATIONS.get(said) != expected:
        raise UnsupportedModel(f"The activation {said!r} is not supported for {kind}.", "Use a plain model.")


def _need(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise UnsupportedModel(f"config.json says nothing usable of `{key}`.", "Is the download complete?")
    return value
