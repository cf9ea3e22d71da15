"""Tiny random LoRA adapters, as PEFT folders and GGUF files, and the weights that result when they are merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from shared.models import safetensors
from tests import tiny

Floats = NDArray[np.float32]
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_GGUF = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def factors(
    checkpoint: Path, *, rank: int, modules: tuple[str, ...] = ALL, seed: int = 0
) -> dict[str, tuple[Floats, Floats]]:
    """Random A [rank, in] and B [out, rank] for modules of a checkpoint, by the name of the weight."""
    random = np.random.default_rng(seed)
    made = {}
    for name, weight in safetensors.read(checkpoint / "model.safetensors").items():
        if name.split(".")[-2] in modules:
            rows, columns = weight.shape
            a = (random.standard_normal((rank, columns)) / np.sqrt(columns)).astype(np.float32)
            made[name] = (a, (random.standard_normal((rows, rank)) / np.sqrt(rank)).astype(np.float32))
    return made


def write_peft(path: Path, made: dict[str, tuple[Floats, Floats]], *, alpha: float = 4.0, **config: Any) -> Path:
    path.mkdir()
    rank = next(iter(made.values()))[0].shape[0]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", **config}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    prefix = "base_model.model."
    tiny.write_safetensors(
        path / "adapter_model.safetensors",
        {
            f"{prefix}{name.removesuffix('.weight')}.lora_{side}.weight": value
            for name, sides in made.items()
            for side, value in zip("AB", sides, strict=True)
        },
    )
    return path


def write_gguf(
    path: Path, made: dict[str, tuple[Floats, Floats]], *, alpha: float = 4.0, heads: int = 4, kv_heads: int = 2
) -> Path:
    """As convert_lora_to_gguf.py writes a llama's: B of q and k in rows for rotating neighbours."""
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, (a, b) in made.items():
        layer, module = name.split(".")[2], name.split(".")[-2]
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if module == part:
                halves = b.reshape(count, 2, b.shape[0] // count // 2, b.shape[1])
                b = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(b.shape))
        writer.add_tensor(f"blk.{layer}.{_GGUF[module]}.weight.lora_a", a)
        writer.add_tensor(f"blk.{layer}.{_GGUF[module]}.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def merge(checkpoint: Path, made: dict[str, tuple[Floats, Floats]], target: Path, *, scale: float) -> Path:
    """A copy of the checkpoint with the adapter added to its weights."""
    target.mkdir()
    for file in checkpoint.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = safetensors.read(checkpoint / "model.safetensors")
    for name, (a, b) in made.items():
        weights[name] = weights[name] + scale * (b @ a)
    tiny.write_safetensors(target / "model.safetensors", weights)
    return target
