"""What of the fleet a worker's model store lacks: it says so, and nobody has it load that."""

from __future__ import annotations

from collections.abc import Iterable

from services.workers.variants import variant_for
from shared import messages as m
from shared.errors import CalmError
from shared.models import lora
from shared.models.store import ModelStore

AGAIN_S = 1.0
"""The store is looked at so often while something is missing: a first run fetches the models meanwhile."""
SELDOM_S = 15.0
"""And when nothing is."""


def lacking(store: ModelStore, specs: Iterable[m.ArtifactSpec], device: m.Device) -> list[str]:
    """Names of the artifacts that could not be loaded on `device` out of `store` as it is, in order."""
    return sorted(spec.name for spec in specs if not _has(store, spec, device))


def _has(store: ModelStore, spec: m.ArtifactSpec, device: m.Device) -> bool:
    try:
        variant_for(store.get(spec.model), spec.variant, device)
    except CalmError:
        return False
    return all(lora.stored(store.path(name)).is_file() for name in spec.adapters)
