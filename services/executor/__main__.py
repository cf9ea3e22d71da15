"""`python -m services.executor`: carries plans out."""

from __future__ import annotations

from services.executor.service import Executor
from shared.runtime import main

if __name__ == "__main__":
    main("executor", Executor)
