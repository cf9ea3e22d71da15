"""Fills the model store: fetches sources and imports the variants that a fleet needs."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from shared.errors import UnsupportedModel
from shared.models import embedder_import, gguf_import, onnx_dir, sources
from shared.models.fleet import FleetFile
from shared.models.manifest import Manifest
from shared.models.store import ModelStore

KEPT_SOURCE = "source.gguf"
"""The GGUF stays in the model's folder, so that a further variant needs no download."""


class Progress(Protocol):
    """Told how a long job goes on."""

    def stage(self, name: str, total: int | None) -> None:
        """A new part begins; `total` bytes when known."""

    def advance(self, done: int, total: int | None) -> None:
        """Bytes done of the present part."""


class Silent:
    """No progress shown."""

    def stage(self, name: str, total: int | None) -> None:
        pass

    def advance(self, done: int, total: int | None) -> None:
        pass


@dataclass(frozen=True)
class Wanted:
    """A model to be in the store with these variants."""

    name: str
    source: str
    licence: str
    variants: tuple[str, ...]
    sha256: str = ""
    embedder: bool = False


def wanted_by(fleet: FleetFile) -> list[Wanted]:
    """What a fleet needs: its embedding model, and each model in the variants that cards use."""
    used = {(card.model, card.variant) for card in fleet.cards}
    e = fleet.embedder
    result = [Wanted(e.name, e.source, e.licence, (e.variant,), e.sha256, embedder=True)]
    for model in fleet.models:
        variants = tuple(v for v in model.variants if (model.name, v) in used)
        if variants:
            result.append(Wanted(model.name, model.source, model.licence, variants, model.sha256))
    return result


def missing(wanted: Sequence[Wanted], store: ModelStore) -> list[Wanted]:
    """Those that are not in the store with every variant."""
    return [w for w in wanted if not store.has(w.name) or any(store.get(w.name).variant(v) is None for v in w.variants)]


def pull(wanted: Wanted, store: ModelStore, progress: Progress, *, hub: str = "", token: str = "") -> Manifest:
    """Bring a model into the store; what is there already stays, and only missing variants are made.

    Raises:
        SourceUnavailable, ChecksumMismatch, UnsupportedModel: see `sources.fetch` and the importers.
    """
    with store.locked():
        if not missing([wanted], store):
            return store.get(wanted.name)
        existing = store.get(wanted.name) if store.has(wanted.name) else None
        with store.staging() as folder, tempfile.TemporaryDirectory(prefix=".work-", dir=store.root) as work:
            source = _source(wanted, store, existing, Path(work), progress, hub, token)
            if existing is not None:
                shutil.copytree(store.path(wanted.name), folder, dirs_exist_ok=True, copy_function=_link)
            manifest = _import(wanted, source, folder, existing, progress)
            return store.publish(folder, manifest)


def _source(
    wanted: Wanted,
    store: ModelStore,
    existing: Manifest | None,
    work: Path,
    progress: Progress,
    hub: str,
    token: str,
) -> Path:
    kept = store.path(wanted.name) / KEPT_SOURCE
    if existing is not None and kept.is_file() and existing.source == wanted.source:
        return kept
    progress.stage(f"{wanted.name}: fetching", None)
    found = sources.fetch(
        wanted.source, work, progress.advance, sha256=wanted.sha256, hub=hub or sources.HUB, token=token
    )
    if wanted.embedder and wanted.sha256 and found.is_dir():
        sources.check(found / "model.safetensors", wanted.sha256, wanted.source)
    return found


def _import(wanted: Wanted, source: Path, folder: Path, existing: Manifest | None, progress: Progress) -> Manifest:
    def on_variant(variant: str) -> None:
        progress.stage(f"{wanted.name}: making {variant}", None)

    if wanted.embedder:
        have = [v.name for v in existing.variants] if existing else []
        return embedder_import.import_embedder(
            source, folder, name=wanted.name, licence=wanted.licence, source=wanted.source,
            variants=tuple(dict.fromkeys([*have, *wanted.variants])), on_variant=on_variant,
        )  # fmt: skip
    if source.is_dir():
        return onnx_dir.import_folder(
            source, folder, name=wanted.name, licence=wanted.licence, source=wanted.source,
            variant=wanted.variants[0], existing=existing,
        )  # fmt: skip
    if source.suffix.lower() != ".gguf":
        raise UnsupportedModel(f"{source.name} is neither a GGUF file nor an ONNX folder.", "Give one of these.")
    manifest = gguf_import.import_gguf(
        source, folder, name=wanted.name, licence=wanted.licence, source=wanted.source,
        variants=wanted.variants, existing=existing, on_variant=on_variant,
    )  # fmt: skip
    if not (folder / KEPT_SOURCE).exists() and wanted.source.startswith(("pypi:", "hf:")):
        shutil.move(source, folder / KEPT_SOURCE)
    return msgspec.structs.replace(manifest, created_at=time.time())


def _link(source: str, target: str) -> str:
    """Copies between folders of the store are hard links: nothing in it is ever changed in place."""
    Path(target).hardlink_to(source)
    return target
