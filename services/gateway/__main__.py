"""`python -m services.gateway`: the HTTP API."""

from __future__ import annotations

from services.gateway.service import Gateway
from shared.runtime import main

if __name__ == "__main__":
    main("gateway", Gateway)
