"""Sentence embedders: the graph computes BERT with mean pooling, whatever the batch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from shared.errors import ModelMissing, UnsupportedModel
from shared.models import safetensors
from shared.models.embedder import Embedder
from shared.models.embedder_import import import_embedder
from shared.models.manifest import Manifest
from shared.models.static_embedder import TABLE, StaticEmbedder
from tests import tiny

TEXTS = ["how do you write a number?", "the water is hot", "no", ""]


def convert(source: Path, folder: Path, *variants: str) -> Manifest:
    return import_embedder(source, folder, name="tiny", licence="Apache-2.0", source="here", variants=variants)


def reference(source: Path, text: str) -> NDArray[Any]:
    """The folder's model in plain numpy: a unit vector [hidden]."""
    config = json.loads((source / "config.json").read_text())
    w = safetensors.read(source / "model.safetensors")
    ids = Tokenizer.from_file(str(source / "tokenizer.json")).encode(text).ids
    heads = config["num_attention_heads"]

    def linear(x: NDArray[Any], name: str) -> NDArray[Any]:
        return np.asarray(x @ w[f"{name}.weight"].T + w[f"{name}.bias"])

    def norm(x: NDArray[Any], name: str) -> NDArray[Any]:
        centred = x - x.mean(-1, keepdims=True)
        spread = np.sqrt((centred**2).mean(-1, keepdims=True) + config["layer_norm_eps"])
        return np.asarray(centred / spread * w[f"{name}.weight"] + w[f"{name}.bias"])

    e = "embeddings"
    x = w[f"{e}.word_embeddings.weight"][ids] + w[f"{e}.position_embeddings.weight"][: len(ids)]
    x = norm(x + w[f"{e}.token_type_embeddings.weight"][0], f"{e}.LayerNorm")
    for layer in range(config["num_hidden_layers"]):
        p = f"encoder.layer.{layer}"
        q, k, v = (
            linear(x, f"{p}.attention.self.{side}").reshape(len(ids), heads, -1).swapaxes(0, 1)
            for side in ("query", "key", "value")
        )
        scores = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]))
        attended = (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(len(ids), -1)
        x = norm(linear(attended, f"{p}.attention.output.dense") + x, f"{p}.attention.output.LayerNorm")
        inner = linear(x, f"{p}.intermediate.dense")
        inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        x = norm(linear(inner, f"{p}.output.dense") + x, f"{p}.output.LayerNorm")
    mean = x.mean(0)
    return np.asarray(mean / np.linalg.norm(mean))


def test_fp32_embeddings_are_those_of_the_folder(tmp_path: Path) -> None:
    """The fp32 graph computes what a plain numpy pass computes, with padding in the batch and without."""
    source = tiny.write_tiny_embedder(tmp_path / "source")
    embedder = Embedder(tmp_path / "out", convert(source, tmp_path / "out", "fp32"), "fp32")
    expected = np.stack([reference(source, text) for text in TEXTS])
    np.testing.assert_allclose(embedder.embed(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(embedder.embed(TEXTS[:1]), expected[:1], atol=1e-5)


def test_int8_embeddings_stay_near_fp32(tmp_path: Path) -> None:
    """The int8 graph gives unit vectors close to those of fp32, from fewer bytes."""
    source = tiny.write_tiny_embedder(tmp_path / "source")
    manifest = convert(source, tmp_path / "out", "fp32", "int8")
    full, small = (Embedder(tmp_path / "out", manifest, name).embed(TEXTS) for name in ("fp32", "int8"))
    assert (full * small).sum(-1).min() > 0.99
    np.testing.assert_allclose(np.linalg.norm(small, axis=-1), 1, atol=1e-5)
    sizes = {v.name: v.weights_bytes for v in manifest.variants}
    assert sizes["int8"] < sizes["fp32"]


def test_int8_keeps_a_scale_for_each_channel(tmp_path: Path) -> None:
    """One outsized channel costs the others no precision: a real model's cosine fell from .99 to .88 by it."""
    convert(tiny.write_tiny_embedder(tmp_path / "source"), tmp_path / "out", "int8")
    constants = {t.name: t for t in onnx.load(str(tmp_path / "out/int8/model.onnx")).graph.initializer}
    weights = {name: t for name, t in constants.items() if name.endswith(".w_quantized")}
    assert len(weights) == 2 * 6
    for name, tensor in weights.items():
        scale = constants[name.replace("_quantized", "_scale")]
        assert list(scale.dims) == [tensor.dims[1]]


def test_long_texts_are_cut(tmp_path: Path) -> None:
    """A text longer than the model reads is embedded by its beginning."""
    source = tiny.write_tiny_embedder(tmp_path / "source", positions=32)
    embedder = Embedder(tmp_path / "out", convert(source, tmp_path / "out", "fp32"), "fp32")
    long, longer = embedder.embed(["water " * 100]), embedder.embed(["water " * 4000])
    np.testing.assert_array_equal(long, longer)


def test_no_texts_give_no_embeddings(tmp_path: Path) -> None:
    """An empty list is answered with an empty array."""
    source = tiny.write_tiny_embedder(tmp_path / "source")
    embedder = Embedder(tmp_path / "out", convert(source, tmp_path / "out", "fp32"), "fp32")
    assert embedder.embed([]).shape == (0, 64)


def test_a_missing_variant_is_named(tmp_path: Path) -> None:
    """Asking for a variant that was not imported says which."""
    manifest = convert(tiny.write_tiny_embedder(tmp_path / "source"), tmp_path / "out", "fp32")
    with pytest.raises(ModelMissing, match="int8"):
        Embedder(tmp_path / "out", manifest, "int8")


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("config.json", {"model_type": "mpnet"}, "mpnet"),
        ("config.json", {"hidden_act": "relu"}, "relu"),
        ("config.json", {"position_embedding_type": "relative_key"}, "relative_key"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, "mean"),
        ("model.safetensors", None, r"model\.safetensors"),
        ("tokenizer.json", None, r"tokenizer\.json"),
    ],
)
def test_other_embedders_are_refused(tmp_path: Path, file: str, change: dict[str, Any] | None, named: str) -> None:
    """A folder that the graph would compute wrongly, or that lacks a file, is refused by name."""
    source = tiny.write_tiny_embedder(tmp_path / "source")
    if change is None:
        (source / file).unlink()
    else:
        (source / file).write_text(json.dumps(json.loads((source / file).read_text()) | change))
    with pytest.raises(UnsupportedModel, match=named):
        convert(source, tmp_path / "out", "fp32")


def test_safetensors_read_back(tmp_path: Path) -> None:
    """Tensors of every floating type that models come in are read as float32; damage is refused."""
    values = np.array([[1.0, -2.5], [0.125, 3.0]], np.float32)
    stored: dict[str, NDArray[Any]] = {
        "F32": values,
        "F16": values.astype(np.float16),
        "BF16": (values.view(np.uint32) >> 16).astype(np.uint16),
    }
    for kind, tensor in stored.items():
        header = json.dumps({"x": {"dtype": kind, "shape": [2, 2], "data_offsets": [0, tensor.nbytes]}}).encode()
        file = tmp_path / f"{kind}.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header + tensor.tobytes())
        np.testing.assert_array_equal(safetensors.read(file)["x"], values)
    for damaged in (file.read_bytes()[:-2], file.read_bytes()[:20], b"not one"):
        file.write_bytes(damaged)
        with pytest.raises(UnsupportedModel, match="BF16"):
            safetensors.read(file)


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_static_table_finds_the_tokens_that_the_tokenizer_gives(tmp_path: Path, lowercase: bool) -> None:
    """Words are taken apart here where that is the same, and by the tokenizer where it is not."""
    file = tmp_path / "tokenizer.json"
    made = json.loads((tiny.write_tiny_embedder(tmp_path / "source") / "tokenizer.json").read_text())
    made["normalizer"]["lowercase"] = lowercase
    file.write_text(json.dumps(made))
    tokenizer = Tokenizer.from_file(str(file))
    (tmp_path / "static").mkdir()
    np.save(tmp_path / "static" / TABLE, np.ones((tokenizer.get_vocab_size(), 4), np.float16))
    architecture = SimpleNamespace(context=10_000)
    manifest = SimpleNamespace(tokenizer=SimpleNamespace(file=file.name), architecture=architecture)
    embedder = StaticEmbedder(tmp_path, manifest, "static")  # type: ignore[arg-type]
    texts = [
        *TEXTS, "How's the WATER, hot-dog?", "a\tb\r\nc  d", "3.14 (or 22/7)", "the [CLS] water [SEP]", "x" * 120,
        "wa\x00ter\x1f is", "la température", "水 water", "##er write", "the the The",
    ]  # fmt: skip
    for text in texts:
        assert embedder.ids(text) == tokenizer.encode(text, add_special_tokens=False).ids, text
