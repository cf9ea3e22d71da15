"""Sentence embeddings of recorded prompts, computed once and kept.

They are cached as `<home>/cache/embeddings/<hash>.npy`; the hash covers the prompts, the embedder's files, its variant
and the token limit. The embedder is fetched into the model store when it is not there.
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
VARIANT = "fp32"

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
    digest = hashlib.sha256(repr((sorted(found.files.items()), variant, max_tokens)).encode())
    for prompt in prompts:
        digest.update(len(prompt).to_bytes(8, "little") + prompt.encode())
    cached = settings.home.expanduser() / "cache" / "embeddings" / f"{digest.hexdigest()[:32]}.npy"
    if cached.is_file():
        return np.asarray(np.load(cached), np.float32)
    if found.layout == "static":
        result = open_embedder(folder, manifest, variant)(list(prompts))
    else:
        model = Embedder(folder, manifest, variant, threads or _cores(), max_tokens)
        result = _by_length(model, prompts)
    _save(cached, result)
    return result


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


def _save(path: Path, array: Floats) -> None:
    """Whole or not at all, also when two commands embed the same prompts at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        np.save(file, array)
    Path(file.name).replace(path)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
