"""Fills in a family's traits from a file: sizes, layers, rotations; refuses by name what the graph would leave out."""

from __future__ import annotations

import numpy as np

from shared.errors import UnsupportedModel
from shared.models.families.rope import ropes
from shared.models.families.spec import DecoderSpec, Family, Layer
from shared.models.gguf_file import GgufFile
from shared.models.manifest import Architecture

BLOCK = 32
"""Weights are quantised in blocks of so many inputs."""

_REFUSED_FIELDS = (
    "logit_scale", "embedding_scale", "residual_scale", "attention.clamp_kqv", "use_parallel_residual",
    "attention.temperature_scale", "attention.max_alibi_bias", "rope.dimension_sections", "swiglu_clamp_exp",
    "attention.key_length_mla", "attention.key_length_swa", "altup.num_inputs", "nextn_predict_layers",
)  # fmt: skip
"""Each changes what the graph would compute."""


def read(file: GgufFile, family: Family) -> DecoderSpec:
    """Everything about the file's decoder apart from its weights.

    Raises:
        UnsupportedModel: the file lacks something, or has something that the graph would compute wrongly.
    """
    _refuse_fields(file)
    architecture = _architecture(file, family)
    _refuse_tensors(file, family, architecture.layers)
    window = int(file.value("attention.sliding_window", family.window_default))
    if window and family.sliding_window == "none":
        raise UnsupportedModel(
            f"Sliding-window attention is not supported for {family.name}.", "Use a conversion without it."
        )
    layers = tuple(_layers(file, family, architecture.layers, window))
    rotated = int(file.value("rope.dimension_count", architecture.head_size))
    if (
        rotated > architecture.head_size
        or rotated % 2
        or (family.paired_rotation and rotated != architecture.head_size)
    ):
        raise UnsupportedModel(
            f"Partial rotation ({rotated} of {architecture.head_size}) is not supported for {family.name}.",
            "Use another model.",
        )
    per_head = architecture.head_size
    if architecture.layers == family.wide_scale_layers:
        per_head = architecture.hidden // architecture.heads
    return DecoderSpec(
        architecture=architecture,
        family=family,
        epsilon=float(file.value("attention.layer_norm_rms_epsilon")),
        attention_scale=float(file.value("attention.scale", 0.0)) or float(per_head**-0.5),
        attention_softcap=float(file.value("attn_logit_softcapping", 0.0)),
        logit_softcap=float(file.value("final_logit_softcapping", 0.0)),
        layers=layers,
        ropes=ropes(file, family, rotated, windows=any(layer.rope == "window" for layer in layers)),
    )


def _refuse_fields(file: GgufFile) -> None:
    if file.value("expert_count", 0):
        raise UnsupportedModel("Mixture-of-experts models are not supported.", "Use a dense model.")
    if file.value("pooling_type", 0):
        raise UnsupportedModel(
            f"{file.path.name} is an embedding or ranking model (it pools).", "Use a text-generation model."
        )
    changed = [name for name in _REFUSED_FIELDS if file.value(name, 0)]
    if changed:
        raise UnsupportedModel(
            f"`{file.architecture}.{changed[0]}` is not supported.", "Use another conversion of the model."
        )


def _architecture(file: GgufFile, family: Family) -> Architecture:
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(file.value(key, 1), list):
            raise UnsupportedModel(
                f"{'KV heads' if key.endswith('kv') else key} that differ by layer are not supported.",
                "Use a model whose layers are alike.",
            )
    hidden, heads = int(file.value("embedding_length")), int(file.value("attention.head_count"))
    head_size = int(file.value("attention.key_length", hidden // heads))
    if int(file.value("attention.value_length", head_size)) != head_size:
        raise UnsupportedModel("Keys and values of different sizes are not supported.", "Use another model.")
    if head_size % 8:
        raise UnsupportedModel(f"Head size {head_size} is not a multiple of 8.", "Use another model.")
    if not file.has("token_embd.weight"):
        raise UnsupportedModel(f"{file.path.name} lacks the tensor token_embd.weight.", "Is the download complete?")
    if not file.fields.get("tokenizer.ggml.tokens"):
        raise UnsupportedModel("The file has no tokenizer.", "Use a GGUF with its vocabulary included.")
    return Architecture(
        family=family.name,
        layers=int(file.value("block_count")),
        hidden=hidden,
        heads=heads,
        kv_heads=int(file.value("attention.head_count_kv", heads)),
        head_size=head_size,
        vocab=file.rows("token_embd.weight"),
        context=int(file.value("context_length")),
        parameters=int(sum(int(np.prod(tensor.shape)) for tensor in file.tensors.values())),
    )


def _refuse_tensors(file: GgufFile, family: Family, layers: int) -> None:
    needed = {"token_embd.weight", "output_norm.weight"}
    optional = {"rope_freqs.weight"}
    if family.separate_head:
        optional.add("output.weight")
    if family.long_rope:
        optional |= {"rope_factors_long.weight", "rope_factors_short.weight"}
    block = ["attn_norm.weight", "attn_output.weight", "ffn_norm.weight", "ffn_up.weight", "ffn_down.weight"]
    parts = ["attn_qkv"] if file.has("blk.0.attn_qkv.weight") else ["attn_q", "attn_k", "attn_v"]
    block += [f"{part}.weight" for part in parts]
    block += [] if family.fused_gate_up else ["ffn_gate.weight"]
    block += ["attn_q_norm.weight", "attn_k_norm.weight"] if family.qk_norm else []
    block += ["post_attention_norm.weight", "post_ffw_norm.weight"] if family.post_norms else []
    biases = {
        "none": [],
        "qkv": parts,
        "optional": [part.removesuffix(".weight") for part in block if "norm" not in part],
    }[family.biases]
    for index in range(layers):
        needed |= {f"blk.{index}.{part}" for part in block}
        (needed if family.biases == "qkv" else optional).update(f"blk.{index}.{part}.bias" for part in biases)
    lacking = sorted(needed - file.tensors.keys())
    if lacking:
        raise UnsupportedModel(
            f"{file.path.name} lacks the tensor {lacking[0]}.",
            "Is the download complete? A very old conversion may also name its tensors otherwise: re-convert it.",
        )
    # A tensor that the graph would leave out makes another model: refused by name.
    unknown = sorted(file.tensors.keys() - needed - optional)
    if unknown:
        raise UnsupportedModel(
            f"The tensor {unknown[0]} is not supported ({len(unknown)} such).",
            f"Use a plain {family.name} model ({family.models}).",
        )
    for name in (f"blk.0.{part}" for part in block if "norm" not in part):
        columns = int(file.tensors[name].shape[0])
        if columns % BLOCK:
            raise UnsupportedModel(f"Layer size {columns} ({name}) is not a multiple of {BLOCK}.", "Use another model.")


def _layers(file: GgufFile, family: Family, count: int, window: int) -> list[Layer]:
    if not window or family.sliding_window != "alternating":
        narrow = window < int(file.value("context_length"))  # Phi-3.5 names one that nothing falls out of
        return [Layer(window=window if narrow else 0, rope="global")] * count
    pattern = file.value("attention.sliding_window_pattern", family.window_period)
    if isinstance(pattern, list):  # for each layer, whether it has a window
        windowed = [bool(pattern[index]) for index in range(count)]
    else:
        windowed = [(index + 1) % int(pattern) != 0 for index in range(count)]
    other = "window" if family.window_rope_base is not None else "global"
    return [Layer(window=window, rope=other) if own else Layer(window=0, rope="global") for own in windowed]
