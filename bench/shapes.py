"""Models of real shapes with random weights, made here by the converter that imports real ones: nothing is fetched.

What a step costs depends on the shape and not on what the weights are. All layers have the same ones, so that each
matrix is quantised once: 7 billion weights one by one take half an hour in int4.
"""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tokenizers import Tokenizer, models

from shared.models import quantize
from shared.models.checkpoint_config import fields_of, rope_tensors
from shared.models.families import family_of
from shared.models.families.read import read
from shared.models.families.weights import Rows, Weights
from shared.models.files import sha256_of
from shared.models.gguf_file import Floats, GgufFile
from shared.models.gguf_import import GgufModel, import_model
from shared.models.manifest import MANIFEST_FILE, Manifest, TokenizerInfo
from shared.models.onnx_graph import DecoderBuilder

_QWEN: dict[str, Any] = {
    "model_type": "qwen2", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def _config(
    base: dict[str, Any], hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, *, tied: bool
) -> dict[str, Any]:
    return {
        **base, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }  # fmt: skip


_LLAMA: dict[str, Any] = {
    "model_type": "llama", "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
    "rope_scaling": _LLAMA3, "head_dim": 128,
}  # fmt: skip
_MISTRAL: dict[str, Any] = {
    "model_type": "mistral", "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    "head_dim": 128, "sliding_window": None,
}  # fmt: skip

SHAPES = {
    "tiny": _config({**_QWEN, "max_position_embeddings": 1024}, 64, 96, 2, 4, 2, 512, tied=True),
    "qwen2.5-0.5b": _config(_QWEN, 896, 4864, 24, 14, 2, 151936, tied=True),
    "qwen2.5-1.5b": _config(_QWEN, 1536, 8960, 28, 12, 2, 151936, tied=True),
    "llama-3.2-3b": _config(_LLAMA, 3072, 8192, 28, 24, 8, 128256, tied=True),
    "qwen2.5-7b": _config(_QWEN, 3584, 18944, 28, 28, 4, 152064, tied=False),
    "mistral-7b": _config(_MISTRAL, 4096, 14336, 32, 32, 8, 32768, tied=False),
}
"""By name, in the words of a checkpoint's config.json."""

_POOL = 1 << 20


def slug(shape: str) -> str:
    """The model's name in a store."""
    return shape.replace(".", "-")


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    """In GGUF's order: the contiguous dimension first."""


class _File(GgufFile):
    """Tensors of a shape, made when they are asked for. The same numbers for all layers."""

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        self.path = Path(name)
        self.fields = {**fields_of(config), "tokenizer.ggml.tokens": ["tokenizer.json"]}
        self._given = rope_tensors(config)
        self.tensors = {name: _Tensor(shape) for name, shape in _shapes(config).items()}
        self.tensors |= {name: _Tensor(values.shape[::-1]) for name, values in self._given.items()}
        self._pool = np.random.default_rng(0).standard_normal(_POOL, dtype=np.float32)

    def weight(self, name: str) -> Floats | None:
        if name in self._given:
            return self._given[name]
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        if name.endswith("norm.weight"):
            return np.ones(tensor.shape, np.float32)
        shape = tensor.shape[::-1]
        start = zlib.crc32(_kind(name).encode()) % _POOL
        values = np.resize(np.roll(self._pool, start), shape)
        return np.asarray(values / np.float32(shape[-1] ** 0.5), np.float32)


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """By GGUF's names, in GGUF's order."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    wide, narrow = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    made: dict[str, tuple[int, ...]] = {"token_embd.weight": (hidden, vocab), "output_norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        made["output.weight"] = (hidden, vocab)
    for index in range(config["num_hidden_layers"]):
        p = f"blk.{index}."
        made |= {
            f"{p}attn_norm.weight": (hidden,), f"{p}ffn_norm.weight": (hidden,),
            f"{p}attn_q.weight": (hidden, wide), f"{p}attn_k.weight": (hidden, narrow),
            f"{p}attn_v.weight": (hidden, narrow), f"{p}attn_output.weight": (wide, hidden),
            f"{p}ffn_gate.weight": (hidden, inner), f"{p}ffn_up.weight": (hidden, inner),
            f"{p}ffn_down.weight": (inner, hidden),
        }  # fmt: skip
        if config["model_type"] == "qwen2":
            for side, width in (("q", wide), ("k", narrow), ("v", narrow)):
                made[f"{p}attn_{side}.bias"] = (width,)
    return made


def _kind(name: str) -> str:
    """The same for all layers."""
    return re.sub(r"blk\.\d+\.", "", name)


class _Alike(Weights):
    """Gives the same array for the same matrix of each layer."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._made: dict[tuple[str, ...], Floats] = {}

    def matrix(self, parts: Sequence[Rows]) -> Floats:
        key = tuple(_kind(part.tensor) for part in parts)
        if key not in self._made:
            self._made[key] = super().matrix(parts)
        return self._made[key]


@contextlib.contextmanager
def _quantised_once() -> Iterator[None]:
    """Within it, what has been quantised is not quantised again."""
    names = ("int8", "int4", "int4_symmetric")
    before = {name: getattr(quantize, name) for name in names}
    kept: dict[tuple[Any, ...], tuple[Floats, Any]] = {}  # with the array, so that its id stays its own

    def once(name: str) -> Callable[..., Any]:
        def quantised(weights: Floats, **more: Any) -> Any:
            key = (name, id(weights), *more.items())
            if key not in kept:
                kept[key] = (weights, before[name](weights, **more))
            return kept[key][1]

        return quantised

    for name in names:
        setattr(quantize, name, once(name))
    try:
        yield
    finally:
        for name in names:
            setattr(quantize, name, before[name])


class RandomModel(GgufModel):
    """A shape, opened for import as a checkpoint is."""

    def __init__(self, name: str) -> None:
        self.file = _File(name, SHAPES[name])
        self.fields = self.file.fields
        self.spec = read(self.file, replace(family_of(self.file), paired_rotation=False))
        self.architecture = self.spec.architecture

    def write_variant(self, precision: str, folder: Path) -> None:
        with _quantised_once():
            DecoderBuilder(self.spec, _Alike(self.file, self.spec), precision).save(folder)  # type: ignore[arg-type]

    def write_tokenizer(self, folder: Path) -> TokenizerInfo:
        """A word a token, so that answers have text; no token ends one."""
        folder.mkdir(parents=True, exist_ok=True)
        words = {f" w{number}": number for number in range(self.architecture.vocab)}
        Tokenizer(models.WordLevel(words, unk_token=" w0")).save(str(folder / "tokenizer.json"))  # noqa: S106
        return TokenizerInfo(sha256=sha256_of(folder / "tokenizer.json"))


def make(
    shape: str, store: Path, precisions: Sequence[str], on_variant: Callable[[str], None] = lambda _name: None
) -> Manifest:
    """Variants of a shape in the model store at `store`, of which those that are there already are kept."""
    folder = store / slug(shape)
    file = folder / MANIFEST_FILE
    existing = msgspec.json.decode(file.read_bytes(), type=Manifest) if file.is_file() else None
    model = RandomModel(shape)
    described = folder / "config.json"
    folder.mkdir(parents=True, exist_ok=True)
    described.write_bytes(msgspec.json.encode(SHAPES[shape]))
    manifest = import_model(
        model, described, folder, name=slug(shape), licence="", source="random", variants=precisions,
        existing=existing, on_variant=on_variant,
    )  # fmt: skip
    file.write_bytes(msgspec.json.encode(manifest))
    return manifest
