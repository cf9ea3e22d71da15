"""Ending tasks."""

from __future__ import annotations

import asyncio

from shared.tasks import end


async def test_a_task_that_swallows_a_cancellation_ends_too() -> None:
    """A loop whose first cancellation is lost is cancelled again until it has ended."""
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed += 1
                if swallowed == 2:
                    raise

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await end([task, None])
    assert task.cancelled()
    assert swallowed == 2


async def test_errors_of_ended_tasks_are_dropped() -> None:
    """A task that had failed is ended like any other."""

    async def fail() -> None:
        raise ValueError("x")

    task = asyncio.create_task(fail())
    await asyncio.wait([task])
    await end([task])
    assert task.done()
