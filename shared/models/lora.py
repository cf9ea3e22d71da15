"""LoRA adapters: read from PEFT folders and GGUF files, kept in one form, that of the sites of our graphs.

A *site* is a linear layer of the graph (`layer0.qkv`); an adapter adds scale x B (A x) to what it computes. Kept per
site: `A` [in, rank] and `B` [rank, out] with the scale folded into B. q, k and v are one site: their ranks stand side
by side, and B has blocks. Everything is float32.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import UnsupportedModel
from shared.models import safetensors
from shared.models.gguf_file import GgufFile
from shared.models.manifest import Architecture

Floats = NDArray[np.float32]

SITES = ("qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
FILE = "adapter.safetensors"
FOLDER = "lora"
"""Of an adapter's folder in the model store; that of its one variant."""
_PEFT = re.compile(
    r"(?:base_model\.model\.)?model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])(?:\.default)?\.weight"
)
_GGUF = re.compile(r"blk\.(\d+)\.(\w+)\.weight\.lora_([ab])")
_SITE_OF = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "attn_output",
    "ffn_gate": "ffn_gate", "ffn_up": "ffn_up", "ffn_down": "ffn_down",
}  # fmt: skip
"""Projections by PEFT's names and by GGUF's."""
_PAIRED = ("llama",)
"""Families whose GGUF files have q and k in rows for rotating neighbours."""


@dataclass(frozen=True)
class Pair:
    """One site of one adapter."""

    a: Floats
    """[in, rank]."""
    b: Floats
    """[rank, out], scaled."""


Adapter = dict[str, Pair]
"""By site, `layer0.qkv`."""


def read_adapter(source: Path, base: Architecture) -> Adapter:
    """A PEFT folder (adapter_config.json, adapter_model.safetensors) or a GGUF adapter file, for a model of `base`.

    Raises:
        UnsupportedModel: something of it would be left out, or it does not fit the model; names what.
    """
    if source.is_dir():
        pieces = _from_peft(source)
    elif source.suffix.lower() == ".gguf":
        pieces = _from_gguf(source, base)
    else:
        raise UnsupportedModel(f"{source} is no adapter.", "Give a PEFT folder or a GGUF adapter file.")
    if not pieces:
        raise UnsupportedModel(f"{source} holds no LoRA tensors.", "Give an adapter, not a merged model.")
    return _sites(pieces, base, source.name)


def write(adapter: Mapping[str, Pair], file: Path) -> None:
    """Keep an adapter as safetensors."""
    tensors = {f"{site}.{side}": value for site, p in adapter.items() for side, value in (("a", p.a), ("b", p.b))}
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            out.write(np.ascontiguousarray(tensor, "<f4").tobytes())


def stored(folder: Path) -> Path:
    """The file of the adapter that has `folder` in the model store."""
    return folder / FOLDER / FILE


def load(file: Path) -> Adapter:
    """What `write` kept. Raises UnsupportedModel when it is damaged."""
    tensors = safetensors.read(file)
    return {name[:-2]: Pair(tensors[name], tensors[f"{name[:-2]}.b"]) for name in tensors if name.endswith(".a")}


def widths(site: str, base: Architecture) -> tuple[int, int, int]:
    """Outputs of q, k and v; for another site its own are not known here, and all are 0."""
    if not site.endswith(".qkv"):
        return 0, 0, 0
    return base.heads * base.head_size, base.kv_heads * base.head_size, base.kv_heads * base.head_size


# --- inside ---

_Pieces = dict[tuple[int, str], Pair]
"""By layer and projection; q, k and v apart."""


def _from_peft(folder: Path) -> _Pieces:
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for one in (file, weights):
        if not one.is_file():
            raise UnsupportedModel(f"{folder} holds no {one.name}.", "Give the folder that PEFT saved.")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UnsupportedModel(f"{file} is not JSON ({error}).", "Is the download complete?") from None
    if config.get("peft_type", "LORA") != "LORA":
        raise UnsupportedModel(f"The adapter is of the type {config['peft_type']}.", "Only LoRA is supported.")
    for key in ("use_dora", "modules_to_save", "fan_in_fan_out", "alpha_pattern", "lora_bias"):
        if config.get(key):
            raise UnsupportedModel(f"`{key}` of {file.name} is not supported.", "Train the adapter without it.")
    alpha = float(config.get("lora_alpha", 8))
    found: dict[tuple[int, str], dict[str, Floats]] = {}
    for name, stored in safetensors.mapped(weights).items():
        match = _PEFT.fullmatch(name)
        if match is None or match[2] not in _SITE_OF:
            raise UnsupportedModel(
                f"The adapter's tensor {name} belongs to no layer that can be adapted.",
                f"Adapt {', '.join(k for k in _SITE_OF if k.endswith('_proj'))} only.",
            )
        found.setdefault((int(match[1]), _SITE_OF[match[2]]), {})[match[3].lower()] = stored.float32()

    def scale(rank: int) -> float:
        return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank

    return {where: _pair(sides, scale, f"layer {where[0]}, {where[1]}") for where, sides in found.items()}


def _from_gguf(path: Path, base: Architecture) -> _Pieces:
    file = GgufFile(path)
    if file.fields.get("adapter.type", "lora") != "lora" or file.fields.get("general.type", "adapter") != "adapter":
        raise UnsupportedModel(f"{path.name} is not a LoRA adapter.", "Give one made by convert_lora_to_gguf.py.")
    if file.architecture and file.architecture != base.family:
        raise UnsupportedModel(
            f"{path.name} adapts {file.architecture!r} models, and the base is {base.family!r}.", "Name its own base."
        )
    alpha = float(file.fields.get("adapter.lora.alpha", 0.0))
    found: dict[tuple[int, str], dict[str, Floats]] = {}
    for name in file.tensors:
        match = _GGUF.fullmatch(name)
        if match is None or match[2] not in _SITE_OF:
            raise UnsupportedModel(
                f"The adapter's tensor {name} belongs to no layer that can be adapted.", "Adapt linear layers only."
            )
        value = file.weight(name)
        assert value is not None
        where = int(match[1]), _SITE_OF[match[2]]
        if match[3] == "b" and where[1] in ("q", "k") and base.family in _PAIRED:
            value = value.reshape(-1, base.head_size // 2, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        found.setdefault(where, {})[match[3]] = value

    def scale(rank: int) -> float:
        return alpha / rank if alpha else 1.0

    return {where: _pair(sides, scale, f"layer {where[0]}, {where[1]}") for where, sides in found.items()}


def _pair(sides: dict[str, Floats], scale: Any, where: str) -> Pair:
    """From A [rank, in] and B [out, rank], as everybody stores them."""
    if set(sides) != {"a", "b"} or sides["a"].shape[0] != sides["b"].shape[1]:
        raise UnsupportedModel(f"The adapter's A and B of {where} do not fit together.", "Is the download complete?")
    rank = sides["a"].shape[0]
    return Pair(np.ascontiguousarray(sides["a"].T), np.ascontiguousarray(sides["b"].T * np.float32(scale(rank))))


def _sites(pieces: _Pieces, base: Architecture, name: str) -> Adapter:
    """Pieces joined to sites, each checked against the model."""
    sizes = dict(zip("qkv", widths(".qkv", base), strict=True))
    joined: dict[str, list[tuple[str, Pair]]] = {}
    for (layer, part), pair in sorted(pieces.items()):
        wide = {**sizes, "attn_output": base.hidden, "ffn_down": base.hidden}.get(part)
        deep = base.heads * base.head_size if part == "attn_output" else base.hidden
        fits = wide in (None, pair.b.shape[1]) and (part == "ffn_down" or pair.a.shape[0] == deep)
        if layer >= base.layers or not fits:
            raise UnsupportedModel(
                f"{name} adapts layer {layer}, {part}, by {pair.a.shape[0]} x {pair.b.shape[1]}: not this model's.",
                "Name the model that the adapter was trained on.",
            )
        joined.setdefault(f"layer{layer}.{'qkv' if part in sizes else part}", []).append((part, pair))
    made: Adapter = {}
    for site, parts in joined.items():
        if not site.endswith(".qkv"):
            made[site] = parts[0][1]
            continue
        b = np.zeros((sum(p.b.shape[0] for _, p in parts), sum(sizes.values())), np.float32)
        row = 0
        for part, pair in parts:
            column = sum(sizes[before] for before in "qkv"[: "qkv".index(part)])
            b[row : row + pair.b.shape[0], column : column + sizes[part]] = pair.b
            row += pair.b.shape[0]
        made[site] = Pair(np.concatenate([p.a for _, p in parts], axis=1), b)
    return made
