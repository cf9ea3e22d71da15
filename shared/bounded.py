"""What is kept of the latest only."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


def put(kept: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    """Keep `value` under `key`; of more than `most` entries the oldest is given up."""
    kept[key] = value
    if len(kept) > most:
        kept.popitem(last=False)
