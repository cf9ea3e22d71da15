"""Child processes that never outlive their parent."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def own_group() -> None:
    """For `preexec_fn`: a process group of its own, so that Ctrl-C reaches the parent alone.

    Not a session of its own: Linux may share the processors out among sessions first (`sched_autogroup_enabled`), and
    an engine in another session no longer gives way to the stages, whatever its class: they waited up to 5 ms for it.
    """
    os.setpgid(0, 0)


def bound_to_parent() -> None:
    """For `preexec_fn`: `own_group`, and on Linux the kernel ends the child when the parent ends, however it ends.

    It follows the thread that started the child, so start children from a thread that stays (the event loop's).
    """
    own_group()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


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
