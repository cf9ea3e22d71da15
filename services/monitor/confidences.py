"""What confidences say of answers, learned from judgements: told to planners, stored, taken up after a restart."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from services.monitor.keeper import Keeper
from services.monitor.writer import Writer
from shared import messages as m
from shared.bounded import put
from shared.bus import Bus
from shared.knowledge import reads
from shared.knowledge.store import Store
from shared.learn.confidence import Confidences, told

ANSWERS = 10_000
"""Latest answers whose confidence is kept in memory; an older one is looked up when its judgement comes."""


class ConfidenceKeeper(Keeper):
    """The learned lines, owned by the knowledge owner."""

    name = "confidence"
    unusable = "learned_confidences_unusable"
    not_told = "confidences_not_told"

    def __init__(self, bus: Bus, store: Store, writer: Writer, clock: Callable[[], float], log: Any) -> None:
        super().__init__(bus, store, writer, clock, log)
        self._confidences = Confidences(())
        self._answers: OrderedDict[tuple[str, str], float] = OrderedDict()

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

    def _take(self, stored: bytes) -> bool:
        self._confidences = Confidences.from_bytes(stored)
        return self._confidences.judgements > 0

    def _to_tell(self) -> bytes:
        return told(self._confidences.lines)

    def _to_store(self) -> bytes:
        return self._confidences.to_bytes()


def _heard(done: m.Done) -> list[tuple[str, float]]:
    """Cards and mean log-probabilities of a query's answers that could be read, or of which nothing was expected."""
    found = [(o.card, o.mean_logprob) for o in done.unread if o.mean_logprob is not None and o.readable is not False]
    answer = done.answer
    if answer is not None and answer.usage.tokens_out and (answer.reading is None or answer.reading.value is not None):
        found.append((done.card or answer.model, answer.confidence.mean_logprob))
    return found
