"""Sentence embeddings of recorded prompts, computed once and kept.

They are cached prompt by prompt under `<home>/cache/embeddings/<embedder, variant and token limit>`, so that another
split of the same queries costs nothing. The embedder is fetched into the model store when it is not there.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.cli.progress import Bars
from shared.models import pull
from shared.models.embedder import MAX_TOKENS, Embedder, open_embedder
from shared.models.fleet_file import load_fleet
from shared.models.store import ModelStore
from shared.settings import Settings

BATCH = 16
VARIANT = "int8"
"""Half the time of fp32 for the same routing accuracy: 110 s against 240 s for 5,943 questions of MMLU-Pro on two busy
cores; ridge on predicted categories gets 0.462, 0.463 and 0.466 (int8) or 0.464, 0.463 and 0.467 (fp32) in three
cross-validations. 64 tokens give 0.462, 0.463 and 0.466 and 128 give 0.460, 0.461 and 0.464 (fp32): no difference
that these folds could show (standard error of a difference about 0.003)."""

Floats = NDArray[np.float32]


def embed(
    prompts: Sequence[str],
    *,
    settings: Settings | None = None,
    variant: str = VARIANT,
    max_tokens: int = MAX_TOKENS,
    threads: int | None = None,
) -> Floats:
    """Embeddings [n, 384] of unit length. Progress goes to standard error.

    Raises:
        SourceUnavailable, ChecksumMismatch: the embedder is not in the store and cannot be fetched.
    """
    settings = settings or Settings.from_env()
    store = ModelStore(settings.models_path)
    source = load_fleet("embedded").embedder
    wanted = pull.Wanted(source.name, source.source, source.licence, (variant,), source.sha256, embedder=True)
    if pull.missing([wanted], store):
        with Bars() as bars:
            pull.pull(wanted, store, bars, hub=settings.hub_url, token=settings.hub_token)
    manifest, folder = store.get(wanted.name), store.path(wanted.name)
    found = store.variant(wanted.name, variant)
    made_by = hashlib.sha256(repr((sorted(found.files.items()), variant, max_tokens)).encode()).hexdigest()[:16]
    cache = settings.home.expanduser() / "cache" / "embeddings" / made_by
    keys = [hashlib.sha256(prompt.encode()).digest()[:16] for prompt in prompts]
    known = _cached(cache)
    missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in known}
    if missing:
        if found.layout == "static":
            vectors = open_embedder(folder, manifest, variant)(list(missing.values()))
        else:
            vectors = _by_length(
                Embedder(folder, manifest, variant, threads or _cores(), max_tokens), [*missing.values()]
            )
        _save(cache, list(missing), vectors)
        known |= dict(zip(missing, vectors, strict=True))
    return np.stack([known[key] for key in keys]) if keys else np.zeros((0, manifest.architecture.hidden), np.float32)


def _cached(folder: Path) -> dict[bytes, Floats]:
    """Every vector in the cache, by the hash of its prompt."""
    known: dict[bytes, Floats] = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            keys, vectors = file["keys"], file["vectors"]
        known.update((key.tobytes(), vector) for key, vector in zip(keys, vectors, strict=True))
    return known


def _by_length(model: Embedder, prompts: Sequence[str]) -> Floats:
    """Texts of like length together, so that little is spent on padding; the longest first, so that the time left
    that is shown errs on the safe side."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    result = np.zeros((len(prompts), model.hidden), np.float32)
    began = shown = time.monotonic()
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        result[rows] = model.embed([prompts[i] for i in rows])
        if time.monotonic() - shown > 5.0:
            shown = time.monotonic()
            done = start + len(rows)
            left_s = (shown - began) / done * (len(order) - done)
            print(
                f"embedding prompts: {done} of {len(order)}, at most {left_s:.0f} s left", file=sys.stderr, flush=True
            )
    return result


def _save(folder: Path, keys: list[bytes], vectors: Floats) -> None:
    """Whole or not at all, also when two commands embed the same prompts at once."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
        np.savez(file, keys=stored, vectors=vectors)
    Path(file.name).replace(folder / f"{hashlib.sha256(b''.join(keys)).hexdigest()[:32]}.npz")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
