"""Has weights packed for this host's processor right after they were fetched, so that no query waits for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from shared.models.fleet import FleetFile
from shared.models.manifest import Manifest
from shared.models.store import ModelStore
from shared.settings import WORTH_PACKING_BYTES, Settings

NOT_GENERATORS = ("encoder", "static", "lora")


def of_fleet(fleet: FleetFile, store: ModelStore) -> list[str]:
    """`MODEL/VARIANT` of what a fleet's cards generate with. Those with adapters have graphs of their own in memory."""
    adapted = {(card.model, card.variant) for card in fleet.cards if card.adapter}
    used = sorted({(card.model, card.variant) for card in fleet.cards} - adapted)
    return [
        name
        for model, variant in used
        if store.has(model)
        for name in of_model(store.get(model))
        if name == f"{model}/{variant}"
    ]


def of_model(manifest: Manifest) -> list[str]:
    """`MODEL/VARIANT` of each variant of a model that is worth it."""
    return [
        f"{manifest.name}/{variant.name}"
        for variant in manifest.variants
        if variant.layout not in NOT_GENERATORS and variant.weights_bytes >= WORTH_PACKING_BYTES
    ]


def command(names: Iterable[str]) -> list[str]:
    """What to run; a process of its own, which takes the memory that packing needs with it."""
    return [sys.executable, "-m", "services.workers.pack", *names]


def environment(settings: Settings) -> dict[str, str]:
    """For `command`: the same store and home as this process."""
    return {**os.environ, "CALM_HOME": str(settings.home), "CALM_MODELS_DIR": str(settings.models_path)}
