"""How the knowledge owner tells planners what it has learned."""

from __future__ import annotations

from typing import Literal

from shared import messages as m
from shared import subjects
from shared.bus import Bus
from shared.learn.kept import pieces

PIECE_BYTES = 512 * 1024
"""Learned parameters travel in pieces of this size, below NATS's default payload limit of 1 MiB."""


async def tell(bus: Bus, name: Literal["quality", "length", "confidence"], version: int, learned: bytes) -> None:
    """Put every piece of a version into the control bucket; planners take it up once they have all."""
    parts = pieces(learned, PIECE_BYTES)
    for index, piece in enumerate(parts):
        part = m.LearnedPart(name=name, version=version, index=index, count=len(parts), data=piece)
        await bus.kv_put(subjects.BUCKET_CONTROL, subjects.learned_key(name, index), part)
