"""From a stored model to a batcher that is ready to generate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from services.workers.engine.batcher import Batcher
from services.workers.engine.energy import Meter
from services.workers.engine.runner import ConcatRunner, Runner, SharedKvRunner
from services.workers.engine.session import open_session
from services.workers.engine.text import Text
from shared.errors import ModelMissing, UnsupportedModel
from shared.messages import ArtifactSpec, Device
from shared.models.manifest import Manifest


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
        ModelMissing: the store has no such variant.
        DeviceUnavailable, UnsupportedModel: see `open_session`.
    """
    began = time.perf_counter()
    variant = manifest.variant(spec.variant)
    if variant is None:
        raise ModelMissing(f"{spec.model} has no variant {spec.variant!r}.", "Pull it with `calm models pull`.")
    if variant.layout == "encoder":
        raise UnsupportedModel(f"{spec.model} is an embedding model.", "Name a generator in the fleet file.")
    session = open_session(folder / variant.path / "model.onnx", device, device.threads, spinning=spinning)
    runner: Runner
    if variant.layout == "concat":
        runner = ConcatRunner(session, spec.slots)
    else:
        runner = SharedKvRunner(session, spec.slots, spec.context, device)
    text = Text(folder, manifest.tokenizer)
    batcher = Batcher(runner, text, slots=spec.slots, context=spec.context, meter=meter, clock=clock)
    return Loaded(
        batcher=batcher,
        load_s=time.perf_counter() - began,
        provider=session.get_providers()[0],
        measured_bytes=psutil.Process().memory_info().rss,
    )
