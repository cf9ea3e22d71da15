"""From a stored model to a batcher that is ready to generate."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort
import psutil

from services.workers.engine import joint, shared_weights
from services.workers.engine.batcher import PREFILL_CHUNK, Batcher
from services.workers.engine.captured import CapturedRunner, open_capturing
from services.workers.engine.energy import Meter
from services.workers.engine.gate import Gate
from services.workers.engine.lora import AdaptedRunner, Stack, adapted
from services.workers.engine.runner import ConcatRunner, Runner, SharedKvRunner
from services.workers.engine.schedule import Schedule
from services.workers.engine.session import open_session
from services.workers.engine.text import Text
from services.workers.variants import variant_for
from shared.errors import ModelMissing, UnsupportedModel
from shared.messages import ArtifactSpec, Device
from shared.models import lora
from shared.models.manifest import Architecture, Manifest, Variant

ON_DEVICE = 512
"""Prompt tokens read at once on a GPU, whose attention keeps no scores."""
LEAST_PIECE = 64
"""Fewer at once take longer: of SmolLM2-135M 64 a tenth, 128 a fiftieth."""


@dataclass(frozen=True)
class Opened:
    """A model in memory, without a KV cache: what a standby keeps."""

    spec: ArtifactSpec
    device: Device
    session: ort.InferenceSession
    concat: bool
    text: Text
    stack: Stack
    load_s: float
    piece: int = PREFILL_CHUNK
    """Most prompt tokens to read at once."""
    joint: ort.InferenceSession | None = None
    """Over the same weights, to read prompts in one pass with decoding; there where the weights are shared."""
    captures: bool = False
    """Decoding steps may be captured as CUDA graphs."""
    log: Any = None

    @property
    def provider(self) -> str:
        return str(self.session.get_providers()[0])


def open_model(
    folder: Path,
    manifest: Manifest,
    spec: ArtifactSpec,
    device: Device,
    *,
    caches: Sequence[Path] = (),
    cuda_graphs: bool = False,
    log: Any = None,
) -> Opened:
    """Open the variant that `spec` names from the model's `folder`. Engines on a CPU share what is in `caches`; those
    on a GPU decode by `cuda_graphs` where that can be, and say in `log` where it cannot.

    Raises:
        ModelMissing: the store has no such variant, or not an adapter of it.
        DeviceUnavailable, UnsupportedModel: see `variant_for` and `open_session`.
    """
    began = time.perf_counter()
    _map_large_blocks()
    variant = variant_for(manifest, spec.variant, device)
    if variant.layout in ("encoder", "static"):
        raise UnsupportedModel(f"{spec.model} is an embedding model.", "Name a generator in the fleet file.")
    model = folder / variant.path / "model.onnx"
    stack = _stack(folder.parent, spec, variant)
    graph = adapted(model, stack) if spec.adapters else None
    session = together = None
    if caches and graph is None and device.kind == "cpu":
        session, together = _shared(caches, spec.name, model, variant.weights_bytes, device)
    captures = cuda_graphs and device.kind == "cuda" and variant.layout == "calm" and graph is None
    if captures:
        session = open_capturing(model, spec.context, device, log)
        captures = session is not None
    session = session or open_session(model, device, device.threads, graph=graph)
    text = Text(folder, manifest.tokenizer)
    give_back()
    load_s, concat = time.perf_counter() - began, variant.layout == "concat"
    return Opened(
        spec,
        device,
        session,
        concat,
        text,
        stack,
        load_s,
        piece(manifest.architecture, device),
        together,
        captures,
        log,
    )


def piece(architecture: Architecture, device: Device) -> int:
    """Prompt tokens to read at once. On a CPU each has a score for each head and token before it, all at a time: they
    are to take no more than a quarter of the row's keys and values."""
    if device.kind == "cuda":
        return ON_DEVICE
    scores_bytes = 4 * architecture.heads
    return max(LEAST_PIECE, min(PREFILL_CHUNK, architecture.kv_bytes_per_token // 4 // scores_bytes))


def start(opened: Opened, meter: Meter, *, clock: Callable[[], float] = time.time, gate: Gate | None = None) -> Batcher:
    """A batcher over an opened model, with a KV cache of its own.

    A row a slot, each of which may be full; or, where more sequences are to share the slots' bytes, as many rows as
    these and as many again to keep prefixes in: on a CPU a row takes memory as it is written, and the schedule sees to
    it that all together never hold more tokens than the slots.
    """
    spec, device, session = opened.spec, opened.device, opened.session
    at_once = spec.at_once(device)
    shared = at_once > spec.slots
    rows = at_once + spec.slots if shared else spec.slots
    runner: Runner
    if spec.adapters:
        runner = AdaptedRunner(session, rows, spec.context, device, opened.stack)
    elif opened.concat:
        runner = ConcatRunner(session, rows)
    elif opened.captures:
        runner = CapturedRunner(session, rows, spec.context, device, log=opened.log)
    else:
        runner = SharedKvRunner(session, rows, spec.context, device, joint=opened.joint)
    schedule = None
    if shared:
        schedule = Schedule(
            at_once, compact=runner.compact, extra_rows=spec.slots, capacity_tokens=spec.kv_tokens,
            granule=runner.granule,
        )  # fmt: skip
    return Batcher(
        runner, opened.text, slots=at_once, context=spec.context, meter=meter, clock=clock,
        schedule=schedule, adapters=opened.stack, gate=gate, prefill_chunk=opened.piece,
    )  # fmt: skip


def give_back() -> None:
    """Return freed memory to the system: without it, glibc keeps what a closed session or a KV cache held."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


_M_MMAP_THRESHOLD = -3
_LARGE_BYTES = 16 << 20


def _map_large_blocks() -> None:
    """Have large blocks mapped one by one, so that freeing one gives it back. Otherwise glibc stops doing so for blocks
    as large as the first that was freed, and what a second session takes for a moment (28 MB of SmolLM2-135M) stays at
    the end of this thread's heap, where `malloc_trim` does not reach: 36 MB an engine."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def measured_bytes() -> int:
    """Memory of this process, its part of what it shares with others included where the system tells."""
    with contextlib.suppress(psutil.Error, AttributeError):
        return int(psutil.Process().memory_full_info().pss)
    return int(psutil.Process().memory_info().rss)


def pack(caches: Sequence[Path], name: str, model: Path, weights_bytes: int, device: Device) -> Path | None:
    """See that the weights of a graph are packed for this CPU; the graph that maps them, or None when it cannot be."""

    def make(target: Path) -> None:
        open_session(model, device, device.threads, save_to=target)
        joint.write(target)
        give_back()

    return shared_weights.find_or_make(caches, name, model, weights_bytes, make)


def _shared(
    caches: Sequence[Path], name: str, model: Path, weights_bytes: int, device: Device
) -> tuple[ort.InferenceSession | None, ort.InferenceSession | None]:
    """A session over weights that all engines on this host map, and one over the joint graph; None for what cannot be
    had."""
    graph = pack(caches, name, model, weights_bytes, device)
    if graph is None:
        return None, None
    try:
        session = open_session(graph, device, device.threads, optimised=True)
        other = graph.with_name(joint.FILE)
        return session, open_session(other, device, device.threads, optimised=True) if other.is_file() else None
    except UnsupportedModel:  # a damaged entry
        shutil.rmtree(graph.parent, ignore_errors=True)
        return None, None


def _stack(store: Path, spec: ArtifactSpec, variant: Variant) -> Stack:
    """The adapters that `spec` names, from the model store."""
    if spec.adapters and variant.layout != "calm":
        raise UnsupportedModel(
            f"{spec.model} {spec.variant} is a ready graph, which takes no adapters.",
            "Adapters need a model imported from GGUF or safetensors.",
        )
    missing = [name for name in spec.adapters if not lora.stored(store / name).is_file()]
    if missing:
        raise ModelMissing(f"The adapter {missing[0]!r} is not in the store.", "Pull it with `calm models pull`.")
    return Stack({name: lora.load(lora.stored(store / name)) for name in spec.adapters})
