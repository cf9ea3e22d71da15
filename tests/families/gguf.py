"""Writes the tiny models as GGUF with the keys, names and row orders of llama.cpp's `convert_hf_to_gguf.py`.

Tensor names come from gguf-py's own map, which is what the converter uses.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    RopeScalingType,
    TokenType,
    get_tensor_name_map,
)
from gguf.quants import quantize
from numpy.typing import NDArray

from tests.families.cases import VOCAB, Case, Floats

_ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "phi3": MODEL_ARCH.PHI3,
    "gemma": MODEL_ARCH.GEMMA,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3_text": MODEL_ARCH.GEMMA3,
}


def write(
    path: Path, case: Case, parameters: dict[str, Floats], *, tensor_type: str = "F32", shard_tensors: int = 0
) -> Path:
    """The case's model as a GGUF; with `shard_tensors`, several parts of at most so many tensors (`path` is then the
    name that the parts' names begin with, and the first part's path is returned)."""
    s, arch = case.settings, _ARCHITECTURES[case.model_type]
    name = case.model_type.removesuffix("_text").replace("mistral", "llama")
    writer = GGUFWriter(path, name, split_max_tensors=shard_tensors)
    writer.add_context_length(s["max_position_embeddings"])
    writer.add_embedding_length(s["hidden_size"])
    writer.add_block_count(s["num_hidden_layers"])
    writer.add_feed_forward_length(s["intermediate_size"])
    writer.add_head_count(s["num_attention_heads"])
    writer.add_head_count_kv(s["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(s["rms_norm_eps"])
    if "head_dim" in s:
        writer.add_key_length(s["head_dim"])
        writer.add_value_length(s["head_dim"])
    if case.model_type not in ("gemma", "gemma2"):
        writer.add_rope_freq_base(s["rope_theta"])
    if case.model_type in ("llama", "mistral"):
        writer.add_rope_dimension_count(case.head_size)
        writer.add_vocab_size(VOCAB)
    extra = _rope(writer, case)
    if s.get("sliding_window"):
        writer.add_sliding_window(s["sliding_window"])
    if s.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(s["attn_logit_softcapping"])
    if s.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(s["final_logit_softcapping"])
    _vocabulary(writer)
    names = get_tensor_name_map(arch, s["num_hidden_layers"])
    kind = GGMLQuantizationType[tensor_type]
    for theirs, value in parameters.items():
        ours = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert ours is not None, theirs
        value = _stored(case, theirs, value)
        if value.ndim == 1 or tensor_type == "F32":
            writer.add_tensor(ours, value)
        else:
            writer.add_tensor(ours, quantize(value, kind), raw_dtype=kind)
    for tensor, factors in extra.items():
        writer.add_tensor(tensor, factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))
    return parts[0] if shard_tensors else path


def _stored(case: Case, name: str, value: Floats) -> Floats:
    """A parameter as the converter stores it."""
    if case.model_type in ("llama", "mistral"):
        for side, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            if name.endswith((f"{side}_proj.weight", f"{side}_proj.bias")):
                count = case.settings[heads]
                halves = value.reshape(count, 2, value.shape[0] // count // 2, *value.shape[1:])
                return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(value.shape))
    if case.model_type.startswith("gemma") and name.endswith("norm.weight"):
        return value + 1
    return value


def _rope(writer: GGUFWriter, case: Case) -> dict[str, Floats]:
    """Keys of the rotation's scaling, and the tensors it needs."""
    s = case.settings
    scaling: dict[str, Any] = s.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", ""))
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(case, scaling)}
    if case.model_type != "phi3":
        return {}
    rotated = int(s.get("partial_rotary_factor", 1.0) * s["hidden_size"]) // s["num_attention_heads"]
    original = s.get("original_max_position_embeddings", s["max_position_embeddings"])
    writer.add_rope_dimension_count(rotated)
    writer.add_rope_scaling_orig_ctx_len(original)
    if kind != "longrope":
        return {}
    writer.add_rope_scaling_attn_factors(
        math.sqrt(1 + math.log(s["max_position_embeddings"] / original) / math.log(original))
    )
    return {
        f"rope_factors_{length}.weight": np.array(scaling[f"{length}_factor"], np.float32)
        for length in ("long", "short")
    }


def _llama3_factors(case: Case, scaling: dict[str, Any]) -> Floats:
    """By how much each frequency is divided: not at all for short waves, by `factor` for long ones."""
    size = case.head_size
    waves = 2 * np.pi * case.settings["rope_theta"] ** (np.arange(0, size, 2) / size)
    original, low, high = (
        scaling[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    smooth = np.clip((original / waves - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / ((1 - smooth) / scaling["factor"] + smooth), np.float32)


def _vocabulary(writer: GGUFWriter) -> None:
    """Any vocabulary of the right size: these models are asked with ids."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", *(f"t{index}" for index in range(3, VOCAB))])
    writer.add_token_types([int(TokenType.NORMAL)] * VOCAB)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)


def rewrite(source: Path, target: Path, tensors: dict[str, NDArray[Any]], tensor_type: str = "F32") -> None:
    """The metadata of `source` with other tensors; those of `tensor_type` are given as blocks already."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for name, value in tensors.items():
        writer.add_tensor(name, value, raw_dtype=GGMLQuantizationType[tensor_type] if value.ndim > 1 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
