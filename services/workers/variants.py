"""Which variant of a model runs on a device, where the fleet file names one."""

from __future__ import annotations

from shared.errors import ModelMissing, UnsupportedModel
from shared.messages import Device
from shared.models.manifest import Manifest, Variant


def variant_for(manifest: Manifest, name: str, device: Device) -> Variant:
    """The variant to run on `device` where the fleet file names `name`: on CUDA its half-precision sibling.

    ONNX Runtime has no float32 kernel of GroupQueryAttention for CUDA: all attention would run on the CPU, and every
    layer's KV cache travel there and back, without a word said. Plain exports (`concat`) attend by ordinary operators.

    Raises:
        ModelMissing: the store has no such variant.
        UnsupportedModel: it cannot run on CUDA, and the store has no sibling that can.
    """
    variant = manifest.variant(name)
    if variant is None:
        raise ModelMissing(f"{manifest.name} has no variant {name!r}.", "Pull it with `calm models pull`.")
    kv_dtype = variant.kv_dtype or manifest.architecture.kv_dtype
    if device.kind != "cuda" or kv_dtype == "float16" or variant.layout not in ("calm", "gqa"):
        return variant
    half = "fp16" if name == "fp32" else f"{name}-fp16"
    sibling = manifest.variant(half)
    if sibling is not None:
        return sibling
    remedy = "Export it in float16"
    if variant.layout == "calm":
        remedy = f"Add {half!r} to the model's `variants` in the fleet file and run `calm models pull`"
    raise UnsupportedModel(
        f"{manifest.name} {name} attends in float32, for which ONNX Runtime has no CUDA kernel.",
        f"{remedy}, or set CALM_DEVICE=cpu.",
    )
