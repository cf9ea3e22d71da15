"""A stored model opened and driven as in an engine on a CPU: over packed weights, mapped from a file.

Engines have one OpenBLAS thread as well: what times them imports `shared.one_thread` before anything imports NumPy.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from services.workers.engine.batcher import Batcher
from services.workers.engine.energy import AttributedMeter
from services.workers.engine.loader import Opened, open_model, start
from shared.messages import ArtifactSpec, Device
from shared.models.manifest import artifact_name
from shared.models.store import ModelStore
from shared.settings import PACKED, Settings


def open_as_engine(
    model: str, variant: str, store: Path | None, threads: int, *, context: int = 2048, slots: int = 1
) -> Opened:
    """The variant over weights that engines share, packed first where no engine has done so yet.

    Raises what `open_model` does.
    """
    settings = Settings.from_env()
    models = ModelStore(store or settings.models_path)
    spec = ArtifactSpec(
        name=artifact_name(model, variant), model=model, variant=variant, context=context, slots=slots,
        weights_bytes=models.variant(model, variant).weights_bytes,
        kv_bytes_per_token=0,  # only the planner counts
    )  # fmt: skip
    device = Device(kind="cpu", name="cpu", threads=threads)
    caches = settings.weights_paths if store is None else (store / PACKED, *settings.weights_paths)
    return open_model(models.path(model), models.get(model), spec, device, caches=caches)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is opened: `--model`, `--variant`, `--store` and `--threads`."""
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--variant", default="int8")
    parser.add_argument("--store", type=Path, help="model store; the user's own when left out")
    parser.add_argument("--threads", type=int, default=2)


def random_tokens(random: np.random.Generator, count: int) -> list[int]:
    """A prompt of plain words of no meaning."""
    return [int(t) for t in random.integers(1000, 20000, count)]


def driven(opened: Opened, slots: int, context: int) -> Batcher:
    """What drives it in an engine, with `slots` rows of `context` tokens and an engine's own meter."""
    spec = msgspec.structs.replace(opened.spec, slots=slots, context=context)
    meter = AttributedMeter("model", Settings.from_env().power_core_w)  # reads a clock; processor times take long
    return start(replace(opened, spec=spec), meter, clock=time.perf_counter)
