"""Child processes that never outlive their parent."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def bound_to_parent() -> Callable[[], None] | None:
    """For `preexec_fn`: on Linux the kernel ends the child when the parent ends, however it ends.

    It follows the thread that started the child, so start children from a thread that stays (the event loop's).
    """
    return _die_with_parent if sys.platform == "linux" else None


def send(process: asyncio.subprocess.Process, number: int) -> None:
    """Send a signal to a child, if it still runs.

    Not `Process.send_signal`: that polls first, and so takes the exit status away from asyncio's own watcher.
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
