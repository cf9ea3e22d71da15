"""A GGUF's weights in the forms that the peers read: a Hugging Face folder for onnxruntime-genai's model builder, and
Q8_0 for llama.cpp. `python -m bench.peers --export FOLDER | --q8 FILE` call it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, quants

from shared.models.families.weights import Rows, Weights
from shared.models.gguf_import import GgufModel


def export(gguf: Path, folder: Path) -> None:
    """Write a llama-family GGUF as a Hugging Face folder of float32 weights."""
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
