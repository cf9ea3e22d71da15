"""`python -m services.planner`: routes queries and decides residency."""

from __future__ import annotations

from services.planner.service import Planner
from shared.runtime import main

if __name__ == "__main__":
    main("planner", Planner)
