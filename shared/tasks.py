"""Work in the background, and ending it for certain."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from shared.processes import yield_to_others

T = TypeVar("T")

_AGAIN_S = 0.2
_TOGETHER_S = 0.02


async def end(tasks: Iterable[asyncio.Task[Any] | None]) -> None:
    """Cancel tasks and wait until each has ended; what they raise is dropped.

    Before Python 3.12 `asyncio.wait_for`, which every NATS request goes through, swallows a cancellation that
    meets the reply, and a loop cancelled once would go on for ever: so a task is cancelled until it has ended.
    """
    pending = {task for task in tasks if task is not None}
    while pending:
        for task in pending:
            task.cancel()
        finished, pending = await asyncio.wait(pending, timeout=_AGAIN_S)
        for task in finished:
            if not task.cancelled():
                task.exception()  # seen, so that it is not reported as never retrieved


async def changed(event: asyncio.Event, timeout_s: float) -> None:
    """Wait until the event is set, `timeout_s` at most, and a moment more, so that several changes at once become one;
    then clear it."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
            await asyncio.sleep(_TOGETHER_S)
    event.clear()


async def in_background(work: Callable[[], T]) -> T:
    """Run `work` in a thread that gives way to everything else: no query waits for it."""

    def run() -> T:
        yield_to_others("idle")
        return work()

    with ThreadPoolExecutor(1, thread_name_prefix="background") as alone:  # its class is the thread's, for good
        return await asyncio.get_running_loop().run_in_executor(alone, run)
