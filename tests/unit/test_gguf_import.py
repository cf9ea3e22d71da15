"""The GGUF importer: the graph computes what the file says, and what it cannot compute it refuses by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from gguf import TokenType
from numpy.typing import NDArray
from tokenizers import Tokenizer

from shared.errors import UnsupportedModel
from shared.models import gguf_tokenizer
from shared.models.gguf_import import GgufModel, import_gguf
from shared.models.manifest import Manifest
from tests import tiny
from tests.decoder import Decoder

Floats = NDArray[np.float32]
SIXTEEN: dict[str, Any] = {"heads": 2, "kv_heads": 1, "hidden": 32, "feed_forward": 32}
"""A model with heads of 16: scores are scaled by a quarter."""
IDS = [1, 40, 7, 122, 280, 33, 91, 12, 250, 5]


def convert(source: Path, folder: Path, *variants: str) -> Manifest:
    return import_gguf(source, folder, name="tiny", licence="", source="here", variants=variants)


def reference(source: Path, ids: list[int]) -> Floats:
    """The file's model in plain numpy: logits [seq, vocab]. Rotates neighbouring pairs, as GGUF stores q and k."""
    model = GgufModel(source)
    a, fields = model.architecture, model.fields
    half = a.head_size // 2
    inverse = fields["llama.rope.freq_base"] ** -(np.arange(half) / half)
    factors = model.weight("rope_freqs.weight")
    if factors is not None:
        inverse = inverse / factors
    scale = fields.get("llama.rope.scaling.factor", 1.0)
    angles = np.outer(np.arange(len(ids)) / scale, inverse)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def w(name: str) -> Floats:
        value = model.weight(f"{name}.weight")
        assert value is not None, name
        return value

    def norm(x: Floats, name: str) -> Floats:
        root = np.sqrt((x * x).mean(-1, keepdims=True) + fields["llama.attention.layer_norm_rms_epsilon"])
        return np.asarray(x / root * w(name))

    def rotate(x: Floats) -> Floats:
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    x: NDArray[Any] = w("token_embd")[ids]
    hidden = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for layer in range(a.layers):
        p = f"blk.{layer}"
        y = norm(x, f"{p}.attn_norm")
        q = rotate((y @ w(f"{p}.attn_q").T).reshape(len(ids), a.heads, -1))
        k = rotate((y @ w(f"{p}.attn_k").T).reshape(len(ids), a.kv_heads, -1))
        v = (y @ w(f"{p}.attn_v").T).reshape(len(ids), a.kv_heads, -1)
        heads = []
        for index in range(a.heads):
            shared = index * a.kv_heads // a.heads
            scores = q[:, index] @ k[:, shared].T / np.sqrt(a.head_size) + hidden
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(heads, -1) @ w(f"{p}.attn_output").T
        y = norm(x, f"{p}.ffn_norm")
        gate = y @ w(f"{p}.ffn_gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w(f"{p}.ffn_up").T)) @ w(f"{p}.ffn_down").T
    head = model.weight("output.weight")
    return np.asarray(norm(x, "output_norm") @ (w("token_embd") if head is None else head).T, np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tied": True},
        {"tensor_type": "Q8_0"},
        {"rope_factors": True},
        {"heads": 2, "kv_heads": 1, "hidden": 32, "feed_forward": 32, "layers": 1},
        {"kv_heads": 4, "fields": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}},
    ],
    ids=["plain", "tied", "quantised-source", "rope-factors", "multi-query", "linear-scaling"],
)
def test_fp32_logits_are_those_of_the_file(tmp_path: Path, options: dict[str, Any]) -> None:
    """The fp32 graph computes, at every position, what a plain numpy pass over the file's tensors computes."""
    source = tiny.write_tiny_gguf(tmp_path / "tiny.gguf", **options)
    manifest = convert(source, tmp_path / "out", "fp32")
    expected = reference(source, IDS)
    decoder = Decoder(tmp_path / "out/fp32/model.onnx", manifest)
    got = np.concatenate([decoder.step([[token]], [place]) for place, token in enumerate(IDS)])
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", ["fp32", "int8", "int4"])
def test_chunked_prefill_equals_whole_prefill(tmp_path: Path, variant: str) -> None:
    """Reading a prompt in chunks gives the logits of reading it at once."""
    source = tiny.write_tiny_gguf(tmp_path / "tiny.gguf")
    manifest = convert(source, tmp_path / "out", variant)
    file = tmp_path / "out" / variant / "model.onnx"
    whole = Decoder(file, manifest).step([IDS], [0])
    chunked = Decoder(file, manifest)
    chunked.step([IDS[:4]], [0])
    chunked.step([IDS[4:9]], [4])
    np.testing.assert_allclose(chunked.step([IDS[9:]], [9]), whole, rtol=1e-3, atol=1e-3)


def test_rows_of_different_lengths_decode_together(tmp_path: Path) -> None:
    """One step over sequences of different lengths gives each the logits it gets alone."""
    source = tiny.write_tiny_gguf(tmp_path / "tiny.gguf")
    manifest = convert(source, tmp_path / "out", "fp32")
    file = tmp_path / "out/fp32/model.onnx"
    first, second = IDS, IDS[:3]
    both = Decoder(file, manifest, rows=2)
    for place, token in enumerate(first[:-1]):
        both.step([[token], [second[min(place, 1)]]], [place, min(place, 1)])
    together = both.step([[first[-1]], [second[-1]]], [9, 2])
    alone = [Decoder(file, manifest).step([ids], [0])[0] for ids in (first, second)]
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("variant", "cosine"), [("int8", 0.999), ("int4", 0.97)])
@pytest.mark.parametrize("tied", [True, False])
def test_quantised_variants_stay_near_fp32(tmp_path: Path, variant: str, cosine: float, *, tied: bool) -> None:
    """Quantised graphs give nearly the logits of fp32, from fewer bytes; 96 inputs make an odd number of blocks."""
    source = tiny.write_tiny_gguf(tmp_path / "tiny.gguf", hidden=128, feed_forward=96, tied=tied)
    manifest = convert(source, tmp_path / "out", "fp32", variant)
    full, small = (
        Decoder(tmp_path / "out" / v / "model.onnx", manifest).step([IDS], [0])[0] for v in ("fp32", variant)
    )
    assert full @ small / np.linalg.norm(full) / np.linalg.norm(small) > cosine
    sizes = {v.name: v.weights_bytes for v in manifest.variants}
    assert sizes[variant] < 0.5 * sizes["fp32"]


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_scaling_queries_in_their_weights_rounds_nothing_anew(tmp_path: Path, variant: str) -> None:
    """Scores are multiplied by nothing on CPUs, and the quantised values of q are those of unscaled weights: where the
    scale is a power of two, a graph that scales scores instead gives the very same logits."""
    manifest = convert(tiny.write_tiny_gguf(tmp_path / "tiny.gguf", **SIXTEEN), tmp_path / "out", variant)
    file = tmp_path / "out" / variant / "model.onnx"
    proto = onnx.load(str(file))
    for node in proto.graph.node:
        for attribute in node.attribute if node.op_type == "GroupQueryAttention" else ():
            if attribute.name == "scale":
                assert attribute.f == 1.0
                attribute.f = 0.25
    for tensor in proto.graph.initializer:
        if tensor.name.endswith(".qkv.s"):
            scales = onnx.numpy_helper.to_array(tensor).copy()
            scales[: 2 * 16] *= 4.0
            tensor.CopyFrom(onnx.numpy_helper.from_array(scales, tensor.name))
    onnx.save(proto, str(tmp_path / "other.onnx"))
    expected = Decoder(tmp_path / "other.onnx", manifest).step([IDS], [0])
    assert (Decoder(file, manifest).step([IDS], [0]) == expected).all()


def test_in_half_precision_the_operator_scales(tmp_path: Path) -> None:
    """Small weights are not made smaller where float16 has few digits left for them."""
    convert(tiny.write_tiny_gguf(tmp_path / "tiny.gguf", **SIXTEEN), tmp_path / "out", "int8-fp16")
    proto = onnx.load(str(tmp_path / "out/int8-fp16/model.onnx"), load_external_data=False)
    scales = {
        a.f for n in proto.graph.node if n.op_type == "GroupQueryAttention" for a in n.attribute if a.name == "scale"
    }
    assert scales == {0.25}


def test_tied_head_is_stored_once(tmp_path: Path) -> None:
    """A model that reads and writes tokens with one table has it once on disk, in every precision."""
    source = tiny.write_tiny_gguf(tmp_path / "tiny.gguf", tied=True)
    convert(source, tmp_path / "out", "fp32", "int8", "int4")
    for variant in ("fp32", "int8", "int4"):
        graph = onnx.load(str(tmp_path / "out" / variant / "model.onnx"), load_external_data=False).graph
        tables = [t.name for t in graph.initializer if t.dims and t.dims[0] == len(tiny.vocabulary()[0])]
        scales = [name for name in tables if name.endswith(".s")]
        assert len(tables) - len(scales) == 1, tables


def test_converting_again_replaces_what_is_there(tmp_path: Path) -> None:
    """A second conversion into the same folder makes the same bytes, and adds none."""
    source = tiny.write_tiny_gguf(tmp_path / "tiny.gguf")
    first, second = (convert(source, tmp_path / "out", "int8").variants[0] for _ in range(2))
    assert first == second


def test_manifest_describes_the_model(tmp_path: Path) -> None:
    """Architecture, licence, stop tokens and template come from the file itself."""
    source = tiny.write_tiny_gguf(tmp_path / "tiny.gguf")
    manifest = convert(source, tmp_path / "out", "int8")
    a = manifest.architecture
    assert (a.layers, a.hidden, a.heads, a.kv_heads, a.head_size, a.context) == (2, 64, 4, 2, 16, 256)
    assert manifest.licence == "apache-2.0"
    assert manifest.tokenizer.eos_token == "<|im_end|>"
    assert manifest.tokenizer.stop_token_ids == [0, 2]
    assert (tmp_path / "out" / manifest.tokenizer.chat_template).read_text() == tiny.CHAT_TEMPLATE


def test_tokenizer_reads_back_what_it_writes(tmp_path: Path) -> None:
    """Text survives the tokenizer, control tokens are found whole, digits stand alone."""
    convert(tiny.write_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "out", "int8")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    text = "the thing is 12: Ünï 東京 🙂\n\n  end"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("<|im_start|>a<|im_end|>").tokens == ["<|im_start|>", "a", "<|im_end|>"]
    assert tokenizer.encode("the and").tokens[-1] == "Ġand"
    assert tokenizer.encode("123").tokens == ["1", "2", "3"]


def test_sentencepiece_tokenizer_merges_by_score() -> None:
    """SentencePiece vocabularies merge the best-scored pair first, fall back to bytes, and keep user-defined
    tokens whole without hiding them."""
    pieces = [("<unk>", 0.0, TokenType.UNKNOWN), ("<s>", 0.0, TokenType.CONTROL), ("</s>", 0.0, TokenType.CONTROL)]
    pieces += [(f"<0x{b:02X}>", 0.0, TokenType.BYTE) for b in range(256)]
    pieces += [("<tool>", 0.0, TokenType.USER_DEFINED)]
    words = ["bc", "ab", "▁a", "▁ab", "▁", "a", "b", "c"]
    pieces += [(word, -float(rank), TokenType.NORMAL) for rank, word in enumerate(words)]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [p[0] for p in pieces],
        "tokenizer.ggml.scores": [p[1] for p in pieces],
        "tokenizer.ggml.token_type": [int(p[2]) for p in pieces],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = gguf_tokenizer.build(fields)
    assert tokenizer.encode("abc").tokens == ["▁a", "bc"]
    assert tokenizer.encode("é").tokens == ["▁", "<0xC3>", "<0xA9>"]
    ids = tokenizer.encode("ab<tool>c é").ids
    assert tokenizer.token_to_id("<tool>") in ids
    assert "<tool>" in tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(tokenizer.encode("ab é c").ids) == "ab é c"
    assert gguf_tokenizer.stop_token_ids(fields) == [2]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"fields": {"general.architecture": "mamba"}}, "mamba"),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, "yarn"),
        ({"fields": {"llama.expert_count": 8}}, "experts"),
        ({"fields": {"llama.rope.scaling.type": "longrope"}}, "longrope"),
        ({"fields": {"llama.logit_scale": 0.5}}, "llama.logit_scale"),
        ({"fields": {"llama.attention.head_count_kv": [2, 1]}}, "KV heads"),
        ({"fields": {"llama.rope.dimension_count": 8}}, "Partial rotation"),
        ({"fields": {"llama.block_count": None}}, "llama.block_count"),
        ({"fields": {"tokenizer.ggml.pre": "chatglm-bpe"}}, "chatglm-bpe"),
        ({"fields": {"tokenizer.ggml.model": "bert"}}, "bert"),
        ({"tensors": {"blk.1.attn_sinks.weight": np.ones(4, np.float32)}}, "blk.1.attn_sinks"),
        ({"tensors": {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}}, "blk.0.attn_q_norm.weight"),
        ({"without": ("blk.1.ffn_up.weight",)}, "blk.1.ffn_up.weight"),
        ({"feed_forward": 48}, "48"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    """A model that the graph would compute wrongly is refused, and the message names the reason."""
    source = tiny.write_tiny_gguf(tmp_path / "tiny.gguf", **options)
    with pytest.raises(UnsupportedModel, match=named) as raised:
        convert(source, tmp_path / "out", "int8")
    assert raised.value.remedy


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    """Another file, or one that broke off, is refused as unreadable."""
    source = tiny.write_tiny_gguf(tmp_path / "tiny.gguf")
    broken = tmp_path / "broken.gguf"
    for data in (b"", b"hello" * 100, source.read_bytes()[:200], source.read_bytes()[:100_000]):
        broken.write_bytes(data)
        with pytest.raises(UnsupportedModel, match=r"broken\.gguf"):
            convert(broken, tmp_path / "out", "int8")


def test_unknown_variants_are_refused(tmp_path: Path) -> None:
    """A variant that does not exist is answered with those that do."""
    source = tiny.write_tiny_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(UnsupportedModel, match="fp32, fp16, int8, int4"):
        convert(source, tmp_path / "out", "int3")
