"""Takes in a ready ONNX folder: finds the graph, tells its layout, reads tokenizer and chat template."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any, Literal

import onnx

from shared.errors import UnsupportedModel
from shared.models.files import sha256_of
from shared.models.gguf_import import describe_variant
from shared.models.manifest import Architecture, Manifest, TokenizerInfo

_GRAPHS = ("model.onnx", "onnx/model.onnx", "decoder_model_merged.onnx", "decoder_with_past_model.onnx")
_FLOAT16 = 10


def import_folder(
    path: Path,
    folder: Path,
    *,
    name: str,
    licence: str,
    source: str,
    variant: str,
    existing: Manifest | None = None,
) -> Manifest:
    """Copy a folder with a decoder graph, `tokenizer.json` and its configuration into `folder`.

    Raises:
        UnsupportedModel: names what is missing.
    """
    graph = next((path / g for g in _GRAPHS if (path / g).is_file()), None)
    if graph is None:
        raise UnsupportedModel(f"{path} holds no decoder graph.", f"It should hold one of {', '.join(_GRAPHS)}.")
    tokenizer = path / "tokenizer.json"
    if not tokenizer.is_file():
        raise UnsupportedModel(f"{path} holds no tokenizer.json.", "Export the model with its tokenizer.")
    model = onnx.load(str(graph), load_external_data=False)
    target = folder / variant
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(graph, target / "model.onnx")
    for file in _external_files(model):
        shutil.copyfile(graph.parent / file, target / file)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    made = [v for v in existing.variants if v.name != variant] if existing else []
    return Manifest(
        name=name,
        source=source,
        source_sha256=sha256_of(graph),
        licence=licence,
        created_at=time.time(),
        architecture=_architecture(model, path),
        tokenizer=_tokenizer(path, folder),
        variants=[*made, describe_variant(variant, target, layout_of(model))],
    )


def layout_of(model: onnx.ModelProto) -> Literal["calm", "gqa", "concat"]:
    """How the graph keeps its KV cache.

    Raises:
        UnsupportedModel: it takes none.
    """
    inputs = {i.name for i in model.graph.input}
    if not any(name.startswith("past") for name in inputs):
        raise UnsupportedModel("The graph takes no KV cache.", "Export it for text generation with past.")
    if "seqlens_k" in inputs:
        return "calm"
    if any(node.op_type == "GroupQueryAttention" for node in model.graph.node):
        return "gqa"
    return "concat"


def _external_files(model: onnx.ModelProto) -> set[str]:
    return {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }


def _architecture(model: onnx.ModelProto, path: Path) -> Architecture:
    config = _json(path / "config.json")
    past = [i for i in model.graph.input if i.name.startswith("past")]
    shape = [d.dim_value for d in past[0].type.tensor_type.shape.dim]
    logits = next((o for o in model.graph.output if o.name == "logits"), None)
    if logits is None or len(shape) != 4 or not shape[1] or not shape[3]:
        raise UnsupportedModel(
            "The graph's KV cache or logits are not of the usual shape.",
            "Expected past_key_values.N.key [batch, heads, length, head_size] and logits [batch, length, vocab].",
        )
    vocab = logits.type.tensor_type.shape.dim[-1].dim_value or config.get("vocab_size", 0)
    heads = int(config.get("num_attention_heads", shape[1]))
    sizes = [tensor.dims for tensor in model.graph.initializer]
    return Architecture(
        family=str(config.get("model_type", "onnx")),
        layers=len(past) // 2,
        hidden=int(config.get("hidden_size", heads * shape[3])),
        heads=heads,
        kv_heads=shape[1],
        head_size=shape[3],
        vocab=int(vocab),
        context=int(config.get("max_position_embeddings", 2048)),
        parameters=sum(_product(dims) for dims in sizes),
        kv_dtype="float16" if past[0].type.tensor_type.elem_type == _FLOAT16 else "float32",
    )


def _tokenizer(path: Path, folder: Path) -> TokenizerInfo:
    settings, generation = _json(path / "tokenizer_config.json"), _json(path / "generation_config.json")
    config = _json(path / "config.json")
    template_file = path / "chat_template.jinja"
    template = template_file.read_text() if template_file.is_file() else settings.get("chat_template") or ""
    if isinstance(template, list):  # several named templates
        template = next((t["template"] for t in template if t.get("name") == "default"), "")
    if template:
        (folder / "chat_template.jinja").write_text(template)
    vocabulary = {t["content"]: t["id"] for t in _json(path / "tokenizer.json").get("added_tokens", [])}
    eos = _text(settings.get("eos_token"))
    declared: Any = generation.get("eos_token_id", config.get("eos_token_id"))
    stops = set(declared if isinstance(declared, list) else [] if declared is None else [declared])
    if eos in vocabulary:
        stops.add(vocabulary[eos])
    return TokenizerInfo(
        sha256=sha256_of(folder / "tokenizer.json"),
        bos_token=_text(settings.get("bos_token")),
        eos_token=eos,
        stop_token_ids=sorted(int(s) for s in stops),
        add_bos=bool(settings.get("add_bos_token", False)),
        chat_template="chat_template.jinja" if template else "",
    )


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    loaded = json.loads(file.read_text())
    return loaded if isinstance(loaded, dict) else {}


def _text(token: Any) -> str:
    if isinstance(token, dict):
        return str(token.get("content", ""))
    return str(token or "")


def _product(dims: Any) -> int:
    result = 1
    for dim in dims:
        result *= int(dim)
    return result
