"""A worker's memory budget: what is promised to whom. Pure."""

from __future__ import annotations

from shared.errors import NoMemory
from shared.settings import format_bytes


class Ledger:
    """Footprints counted against a budget, from before a load begins until the engine process has really ended."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._held: dict[str, int] = {}

    @property
    def used_bytes(self) -> int:
        return sum(self._held.values())

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - self.used_bytes

    def reserve(self, artifact: str, size: int) -> None:
        """Promise `size` bytes to an artifact.

        Raises:
            NoMemory: they are not free; says how many are.
        """
        if size > self.free_bytes:
            raise NoMemory(
                f"{artifact} needs {format_bytes(size)}, and {format_bytes(self.free_bytes)} of"
                f" {format_bytes(self.budget_bytes)} are free.",
                "Evict a model first, raise CALM_WORKER_MEMORY, or lower `slots` or `context` in the fleet file.",
            )
        self._held[artifact] = size

    def release(self, artifact: str) -> int:
        """Take the promise back; the bytes it held."""
        return self._held.pop(artifact, 0)
