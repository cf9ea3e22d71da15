"""A learner that relearns what it keeps while it goes on learning. Pure: its owner runs the steps when it likes.

What is kept is relearned in a copy, which the learner's own state stands beside until the copy is ready; what comes
meanwhile changes the learner at once, and is told to the copy too before that takes the learner's place. So nothing is
lost, and what is known in the end is what it would be had all been relearned in one go when it was due.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from shared.learn.live import Learner
from shared.learn.quality import QualityModel

_Event = tuple[str, tuple[Any, ...], dict[str, Any]]
TOLD = 4
"""Events told to the copy in one step: each may take half a millisecond."""


class SteppedLearner(Learner):
    """What falls due is done by `steps`."""

    def __init__(self, cards: Sequence[str]) -> None:
        super().__init__(cards)
        self.stepped = True
        self._since: list[_Event] | None = None

    def heard(self, *event: Any, **more: Any) -> bool:
        self._note("heard", event, more)
        return super().heard(*event, **more)

    def judged(self, *event: Any, **more: Any) -> bool:
        self._note("judged", event, more)
        return super().judged(*event, **more)

    def changed(self, *event: Any) -> None:
        self._note("changed", event, {})
        super().changed(*event)

    def use(self, *event: Any) -> None:
        self._note("use", event, {})
        super().use(*event)

    def steps(self, topics: QualityModel | None = None) -> Iterator[None]:
        """Relearn what is kept, by these topics or the present ones, in steps of a millisecond or so; between them the
        learner may be told anything, but not to relearn once more. Left before the end, nothing has been relearned."""
        if self._since is not None:
            raise RuntimeError("it is being relearned already")
        copy = self.copy()
        since: list[_Event] = []
        self._since = since
        try:
            yield
            yield from copy.relearning(topics)
            while since:
                now, since[:TOLD] = since[:TOLD], []
                for name, event, more in now:
                    getattr(copy, name)(*event, **more)
                    if copy.due:
                        yield from copy.relearning()
                yield
            self.take(copy)
        finally:
            self._since = None

    def _note(self, name: str, event: tuple[Any, ...], more: dict[str, Any]) -> None:
        if self._since is not None:
            self._since.append((name, event, more))
