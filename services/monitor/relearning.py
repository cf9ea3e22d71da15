"""Relearning while the knowledge owner goes on: topics in a thread of the idle class, what is kept in short steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from shared.learn.live import Array, first_quality
from shared.learn.live_relearn import SteppedLearner
from shared.tasks import end, in_background


class Relearning:
    """One task at a time, until nothing is due."""

    def __init__(self, learner: SteppedLearner, on_learned: Callable[[], None], log: Any) -> None:
        self._learner = learner
        self._on_learned = on_learned
        self._log = log
        self._queries: tuple[Array, int] | None = None
        self._task: asyncio.Task[None] | None = None

    def topics(self, queries: Array, form: int) -> None:
        """Make topics from features [n, d], of which the last `form` are facts about texts."""
        self._queries = queries, form
        self.look()

    def look(self) -> None:
        """Begin what is due."""
        if self._task is None and (self._queries is not None or self._learner.due):
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(self._on_done)

    async def stop(self) -> None:
        await end([self._task])

    async def _run(self) -> None:
        while self._queries is not None or self._learner.due:
            topics = None
            if self._queries is not None:
                (queries, form), self._queries = self._queries, None
                cards = self._learner.cards
                topics = await in_background(lambda: first_quality(cards, queries, form))  # noqa: B023 awaited here
            for _ in self._learner.steps(topics):
                await asyncio.sleep(0)
            self._on_learned()

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("not_relearned", exc_info=error)
