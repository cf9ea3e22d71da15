"""Ready ONNX folders: the layout is told from the graph, and what is missing is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models

from shared.errors import UnsupportedModel
from shared.models.manifest import Manifest
from shared.models.onnx_dir import import_folder

VOCAB = {"a": 0, "b": 1, "</s>": 2}


def graph(
    *,
    inputs: tuple[str, ...] = ("input_ids", "attention_mask"),
    gqa: bool = False,
    cache: int = TensorProto.FLOAT,
    heads: int | str = 2,
    past: bool = True,
    branch: bool = False,
) -> onnx.ModelProto:
    """A graph with the inputs and outputs of a decoder; it is looked at here, and never run."""
    shape = ["batch", heads, "length", 8]
    sides = [f"{layer}.{side}" for layer in range(3) for side in ("key", "value")] if past else []
    value = helper.make_tensor_value_info
    weights = numpy_helper.from_array(np.ones((3, 4), np.float32), "weights")
    nodes = [helper.make_node("GroupQueryAttention" if gqa else "Identity", ["x"], ["y"])]
    kept = [weights]
    if branch:
        inner = helper.make_graph([], "then", [], [], [weights])
        nodes.append(helper.make_node("If", ["use"], ["z"], then_branch=inner, else_branch=inner))
        kept = []
    made = helper.make_graph(
        nodes,
        "decoder",
        [
            *(value(n, TensorProto.INT64, ["b", "s"]) for n in inputs),
            *(value(f"past_key_values.{s}", cache, shape) for s in sides),
        ],
        [value("logits", TensorProto.FLOAT, ["b", "s", 3]), *(value(f"present.{s}", cache, shape) for s in sides)],
        kept,
    )
    return helper.make_model(made)


def folder(path: Path, model: onnx.ModelProto, file: str = "model.onnx", **texts: Any) -> Path:
    """A folder as an exporter leaves it; a text of None is left out."""
    (path / file).parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path / file))
    Tokenizer(models.BPE(VOCAB, [])).save(str(path / "tokenizer.json"))
    defaults = {
        "config": {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 512},
        "generation_config": {"eos_token_id": 2},
        "tokenizer_config": {"eos_token": "</s>", "bos_token": {"content": "a"}, "chat_template": "T"},
    }
    for name, content in (defaults | texts).items():
        if content is not None:
            (path / f"{name}.json").write_text(json.dumps(content))
    return path


def take_in(path: Path, out: Path) -> Manifest:
    return import_folder(path, out, name="ready", licence="MIT", source=str(path), variant="mine")


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ({"inputs": ("input_ids", "seqlens_k", "total_sequence_length"), "gqa": True}, "calm"),
        ({"gqa": True}, "gqa"),
        ({}, "concat"),
        ({"inputs": ("input_ids", "attention_mask", "position_ids", "use_cache_branch")}, "concat"),
    ],
)
def test_the_layout_is_told_from_the_graph(tmp_path: Path, options: dict[str, Any], layout: str) -> None:
    """Inputs and operators say how the graph keeps its cache."""
    manifest = take_in(folder(tmp_path / "in", graph(**options)), tmp_path / "out")
    assert [(v.name, v.layout) for v in manifest.variants] == [("mine", layout)]


def test_everything_about_the_model_is_read(tmp_path: Path) -> None:
    """Sizes come from graph and configuration, texts and stop tokens from the tokenizer's files."""
    manifest = take_in(folder(tmp_path / "in", graph(cache=TensorProto.FLOAT16)), tmp_path / "out")
    a, t = manifest.architecture, manifest.tokenizer
    assert (a.layers, a.hidden, a.heads, a.kv_heads, a.head_size, a.vocab, a.context) == (3, 32, 4, 2, 8, 3, 512)
    assert (a.kv_dtype, a.kv_bytes_per_token, a.parameters) == ("float16", 2 * 3 * 2 * 8 * 2, 12)
    assert (t.bos_token, t.eos_token, t.stop_token_ids) == ("a", "</s>", [2])
    assert (tmp_path / "out" / t.chat_template).read_text() == "T"


@pytest.mark.parametrize("file", ["onnx/model.onnx", "decoder_model_merged.onnx", "onnx/decoder_model_merged.onnx"])
def test_graphs_are_found_where_exporters_put_them(tmp_path: Path, file: str) -> None:
    """The graph may lie in `onnx/` and have the merged decoder's name."""
    take_in(folder(tmp_path / "in", graph(), file), tmp_path / "out")
    assert (tmp_path / "out/mine/model.onnx").is_file()


def test_a_genai_folder_is_understood(tmp_path: Path) -> None:
    """onnxruntime-genai's configuration names the graph, the context and the end of a text."""
    genai = {"model": {"context_length": 99, "eos_token_id": [1, 2], "decoder": {"filename": "my.onnx"}}}
    path = folder(tmp_path / "in", graph(gqa=True), "my.onnx", genai_config=genai, config=None, generation_config=None)
    manifest = take_in(path, tmp_path / "out")
    assert (manifest.architecture.context, manifest.tokenizer.stop_token_ids) == (99, [1, 2])


@pytest.mark.parametrize("branch", [False, True])
def test_weights_beside_the_graph_come_along(tmp_path: Path, branch: bool) -> None:
    """External data is copied, also that of branches inside the graph; when it is missing, it is named."""
    path = folder(tmp_path / "in", graph(branch=branch))
    model = onnx.load(str(path / "model.onnx"))
    inside = model.graph.node[1].attribute[0].g if branch else model.graph
    onnx.external_data_helper.set_external_data(inside.initializer[0], "weights.bin")
    (path / "model.onnx").write_bytes(model.SerializeToString())
    (path / "weights.bin").write_bytes(b"w" * 48)
    manifest = take_in(path, tmp_path / "out")
    assert set(manifest.variants[0].files) == {"model.onnx", "weights.bin"}
    (path / "weights.bin").unlink()
    with pytest.raises(UnsupportedModel, match=r"weights\.bin"):
        take_in(path, tmp_path / "again")


def test_weights_outside_the_folder_are_refused(tmp_path: Path) -> None:
    """A graph that refers to a file elsewhere on the machine is not followed there."""
    path = folder(tmp_path / "in", graph())
    (tmp_path / "private").write_bytes(b"w" * 48)
    model = onnx.load(str(path / "model.onnx"))
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "../private")
    (path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedModel, match="outside"):
        take_in(path, tmp_path / "out")
    assert not (tmp_path / "out/private").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"past": False}, "no KV cache"),
        ({"inputs": ("input_ids", "attention_mask", "pixel_values")}, "pixel_values"),
        ({"inputs": ("attention_mask",)}, "input_ids"),
        ({"heads": "heads"}, "usual shape"),
        ({"cache": TensorProto.BFLOAT16}, "BFLOAT16"),
    ],
)
def test_graphs_that_cannot_be_run_are_refused(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    """A graph that the engine could not feed is refused with the reason."""
    with pytest.raises(UnsupportedModel, match=named):
        take_in(folder(tmp_path / "in", graph(**options)), tmp_path / "out")


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    """No graph, a graph that is none, no tokenizer, no end-of-text token, broken JSON: each is said."""
    path = folder(tmp_path / "in", graph(), generation_config=None, tokenizer_config=None)
    with pytest.raises(UnsupportedModel, match="ends a text"):
        take_in(path, tmp_path / "out")
    (path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        take_in(path, tmp_path / "out")
    (path / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json"):
        take_in(path, tmp_path / "out")
    folder(path, graph())
    (path / "model.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(UnsupportedModel, match="not an ONNX graph"):
        take_in(path, tmp_path / "out")
    (path / "model.onnx").unlink()
    with pytest.raises(UnsupportedModel, match="no decoder graph"):
        take_in(path, tmp_path / "out")
