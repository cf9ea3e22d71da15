"""Terms of many cards as columns: a card's own are put together when somebody looks at them. Pure."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray


class Terms:
    """By name, for k cards. A term that does not apply to a card is not among its own."""

    def __init__(self, **columns: NDArray[Any]) -> None:
        """`columns`: each [k]."""
        self._columns: list[tuple[str, NDArray[Any], NDArray[Any] | None]] = [
            (name, column, None) for name, column in columns.items()
        ]
        self._lists: list[tuple[str, list[float], list[bool] | None]] | None = None

    def add(self, name: str, column: NDArray[Any], where: NDArray[Any] | None = None) -> None:
        """One more term [k], for the cards in `where` [k] or all."""
        self._columns.append((name, column, where))
        self._lists = None

    def of(self, k: int) -> dict[str, float]:
        """The terms of one card."""
        if self._lists is None:
            self._lists = [
                (name, column.tolist(), None if where is None else where.tolist())
                for name, column, where in self._columns
            ]
        return {name: column[k] for name, column, where in self._lists if where is None or where[k]}
