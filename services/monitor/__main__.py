"""`python -m services.monitor`: takes queries in, publishes the registry, owns the knowledge base."""

from __future__ import annotations

from services.monitor.service import Monitor
from shared.models.store import ModelStore
from shared.runtime import main

if __name__ == "__main__":
    main("monitor", lambda context: Monitor(context, ModelStore(context.settings.models_path)))
