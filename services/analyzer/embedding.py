"""Embeds texts off the event loop, several waiting queries in one run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from services.analyzer.decide.profile import Vectors

MAX_BATCH = 16


class EmbeddingQueue:
    """Collects texts while a run is under way and embeds them together in the next one.

    One query alone costs no extra wait; a burst of sixteen costs a few runs instead of sixteen.
    """

    def __init__(self, embed: Callable[[list[str]], Vectors], *, quick: bool = False) -> None:
        """`quick`: embedding takes microseconds (a static table), and is done on the spot."""
        self._quick = quick
        self._embed = embed
        self._waiting: list[tuple[str, asyncio.Future[Vectors]]] = []
        self._runner: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embed")

    async def embed(self, text: str) -> Vectors:
        """Embedding of one text: float32 [hidden], unit length."""
        if self._quick:
            vector: Vectors = self._embed([text])[0]
            return vector
        future: asyncio.Future[Vectors] = asyncio.get_running_loop().create_future()
        self._waiting.append((text, future))
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        return await future

    async def embed_all(self, texts: list[str]) -> Vectors:
        """Embeddings of many texts in one run: float32 [n, hidden]."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._embed, texts)

    async def _run(self) -> None:
        while self._waiting:
            # Texts of like length together: a batch is padded to its longest.
            self._waiting.sort(key=lambda item: len(item[0]))
            batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
            try:
                vectors = await self.embed_all([text for text, _ in batch])
            except Exception as error:  # noqa: BLE001 each waiting query is told
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), vector in zip(batch, vectors, strict=True):
                if not future.done():
                    future.set_result(vector)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
