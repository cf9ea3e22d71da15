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


def yield_to_others(priority: str) -> None:
    """Let the calling thread, and the threads it starts, generate in the background: `idle`, `nice` or `normal`.

    On Linux a thread of the idle class is preempted at once by any other that wakes. Mere niceness is not enough:
    the scheduler lets a running thread finish its slice of some 3 ms, and a query wakes a dozen threads on its way.
    """
    if priority == "idle" and hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # 0 is the calling thread
    elif priority in ("idle", "nice"):
        os.nice(10)
