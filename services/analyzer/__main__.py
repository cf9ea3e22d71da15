"""`python -m services.analyzer`: waits for the fleet and its embedding model, then profiles queries."""

from __future__ import annotations

from collections.abc import Callable

from services.analyzer.decide.profile import Vectors
from services.analyzer.service import Analyzer
from shared import messages as m
from shared.models.embedder import open_embedder
from shared.models.store import ModelStore
from shared.runtime import Context, main


def build(context: Context) -> Analyzer:
    def open_named(policy: m.Policy) -> Callable[[list[str]], Vectors]:
        store = ModelStore(context.settings.models_path)
        manifest = store.get(policy.embedder)
        return open_embedder(store.path(manifest.name), manifest, policy.embedder_variant)

    return Analyzer(context, open_named)


if __name__ == "__main__":
    main("analyzer", build)
