"""GGUF files as files: parts, ways of storing tensors, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from shared.errors import UnsupportedModel
from shared.models.families import FAMILIES, family_of
from shared.models.families.read import read
from shared.models.gguf_import import GgufModel, import_gguf
from shared.models.sources import select
from tests import tiny
from tests.decoder import Decoder
from tests.families import gguf
from tests.families.cases import CASES, weights
from tests.families.logits import recorded

BY_NAME = {case.name: case for case in CASES}
WITHIN = 1e-4


def test_parts_of_a_split_model_are_joined(tmp_path: Path) -> None:
    """A model in several files imports from any of them, and names a part that is missing."""
    case = BY_NAME["qwen2"]
    first = gguf.write(tmp_path / "tiny.gguf", case, weights(case), shard_tensors=10)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3
    for source in (first, parts[2]):
        out = tmp_path / source.stem
        manifest = import_gguf(source, out, name="x", licence="", source="", variants=("fp32",))
        got = Decoder(out / "fp32/model.onnx", manifest).step([case.ids], [0])[0]
        np.testing.assert_allclose(got, recorded(case)[-1], rtol=0, atol=WITHIN)
    parts[1].rename(tmp_path / "other-name.gguf")
    with pytest.raises(UnsupportedModel, match="00002-of-00003") as raised:
        GgufModel(first)
    assert "gguf-split" in raised.value.remedy
    with pytest.raises(UnsupportedModel, match="one part of 3"):
        GgufModel(tmp_path / "other-name.gguf")


def test_all_parts_are_fetched_from_a_hub() -> None:
    """Naming one part of a split model in a repository fetches them all, and no other file."""
    parts = [f"big/m-0000{number}-of-00002.gguf" for number in (1, 2)]
    assert select([*parts, "big/m-00001-of-00003.gguf", "n.gguf", "config.json"], parts[0]) == parts


def test_the_document_names_every_family() -> None:
    """docs/models.md lists the families that are read, and the models they are known by."""
    document = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    for family in FAMILIES.values():
        assert f"| `{family.name}` | " in document
        assert family.models.split(",")[0] in document


@pytest.mark.parametrize(
    "kind",
    ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"],
)
def test_every_common_quantisation_is_read(tmp_path: Path, kind: str) -> None:
    """A quantised file gives the logits of a file that holds what its blocks stand for."""
    random = np.random.default_rng(3)
    plain = tiny.write_tiny_gguf(tmp_path / "plain.gguf", hidden=256, feed_forward=256, layers=1)
    packed: dict[str, NDArray[Any]] = {}
    meant: dict[str, NDArray[Any]] = {}
    for tensor in GGUFReader(plain).tensors:
        data = np.array(tensor.data)
        packed[tensor.name] = _blocks(data, kind, random) if data.ndim > 1 else data
        meant[tensor.name] = dequantize(packed[tensor.name], GGMLQuantizationType[kind]) if data.ndim > 1 else data
    ids, found = [5, 9, 200, 31], []
    for name, tensors in (("packed", packed), ("meant", meant)):
        source = tmp_path / f"{name}.gguf"
        gguf.rewrite(plain, source, tensors, kind if name == "packed" else "F32")
        manifest = import_gguf(source, tmp_path / name, name="x", licence="", source="", variants=("fp32",))
        found.append(Decoder(tmp_path / name / "fp32/model.onnx", manifest).step([ids], [0])[0])
    assert np.isfinite(found[0]).all()
    np.testing.assert_array_equal(*found)


def _blocks(values: NDArray[Any], kind: str, random: np.random.Generator) -> NDArray[Any]:
    """Any valid blocks of the right size: those that gguf-py cannot make are of random bits and small scales."""
    try:
        return np.asarray(quantize(values, GGMLQuantizationType[kind]))
    except NotImplementedError:
        pass
    size, width = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    count = values.shape[1] // size
    raw = random.integers(0, 256, (values.shape[0], count, width), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.002).tobytes(), np.uint8)
    at = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, (0, 2) if kind in ("Q4_K", "Q5_K") else (0,))
    for offset in at:
        raw[..., offset : offset + 2] = scale
    return raw.reshape(values.shape[0], count * width)


@pytest.mark.parametrize(
    ("name", "changed", "named"),
    [
        ("llama", {"general.architecture": "qwen2moe"}, "mixture-of-experts"),
        ("llama", {"general.architecture": "clip"}, "image input"),
        ("llama", {"general.architecture": "qwen2vl"}, "image input"),
        ("llama", {"general.architecture": "gemma3n"}, "gemma3n"),
        ("qwen2", {"qwen2.attention.sliding_window": 64}, "Sliding-window"),
        ("qwen2", {"qwen2.rope.scaling.type": "yarn"}, "yarn"),
        ("qwen3", {"qwen3.pooling_type": 3}, "embedding"),
        ("qwen3", {"qwen3.attention.value_length": 16}, "different sizes"),
        ("gemma3", {"gemma3.attention.head_count_kv": [1, 2]}, "differ by layer"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, name: str, changed: dict[str, Any], named: str) -> None:
    """A file that the graph would compute wrongly is refused with the reason and a remedy."""
    case = BY_NAME[name]
    model = GgufModel(gguf.write(tmp_path / "tiny.gguf", case, weights(case)))
    model.file.fields.update(changed)
    with pytest.raises(UnsupportedModel, match=named) as raised:
        read(model.file, family_of(model.file))
    assert raised.value.remedy


def test_unreadable_quantisation_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor in a format that cannot be read is refused with its name, the format, and what to use."""
    case = BY_NAME["llama"]
    model = GgufModel(gguf.write(tmp_path / "tiny.gguf", case, weights(case)))
    name = "blk.0.ffn_up.weight"
    model.file.tensors[name] = model.file.tensors[name]._replace(tensor_type=GGMLQuantizationType.Q8_K)
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.ffn_up\.weight is stored as Q8_K") as raised:
        model.write_variant("int8", tmp_path / "int8")
    assert "Q8_0" in raised.value.remedy
