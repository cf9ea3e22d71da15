"""From a stored model to a batcher that is ready to generate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from services.workers.engine.batcher import Batcher
from services.workers.engine.energy import Meter
from services.workers.engine.lora import AdaptedRunner, Stack, adapted
from services.workers.engine.runner import ConcatRunner, Runner, SharedKvRunner
from services.workers.engine.session import open_session
from services.workers.engine.text import Text
from shared.errors import ModelMissing, UnsupportedModel
from shared.messages import ArtifactSpec, Device
from shared.models import lora
from shared.models.manifest import Manifest, Variant


@dataclass(frozen=True)
class Loaded:
    """A loaded model and what loading it took."""

    batcher: Batcher
    load_s: float
    provider: str
    measured_bytes: int
    """Memory of this process once loaded; the KV cache is committed as it is used."""


def load(
    folder: Path,
    manifest: Manifest,
    spec: ArtifactSpec,
    device: Device,
    meter: Meter,
    *,
    spinning: bool = True,
    clock: Callable[[], float] = time.time,
) -> Loaded:
    """Load the variant that `spec` names from the model's `folder`.

    Raises:
        ModelMissing: the store has no such variant, or not an adapter of it.
        DeviceUnavailable, UnsupportedModel: see `open_session`.
    """
    began = time.perf_counter()
    variant = manifest.variant(spec.variant)
    if variant is None:
        raise ModelMissing(f"{spec.model} has no variant {spec.variant!r}.", "Pull it with `calm models pull`.")
    if variant.layout == "encoder":
        raise UnsupportedModel(f"{spec.model} is an embedding model.", "Name a generator in the fleet file.")
    model = folder / variant.path / "model.onnx"
    stack = _stack(folder.parent, spec, variant)
    graph = adapted(model, stack) if spec.adapters else None
    session = open_session(model, device, device.threads, spinning=spinning, graph=graph)
    runner: Runner
    if graph is not None:
        runner = AdaptedRunner(session, spec.slots, spec.context, device, stack)
    elif variant.layout == "concat":
        runner = ConcatRunner(session, spec.slots)
    else:
        runner = SharedKvRunner(session, spec.slots, spec.context, device)
    text = Text(folder, manifest.tokenizer)
    batcher = Batcher(runner, text, slots=spec.slots, context=spec.context, meter=meter, clock=clock, adapters=stack)
    return Loaded(
        batcher=batcher,
        load_s=time.perf_counter() - began,
        provider=session.get_providers()[0],
        measured_bytes=psutil.Process().memory_info().rss,
    )


def _stack(store: Path, spec: ArtifactSpec, variant: Variant) -> Stack:
    """The adapters that `spec` names, from the model store."""
    if spec.adapters and variant.layout != "calm":
        raise UnsupportedModel(
            f"{spec.model} {spec.variant} is a ready graph, which takes no adapters.",
            "Adapters need a model imported from GGUF or safetensors.",
        )
    missing = [name for name in spec.adapters if not (store / name / "lora" / lora.FILE).is_file()]
    if missing:
        raise ModelMissing(f"The adapter {missing[0]!r} is not in the store.", "Pull it with `calm models pull`.")
    return Stack({name: lora.load(store / name / "lora" / lora.FILE) for name in spec.adapters})
