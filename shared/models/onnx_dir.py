"""Takes in a ready ONNX folder: finds the graph, tells its layout, reads tokenizer and chat template."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from shared.errors import UnsupportedModel
from shared.models.files import sha256_of, weights_file
from shared.models.gguf_import import describe_variant
from shared.models.manifest import Architecture, Manifest, TokenizerInfo

_NAMES = ("model.onnx", "decoder_model_merged.onnx", "decoder_with_past_model.onnx")
GRAPHS = tuple(f"{folder}{name}" for folder in ("", "onnx/") for name in _NAMES)
"""Where a decoder graph is looked for, besides what genai_config.json names; first found, first taken."""

_KV_TYPES: dict[int, Literal["float32", "float16"]] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
}
_FED = {"input_ids", "attention_mask", "position_ids", "use_cache_branch", "seqlens_k", "total_sequence_length"}
"""Inputs that the engine knows how to feed, besides the cache."""


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
    graph = _find(path)
    if not (path / "tokenizer.json").is_file():
        raise UnsupportedModel(f"{path} holds no tokenizer.json.", "Export the model with its tokenizer.")
    try:
        model = onnx.load(str(graph), load_external_data=False)
    except DecodeError as error:
        raise UnsupportedModel(f"{graph} is not an ONNX graph ({error}).", "Is the download complete?") from None
    layout, architecture = layout_of(model), _architecture(model, path)
    target = folder / variant
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(graph, target / "model.onnx")
    for file in sorted({entry.value for t in _tensors(model.graph) for entry in t.external_data if _located(entry)}):
        data = (graph.parent / file).resolve()
        if not data.is_relative_to(graph.parent.resolve()):
            raise UnsupportedModel(f"{graph} refers to {file}, outside its folder.", "Export the model again.")
        if not data.is_file():
            raise UnsupportedModel(f"{graph} keeps weights in {file}, which is not there.", "Copy that file as well.")
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data, target / file)
    shutil.copyfile(path / "tokenizer.json", folder / "tokenizer.json")
    made = [v for v in existing.variants if v.name != variant] if existing else []
    return Manifest(
        name=name,
        source=source,
        source_sha256=sha256_of(weights_file(path)),
        licence=licence,
        created_at=time.time(),
        architecture=architecture,
        tokenizer=tokenizer_info(path, folder),
        variants=[*made, describe_variant(variant, target, layout)],
    )


def _find(path: Path) -> Path:
    named = _genai(path).get("decoder", {}).get("filename")
    for candidate in [*([str(named)] if named else []), *GRAPHS]:
        graph = path / candidate
        if graph.is_file() and graph.resolve().is_relative_to(path.resolve()):
            return graph
    raise UnsupportedModel(f"{path} holds no decoder graph.", f"It should hold one of {', '.join(GRAPHS)}.")


def layout_of(model: onnx.ModelProto) -> Literal["calm", "gqa", "concat"]:
    """How the graph keeps its KV cache.

    Raises:
        UnsupportedModel: it takes none, or has an input that the engine cannot feed.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = {i.name for i in model.graph.input} - constants
    if not any(name.startswith("past") for name in inputs):
        raise UnsupportedModel("The graph takes no KV cache.", "Export it for text generation with past.")
    strange = sorted(name for name in inputs - _FED if not name.startswith("past"))
    if strange or "input_ids" not in inputs:
        what = f"wants the input {strange[0]!r}" if strange else "takes no input_ids"
        raise UnsupportedModel(f"The graph {what}.", f"The engine feeds past_*, {', '.join(sorted(_FED))}.")
    if "seqlens_k" in inputs:
        return "calm"
    if any(node.op_type == "GroupQueryAttention" for node in _nodes(model.graph)):
        return "gqa"
    return "concat"


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes of a graph and of the branches inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                yield from _nodes(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Constants of a graph and of the branches inside it: merged exports keep theirs in there."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for inner in [attribute.g, *attribute.graphs]:
                yield from _tensors(inner)


def _located(entry: onnx.StringStringEntryProto) -> bool:
    return bool(entry.key == "location")


def _architecture(model: onnx.ModelProto, path: Path) -> Architecture:
    config = read_json(path / "config.json")
    past = [i for i in model.graph.input if i.name.startswith("past")]
    shape = [d.dim_value for d in past[0].type.tensor_type.shape.dim]
    logits = next((o for o in model.graph.output if o.name == "logits"), None)
    if logits is None or len(shape) != 4 or not shape[1] or not shape[3]:
        raise UnsupportedModel(
            "The graph's KV cache or logits are not of the usual shape.",
            "Expected past_key_values.N.key [batch, heads, length, head_size] and logits [batch, length, vocab].",
        )
    kind = past[0].type.tensor_type.elem_type
    if kind not in _KV_TYPES:
        raise UnsupportedModel(
            f"The KV cache is of type {onnx.TensorProto.DataType.Name(kind)}.", "Export it as float32 or float16."
        )
    vocab = logits.type.tensor_type.shape.dim[-1].dim_value
    if not vocab:
        raise UnsupportedModel("The graph does not say how many logits it gives.", "Export it with a fixed vocabulary.")
    heads = int(config.get("num_attention_heads", shape[1]))
    context = config.get("max_position_embeddings") or _genai(path).get("context_length") or 2048
    return Architecture(
        family=str(config.get("model_type", "onnx")),
        layers=len(past) // 2,
        hidden=int(config.get("hidden_size", heads * shape[3])),
        heads=heads,
        kv_heads=shape[1],
        head_size=shape[3],
        vocab=int(vocab),
        context=int(context),
        parameters=sum(math.prod(tensor.dims) for tensor in _tensors(model.graph) if tensor.dims),
        kv_dtype=_KV_TYPES[kind],
    )


def tokenizer_info(path: Path, folder: Path) -> TokenizerInfo:
    """What the manifest says of the tokenizer of the model at `path`, which is in `folder` already; writes the chat
    template there. Raises UnsupportedModel when nothing says which token ends a text."""
    settings, generation = read_json(path / "tokenizer_config.json"), read_json(path / "generation_config.json")
    template_file = path / "chat_template.jinja"
    template = template_file.read_text() if template_file.is_file() else settings.get("chat_template") or ""
    if isinstance(template, list):  # several named templates
        template = next((t["template"] for t in template if t.get("name") == "default"), "")
    if template:
        (folder / "chat_template.jinja").write_text(template)
    tokenizer = read_json(path / "tokenizer.json")
    vocabulary = {t["content"]: t["id"] for t in tokenizer.get("added_tokens", [])}
    vocab = tokenizer.get("model", {}).get("vocab")
    known = {**vocab, **vocabulary} if isinstance(vocab, dict) else vocabulary
    eos = _text(settings.get("eos_token"))
    stops: set[int] = {int(known[eos])} if eos in known else set()
    for declared in (generation, read_json(path / "config.json"), _genai(path)):
        ids = declared.get("eos_token_id")
        stops |= {int(i) for i in (ids if isinstance(ids, list) else [] if ids is None else [ids])}
    if not stops:
        raise UnsupportedModel(
            f"{path} does not say which token ends a text.", "Add generation_config.json with `eos_token_id`."
        )
    return TokenizerInfo(
        sha256=sha256_of(folder / "tokenizer.json"),
        bos_token=_text(settings.get("bos_token")),
        eos_token=eos,
        stop_token_ids=sorted(stops),
        add_bos=bool(settings.get("add_bos_token", False)),
        chat_template="chat_template.jinja" if template else "",
    )


def _genai(path: Path) -> dict[str, Any]:
    """The `model` section of onnxruntime-genai's configuration."""
    section = read_json(path / "genai_config.json").get("model", {})
    return section if isinstance(section, dict) else {}


def read_json(file: Path) -> dict[str, Any]:
    """An object from a JSON file; empty when there is no such file. Raises UnsupportedModel when it is not JSON."""
    if not file.is_file():
        return {}
    try:
        loaded = json.loads(file.read_text())
    except ValueError as error:
        raise UnsupportedModel(f"{file} is not JSON ({error}).", "Is the download complete?") from None
    return loaded if isinstance(loaded, dict) else {}


def _text(token: Any) -> str:
    if isinstance(token, dict):
        return str(token.get("content", ""))
    return str(token or "")
