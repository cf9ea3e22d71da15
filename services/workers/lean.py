"""Imported before everything else in an engine process: keeps out what it has no use for.

structlog imports rich, for tracebacks in colour, wherever it is installed: 5 MB of each engine and 0.1 s of its start.
"""

from __future__ import annotations

import sys

if "rich" not in sys.modules:
    sys.modules["rich"] = None  # type: ignore[assignment]
