"""Brings the end of a query together with its decision, whichever of them is recorded first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from shared import messages as m
from shared.bounded import put

OPEN = 2_000
"""Queries of which only one of the two is known so far; the oldest is given up."""


class Ends:
    """Tells `on_answered` of every query that has been answered, with the embedding that its decision holds and the
    facts about its text."""

    def __init__(self, on_answered: Callable[[m.Done, bytes, bytes], None]) -> None:
        self._on_answered = on_answered
        self._open: OrderedDict[str, tuple[bytes, bytes]] = OrderedDict()
        self._done: OrderedDict[str, m.Done] = OrderedDict()

    def on_route(self, route: m.Route) -> None:
        """A query was routed."""
        if (done := self._done.pop(route.query_id, None)) is not None:
            self._tell(done, (route.embedding, route.form))
        elif route.embedding:
            put(self._open, route.query_id, (route.embedding, route.form), OPEN)

    def on_done(self, done: m.Done) -> None:
        """A query has ended."""
        features = self._open.pop(done.query_id, None)
        if done.answer is None:
            return
        if features is None:
            put(self._done, done.query_id, done, OPEN)
        else:
            self._tell(done, features)

    def _tell(self, done: m.Done, features: tuple[bytes, bytes]) -> None:
        if features[0]:
            self._on_answered(done, *features)
