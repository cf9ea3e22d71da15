"""What confidences say of answers, learned from judgements: told to planners, stored, taken up after a restart."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

import nats.errors

from services.monitor.telling import tell
from services.monitor.writer import Writer
from shared import messages as m
from shared.bounded import put
from shared.bus import Bus
from shared.knowledge import reads
from shared.knowledge.store import Store
from shared.learn.confidence import Confidences, told
from shared.tasks import end

TELL_S = 5.0
"""Between two versions: each judgement changes it a little."""
STORE_S = 60.0
ANSWERS = 10_000
"""Latest answers whose confidence is kept in memory; an older one is looked up when its judgement comes."""
NAME: Final = "confidence"


class ConfidenceKeeper:
    """The learned lines, owned by the knowledge owner."""

    def __init__(self, bus: Bus, store: Store, writer: Writer, clock: Callable[[], float], log: Any) -> None:
        self._bus = bus
        self._store = store
        self._writer = writer
        self._clock = clock
        self._log = log
        self._confidences = Confidences(())
        self._answers: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._version = 0
        self._fresh = self._unstored = False
        self._stored_at = clock()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take up what was stored last, tell it, and go on."""
        async with self._store.read() as connection:
            stored = await reads.latest_parameter(connection, NAME)
        if stored is not None:
            self._version = stored[0]
            try:
                self._confidences = Confidences.from_bytes(stored[1])
                self._fresh = self._confidences.judgements > 0
            except ValueError as error:
                self._log.warning("learned_confidences_unusable", error=str(error), remedy="They are learned anew.")
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            await end([self._task])
            self._keep()

    def use(self, cards: list[str]) -> None:
        """The fleet's cards."""
        if cards:
            self._confidences.use(cards)

    def on_done(self, done: m.Done) -> None:
        """A query has ended: its answers tell how sure their cards usually are."""
        for card, confidence in _heard(done):
            put(self._answers, (done.query_id, card), confidence, ANSWERS)
            self._confidences.heard(card, confidence)
            self._unstored = True

    async def on_judged(self, query_id: str, card: str, score: float, candidate: m.Candidate) -> None:
        """An answer was judged that could be read, or of which nothing was expected."""
        confidence = self._answers.get((query_id, card))
        if confidence is None:
            record = await reads.query(self._store, query_id)
            if record is None or record.done is None:
                return
            confidence = dict(_heard(record.done)).get(card)
        if confidence is None:
            return
        quality = candidate.quality / max(min(candidate.terms.get("readable", 1.0), 1.0), 1e-3)
        if self._confidences.judged(card, quality, confidence, score, query_id):
            self._fresh = self._unstored = True

    def changed(self, card: str) -> None:
        """A card answers differently from before."""
        self._confidences.changed(card)
        self._fresh = self._unstored = True

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(TELL_S)
            try:
                await self._tell()
            except (TimeoutError, OSError, nats.errors.Error) as error:
                self._log.warning("confidences_not_told", error=str(error) or type(error).__name__)
            if self._clock() - self._stored_at >= STORE_S:
                self._keep()

    async def _tell(self) -> None:
        if not self._fresh:
            return
        self._version = max(self._version + 1, int(self._clock()))
        await tell(self._bus, NAME, self._version, told(self._confidences.lines))
        self._fresh = False

    def _keep(self) -> None:
        """Store them under a version of their own."""
        now = self._clock()
        self._stored_at = now
        if not self._unstored:
            return
        self._version += 1
        row = {"name": NAME, "version": self._version, "at": now, "record": self._confidences.to_bytes()}
        self._writer.note("parameters", row)
        self._unstored = False


def _heard(done: m.Done) -> list[tuple[str, float]]:
    """Cards and mean log-probabilities of a query's answers that could be read, or of which nothing was expected."""
    found = [(o.card, o.mean_logprob) for o in done.unread if o.mean_logprob is not None and o.readable is not False]
    answer = done.answer
    if answer is not None and answer.usage.tokens_out and (answer.reading is None or answer.reading.value is not None):
        found.append((done.card or answer.model, answer.confidence.mean_logprob))
    return found
