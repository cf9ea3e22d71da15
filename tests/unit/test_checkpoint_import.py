"""Checkpoints (config.json and safetensors) of the families that graphs are built for, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import NeedsExport, UnsupportedModel
from shared.models import safetensors
from shared.models.checkpoint_config import fields_of
from shared.models.checkpoint_import import import_checkpoint
from shared.models.manifest import Manifest
from shared.models.pull import Silent, Wanted, pull
from shared.models.store import ModelStore
from tests import tiny
from tests.decoder import Decoder
from tests.families.cases import CASES, Case, weights
from tests.families.logits import recorded
from tests.tiny_checkpoint import write_tiny_checkpoint, write_tokenizer

WITHIN = 1e-4


def write_case(path: Path, case: Case) -> Path:
    """A family's tiny model as a checkpoint, with any tokenizer: it is asked with ids."""
    path.mkdir()
    write_tokenizer(path)
    config = {**case.settings, "model_type": case.model_type}
    (path / "config.json").write_text(json.dumps(config))
    tiny.write_safetensors(path / "model.safetensors", weights(case))
    return path


def take_in(path: Path, folder: Path, *variants: str) -> Manifest:
    return import_checkpoint(path, folder, name="t", licence="", source="", variants=variants or ("fp32",))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_are_those_of_transformers(tmp_path: Path, case: Case) -> None:
    """Of every family and every way of rotating, from the checkpoint itself: all positions at once, then one by one."""
    manifest = take_in(write_case(tmp_path / "source", case), tmp_path / "made")
    expected = recorded(case)
    decoder = Decoder(tmp_path / "made" / "fp32" / "model.onnx", manifest, length=case.capacity)
    half = case.tokens // 2
    found = [decoder.step([case.ids[:half]], [0])[0]]
    found += [decoder.step([[token]], [half + i])[0] for i, token in enumerate(case.ids[half:])]
    np.testing.assert_allclose(np.stack(found), expected[half - 1 :], rtol=0, atol=WITHIN)


def test_a_whole_checkpoint_becomes_a_model_with_variants(tmp_path: Path) -> None:
    """In shards, with tied embeddings: the store has int8 and int4, the tokenizer, its template and its stops."""
    source = write_tiny_checkpoint(tmp_path / "source", family="qwen3", shards=3, tied=True)
    store = ModelStore(tmp_path / "models")
    made = pull(Wanted("tiny", str(source), "MIT", ("int8", "int4")), store, Silent())
    store.verify("tiny")
    assert [(v.name, v.layout) for v in made.variants] == [("int8", "calm"), ("int4", "calm")]
    assert (made.architecture.family, made.architecture.head_size, made.licence) == ("qwen3", 16, "MIT")
    assert (made.tokenizer.chat_template, made.tokenizer.add_bos) == ("chat_template.jinja", False)
    assert made.tokenizer.stop_token_ids == [tiny.vocabulary()[0].index("<|im_end|>")]
    more = pull(Wanted("tiny", str(source), "MIT", ("fp32",)), store, Silent())
    assert [v.name for v in more.variants] == ["int8", "int4", "fp32"]


def test_a_tokenizer_that_begins_texts_itself_is_noticed(tmp_path: Path) -> None:
    """Where the configuration does not say whether a text begins with a token, the tokenizer's own way decides."""
    source = write_tiny_checkpoint(tmp_path / "source", layers=1)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }  # fmt: skip
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert take_in(source, tmp_path / "made").tokenizer.add_bos


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model_type": "mixtral"}, "'mixtral'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_what_no_graph_is_built_for_is_named_and_can_be_exported(
    tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    """The error says what stands in the way, and how to go on."""
    source = write_tiny_checkpoint(tmp_path / "source", layers=1, config=change)
    with pytest.raises(NeedsExport, match=what) as raised:
        pull(Wanted("tiny", str(source), "", ("int8",)), ModelStore(tmp_path / "models"), Silent())
    assert f"calm models export {source}" in raised.value.remedy


def test_a_tensor_that_the_graph_would_leave_out_is_refused(tmp_path: Path) -> None:
    """An unknown weight makes another model."""
    source = write_tiny_checkpoint(tmp_path / "source", layers=1)
    tensors = safetensors.read(source / "model.safetensors")
    tensors["model.layers.0.self_attn.sinks"] = np.zeros(4, np.float32)
    tiny.write_safetensors(source / "model.safetensors", tensors)
    with pytest.raises(NeedsExport, match="sinks"):
        take_in(source, tmp_path / "made")


@pytest.mark.parametrize("missing", ["tokenizer.json", "model-00002-of-00002.safetensors", "config.json"])
def test_missing_files_are_named(tmp_path: Path, missing: str) -> None:
    """A folder that was copied in part says which file is not there."""
    source = write_tiny_checkpoint(tmp_path / "source", layers=1, shards=2)
    (source / missing).unlink()
    with pytest.raises(UnsupportedModel, match=missing):
        take_in(source, tmp_path / "made")


def test_half_precision_weights_are_widened_exactly(tmp_path: Path) -> None:
    """BF16 and F16 become the float32 that they stand for; a damaged file is refused."""
    values = np.array([1.0, -2.5, 3.140625, 0.0], np.float32)
    for kind, stored in (("BF16", (values.view(np.uint32) >> 16).astype("<u2")), ("F16", values.astype("<f2"))):
        header = json.dumps({"x": {"dtype": kind, "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
        file = tmp_path / f"{kind}.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header + stored.tobytes())
        np.testing.assert_array_equal(safetensors.read(file)["x"], values.reshape(2, 2))
        file.write_bytes(file.read_bytes()[:-3])
        with pytest.raises(UnsupportedModel, match="cut off"):
            safetensors.read(file)


def test_newer_configurations_say_the_same(tmp_path: Path) -> None:
    """`rope_parameters` by kind of layer, and `layer_types`, mean what the older keys meant."""
    old = {
        "model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 96, "max_position_embeddings": 128, "sliding_window": 8,
    }  # fmt: skip
    new = {
        **old, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    }  # fmt: skip
    fields = fields_of(new)
    assert fields["gemma3.attention.sliding_window_pattern"] == [True, True, False]
    assert (fields["gemma3.rope.freq_base"], fields["gemma3.rope.freq_base_swa"]) == (5e5, 2e4)
    assert fields["gemma3.rope.scaling.factor"] == 8.0
    assert fields_of(old)["gemma3.rope.freq_base_swa"] == 10000.0
