"""Which variant runs on a GPU: never one whose attention would fall to the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.workers.engine.loader import open_model, piece
from services.workers.variants import variant_for
from shared.errors import UnsupportedModel
from shared.messages import Device
from shared.models.manifest import Architecture, Manifest, Variant

CPU = Device(kind="cpu", name="cpu", threads=1)
GPU = Device(kind="cuda", name="gpu", provider="CUDAExecutionProvider")


def _manifest(layout: str, *names: str, kv_dtype: str = "float32") -> Manifest:
    variants = [
        Variant(name=n, path=n, layout=layout, weights_bytes=1, kv_dtype="float16" if "fp16" in n else None)  # type: ignore[arg-type]
        for n in names
    ]
    shape = Architecture(
        family="llama", layers=1, hidden=8, heads=1, kv_heads=1, head_size=8, vocab=9, context=64, kv_dtype=kv_dtype,  # type: ignore[arg-type]
    )  # fmt: skip
    return Manifest(name="t", architecture=shape, variants=variants)


@pytest.mark.parametrize(
    ("manifest", "asked", "on_gpu"),
    [
        (_manifest("calm", "int8", "int8-fp16"), "int8", "int8-fp16"),
        (_manifest("calm", "int4", "int4-fp16", "int8-fp16"), "int4", "int4-fp16"),
        (_manifest("calm", "fp32", "fp16"), "fp32", "fp16"),
        (_manifest("calm", "int8-fp16"), "int8-fp16", "int8-fp16"),
        (_manifest("gqa", "mine", kv_dtype="float16"), "mine", "mine"),
        (_manifest("concat", "fp32"), "fp32", "fp32"),
    ],
)
def test_on_cuda_the_half_precision_sibling_runs(manifest: Manifest, asked: str, on_gpu: str) -> None:
    """Attention in float32 has no CUDA kernel: the sibling that has one is taken; on a CPU what was asked for is."""
    assert variant_for(manifest, asked, GPU).name == on_gpu
    assert variant_for(manifest, asked, CPU).name == asked


@pytest.mark.parametrize(
    ("manifest", "asked", "remedy"),
    [
        (_manifest("calm", "int8", "int4-fp16"), "int8", "Add 'int8-fp16' to the model's `variants`"),
        (_manifest("calm", "fp32"), "fp32", "Add 'fp16'"),
        (_manifest("gqa", "mine"), "mine", "Export it in float16"),
    ],
)
def test_on_cuda_attention_on_the_cpu_is_refused(manifest: Manifest, asked: str, remedy: str) -> None:
    """Rather than falling to the CPU silently, the load fails, before any session, and says what to do."""
    with pytest.raises(UnsupportedModel, match="no CUDA kernel") as caught:
        variant_for(manifest, asked, GPU)
    assert remedy in caught.value.remedy
    spec = manifest.artifact(manifest.variants[0], slots=1, context=64, overhead_bytes=0)
    with pytest.raises(UnsupportedModel, match="no CUDA kernel"):
        open_model(Path("nowhere"), manifest, spec, GPU)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "layers", "device", "tokens"),
    [(9, 3, 30, CPU, 256), (14, 2, 24, CPU, 109), (32, 1, 2, CPU, 64), (14, 2, 24, GPU, 512)],
    ids=["smollm2-135m", "qwen2-0.5b", "hardly-any-keys", "gpu"],
)
def test_scores_of_a_piece_take_less_than_its_row(
    heads: int, kv_heads: int, layers: int, device: Device, tokens: int
) -> None:
    """On a CPU a prompt is read in pieces whose attention scores take a quarter of the row's keys and values at most,
    but for pieces that would be too small to be quick."""
    shape = Architecture(
        family="llama", layers=layers, hidden=8, heads=heads, kv_heads=kv_heads, head_size=64, vocab=9, context=64
    )
    assert piece(shape, device) == tokens
