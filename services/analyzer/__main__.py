"""`python -m services.analyzer`: waits for the fleet and its embedding model, then profiles queries."""

from __future__ import annotations

from collections.abc import Callable

from services.analyzer.decide.profile import Vectors
from services.analyzer.service import Analyzer
from shared import messages as m
from shared.models.embedder import Embedder
from shared.models.store import ModelStore
from shared.runtime import Context, main


def build(context: Context) -> Analyzer:
    def open_embedder(policy: m.Policy) -> Callable[[list[str]], Vectors]:
        store = ModelStore(context.settings.models_path)
        manifest = store.get(policy.embedder)
        return Embedder(store.path(manifest.name), manifest, policy.embedder_variant, threads=1).embed

    return Analyzer(context, open_embedder)


if __name__ == "__main__":
    main("analyzer", build)
