"""Model families: what we compute of a GGUF is what transformers computes of the model it was made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from shared.errors import UnsupportedModel
from shared.models.families.spec import DecoderSpec, Layer, Rope
from shared.models.families.weights import Weights
from shared.models.gguf_import import GgufModel, import_gguf
from shared.models.onnx_graph import DecoderBuilder
from tests.decoder import Decoder
from tests.families import gguf
from tests.families.cases import CASES, Case, weights
from tests.families.logits import Imported, recorded

WITHIN = 1e-4
"""Largest difference of a logit. Measured: 2e-5 on logits of up to 67, 1e-5 on those below 20 (docs/models.md)."""
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_are_those_of_transformers(tmp_path: Path, case: Case) -> None:
    """At every position, beyond windows too: read token by token over the cache, at once, and in chunks."""
    imported, expected = Imported(case, tmp_path), recorded(case)
    np.testing.assert_allclose(imported.token_by_token(), expected, rtol=0, atol=WITHIN)
    for upto in (1, case.tokens // 2, case.tokens):
        np.testing.assert_allclose(imported.at_once(upto), expected[upto - 1], rtol=0, atol=WITHIN)
    chunks = [5, 1, 9, case.tokens - 15]
    np.testing.assert_allclose(imported.in_chunks(chunks), expected[np.cumsum(chunks) - 1], rtol=0, atol=WITHIN)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_are_those_of_transformers_now(tmp_path: Path, case: Case) -> None:
    """Where transformers is installed, it is asked itself, token by token over its own cache (but for long factors:
    its cache would keep keys rotated by the short ones, which is why its `generate` drops it on the way)."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.families.make import transformers_logits

    live = transformers_logits(case, cached="long" not in case.name)
    np.testing.assert_allclose(live, recorded(case), rtol=0, atol=WITHIN)
    np.testing.assert_allclose(Imported(case, tmp_path).token_by_token(), live, rtol=0, atol=WITHIN)


def _all_see_all(spec: DecoderSpec) -> DecoderSpec:
    return replace(spec, layers=tuple(replace(layer, window=0) for layer in spec.layers))


def _one_more(spec: DecoderSpec) -> DecoderSpec:
    return replace(spec, layers=tuple(replace(layer, window=layer.window + 1) for layer in spec.layers))


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("mistral-window", _all_see_all),
        ("mistral-window", _one_more),
        ("phi3-window", _one_more),
        ("gemma2", lambda s: replace(s, layers=tuple(Layer(window=8, rope="global") for _ in s.layers))),
        ("gemma2", lambda s: replace(s, attention_softcap=0.0)),
        ("gemma2", lambda s: replace(s, logit_softcap=0.0)),
        ("gemma2", lambda s: replace(s, family=replace(s.family, scaled_embedding=False))),
        ("gemma2-27b-scale", lambda s: replace(s, attention_scale=s.architecture.head_size**-0.5)),
        ("gemma3", lambda s: replace(s, ropes={**s.ropes, "window": s.ropes["global"]})),
        ("gemma3", lambda s: replace(s, layers=tuple(replace(layer, rope="global") for layer in s.layers))),
        ("gemma", lambda s: replace(s, family=replace(s.family, activation="silu"))),
        ("qwen3", lambda s: replace(s, family=replace(s.family, qk_norm=False))),
        ("llama", lambda s: replace(s, family=replace(s.family, paired_rotation=False))),
        ("llama3-rope", lambda s: replace(s, ropes={"global": Rope(10000.0 ** -(np.arange(8) / 8))})),
        ("phi3-long-above", lambda s: replace(s, ropes={"global": replace(s.ropes["global"], beyond=None)})),
        ("phi3-long-below", lambda s: replace(s, ropes={"global": replace(s.ropes["global"], magnitude=1.0)})),
    ],
)
def test_each_trait_shows_in_the_logits(
    tmp_path: Path, name: str, without: Callable[[DecoderSpec], DecoderSpec]
) -> None:
    """A graph that leaves one trait of its family out is a hundred times further off than the tests allow."""
    case = BY_NAME[name]
    model = GgufModel(gguf.write(tmp_path / "tiny.gguf", case, weights(case)))
    spec = without(model.spec)
    DecoderBuilder(spec, Weights(model.file, spec), "fp32").save(tmp_path / "fp32")
    imported = Imported.__new__(Imported)
    imported.case, imported._folder = case, tmp_path
    imported.manifest = import_gguf(
        tmp_path / "tiny.gguf", tmp_path / "other", name="x", licence="", source="", variants=()
    )
    assert np.abs(imported.at_once(case.tokens) - recorded(case)[-1]).max() > 100 * WITHIN


@pytest.mark.parametrize("name", ["mistral-window", "qwen3", "phi3-long-above", "gemma2", "gemma3"])
def test_rows_of_different_lengths_decode_together(tmp_path: Path, name: str) -> None:
    """One step over a sequence beyond its window and one within gives each the logits it has alone."""
    case = BY_NAME[name]
    imported, expected = Imported(case, tmp_path), recorded(case)
    both = imported.decoder(rows=2)
    ids = case.ids
    for place in range(30):
        second = min(place, 5)
        got = both.step([[ids[place]], [ids[second]]], [place, second])
    np.testing.assert_allclose(got, expected[[29, 5]], rtol=0, atol=WITHIN)


@pytest.mark.parametrize("variant", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama-biases", "qwen2", "qwen2-tied", "qwen3-tied", "phi4-partial", "gemma3"])
def test_quantised_variants_stay_near_fp32(tmp_path: Path, name: str, variant: str) -> None:
    """Heads of their own and tied ones, biases, fused and normalised projections: quantised, they point one way."""
    case = BY_NAME[name]
    got, expected = Imported(case, tmp_path, variant).token_by_token(variant), recorded(case)
    cosines = (got * expected).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(cosines) > {"int8": 0.999, "int4": 0.9}[variant]


@pytest.mark.parametrize("variant", ["fp16", "int8-fp16", "int4-fp16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3-tied", "phi3-long-above", "phi4-partial", "gemma", "gemma2"])
def test_half_precision_stays_near_fp32(tmp_path: Path, name: str, variant: str) -> None:
    """The graphs for GPUs, computed here on the CPU: float16 between all operators and in the cache, same direction."""
    case = BY_NAME[name]
    imported = Imported(case, tmp_path, variant)
    got, expected = imported.token_by_token(variant), recorded(case)
    cosines = (got * expected).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(cosines) > {"fp16": 0.99999, "int8-fp16": 0.999, "int4-fp16": 0.9}[variant]
    found = imported.manifest.variants[0]
    assert found.kv_dtype == "float16"
    spec = imported.manifest.artifact(found, slots=1, context=8, overhead_bytes=0)
    assert spec.kv_bytes_per_token == imported.manifest.architecture.kv_bytes_per_token // 2


def test_half_precision_is_refused_where_it_overflows(tmp_path: Path) -> None:
    """Gemma 3 in float16 would give infinities: refused, with what to use instead."""
    with pytest.raises(UnsupportedModel, match="half precision"):
        Imported(BY_NAME["gemma3"], tmp_path, "fp16")


def test_long_rope_goes_by_what_a_slot_can_hold(tmp_path: Path) -> None:
    """A cache for more than the original context rotates by the long factors from the first token on."""
    case = BY_NAME["phi3-long-above"]
    imported = Imported(case, tmp_path)
    small, large = (
        Decoder(tmp_path / "fp32/model.onnx", imported.manifest, length=length).step([case.ids[:20]], [0])[0]
        for length in (24, 25)
    )
    np.testing.assert_allclose(large, imported.at_once(20), atol=1e-6)
    assert np.abs(small - large).max() > 100 * WITHIN


def test_a_window_as_wide_as_the_context_is_none(tmp_path: Path) -> None:
    """Files that name a window that nothing can fall out of get plain attention; narrower ones their window."""
    case = BY_NAME["phi3-window"]
    for window, expected in ((127, 127), (128, 0), (262144, 0)):
        wide = replace(case, config={**case.config, "sliding_window": window})
        model = GgufModel(gguf.write(tmp_path / "tiny.gguf", wide, weights(wide)))
        assert {layer.window for layer in model.spec.layers} == {expected}


def test_fused_projections_are_read_in_any_family(tmp_path: Path) -> None:
    """A llama whose q, k and v lie in one tensor gives what it gives with three."""
    case = BY_NAME["llama"]
    whole = gguf.write(tmp_path / "whole.gguf", case, weights(case))
    fused: dict[str, Any] = {}
    reader = GGUFReader(whole)
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    for layer in range(2):
        parts = [tensors.pop(f"blk.{layer}.attn_{side}.weight") for side in "qkv"]
        fused[f"blk.{layer}.attn_qkv.weight"] = np.concatenate(parts)
    gguf.rewrite(whole, tmp_path / "fused.gguf", {**tensors, **fused})
    manifest = import_gguf(
        tmp_path / "fused.gguf", tmp_path / "out", name="x", licence="", source="", variants=("fp32",)
    )
    got = Decoder(tmp_path / "out/fp32/model.onnx", manifest).step([case.ids], [0])[0]
    np.testing.assert_allclose(got, recorded(case)[-1], rtol=0, atol=WITHIN)
