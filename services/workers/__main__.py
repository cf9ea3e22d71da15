"""`python -m services.workers`: a worker for one device."""

from __future__ import annotations

from services.workers.service import Worker
from shared.runtime import main

if __name__ == "__main__":
    main("worker", Worker)
