"""Starts an engine process. Its imports take about a second of processor time: with `background` they are done in the
idle scheduling class, so that a spare engine, which nobody waits for, is never in the way of queries."""

from __future__ import annotations

import importlib
import os
import sys
import threading

BACKGROUND = "background"


def _import(background: bool) -> None:
    if background and hasattr(os, "SCHED_IDLE"):  # elsewhere it would slow the whole process, for good
        importlib.import_module("shared.processes").yield_to_others("idle")
    importlib.import_module("services.workers.engine_process")


def main() -> None:
    importing = threading.Thread(target=_import, args=(BACKGROUND in sys.argv[1:],))
    importing.start()
    importing.join()
    importlib.import_module("services.workers.engine_process").main()


if __name__ == "__main__":
    main()
