"""A Hugging Face checkpoint (config.json and safetensors) read as if it were a GGUF file: same keys, same tensors.

So whatever reads the families of GGUF files reads checkpoints of the same families too, without torch. Tensor names
are translated by gguf-py's own map, which is what llama.cpp's converter uses.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import UnsupportedModel
from shared.models import safetensors
from shared.models.checkpoint_config import FAMILY_OF, fields_of, rope_tensors
from shared.models.gguf_file import Floats, GgufFile

_IGNORED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
"""Endings of tensors that are computed anew and not learned."""


@dataclass(frozen=True)
class _Tensor:
    """A tensor as gguf-py's reader shows one."""

    shape: tuple[int, ...]
    """In GGUF's order: the contiguous dimension first."""
    load: Callable[[], Floats]

    @property
    def data(self) -> Floats:
        return self.load()

    @property
    def tensor_type(self) -> Any:
        from gguf import GGMLQuantizationType  # noqa: PLC0415 heavy, and only importing needs it

        return GGMLQuantizationType.F32


class CheckpointFile(GgufFile):
    """The folder of a checkpoint.

    Raises:
        UnsupportedModel: no config.json, of no family that is known here, or its weights cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = config_of(path)
        self.fields = fields_of(self.config)
        self.fields["tokenizer.ggml.tokens"] = ["tokenizer.json"]  # it has one; nobody reads it from here
        self.tensors = self._named(_stored(path))
        for name, values in rope_tensors(self.config).items():
            self.tensors[name] = _Tensor(values.shape[::-1], partial(_given, values))

    def weight(self, name: str) -> Floats | None:
        tensor = self.tensors.get(name)
        return None if tensor is None else tensor.load()

    def _named(self, stored: dict[str, safetensors.Stored]) -> dict[str, Any]:
        """The tensors under GGUF's names; one that has none there keeps its own, and is refused by it."""
        from gguf import MODEL_ARCH, get_tensor_name_map  # noqa: PLC0415

        arch = MODEL_ARCH[self.architecture.upper()]
        names = get_tensor_name_map(arch, int(self.fields[f"{self.architecture}.block_count"]))
        gemma = self.architecture.startswith("gemma")
        tied = bool(self.config.get("tie_word_embeddings", gemma))
        made: dict[str, Any] = {}
        for theirs, one in stored.items():
            if theirs.endswith(_IGNORED) or (tied and theirs == "lm_head.weight"):
                continue
            ours = names.get_name(theirs, try_suffixes=(".weight", ".bias")) or theirs
            plus = 1.0 if gemma and theirs.endswith("norm.weight") else 0.0  # GGUF has the 1 added already
            made[ours] = _Tensor(one.shape[::-1], partial(_plus, one, plus) if plus else one.float32)
        return made


def config_of(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint. Raises UnsupportedModel when there is none that can be read."""
    file = path / "config.json"
    if not file.is_file():
        raise UnsupportedModel(f"{path} holds no config.json.", "Copy the model's whole folder.")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UnsupportedModel(f"{file} is not JSON ({error}).", "Is the download complete?") from None
    return config if isinstance(config, dict) else {}


def known(path: Path) -> bool:
    """Whether the checkpoint is of a family that a graph can be built for."""
    return config_of(path).get("model_type") in FAMILY_OF


def _stored(path: Path) -> dict[str, safetensors.Stored]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnsupportedModel(f"{index} cannot be read ({error!r}).", "Is the download complete?") from None
    else:
        parts = sorted(file.name for file in path.glob("*.safetensors"))
    tensors: dict[str, safetensors.Stored] = {}
    for part in parts:
        if "/" in part or not (path / part).is_file():
            raise UnsupportedModel(f"{path} lacks {part}.", "Copy all files of the model.")
        tensors |= safetensors.mapped(path / part)
    return tensors


def _plus(stored: safetensors.Stored, amount: float) -> Floats:
    return np.asarray(stored.float32() + np.float32(amount), np.float32)


def _given(values: Floats) -> Floats:
    return values
