"""What judgements and signs teach: learned quality and how far each card is trusted; told to planners, kept."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec
import nats.errors

from services.monitor.confidences import ConfidenceKeeper
from services.monitor.decide.signals import Signals
from services.monitor.relearning import Relearning
from services.monitor.telling import tell
from services.monitor.writer import Writer
from shared import messages as m
from shared import subjects
from shared.bounded import put
from shared.bus import Bus
from shared.knowledge import reads
from shared.knowledge.store import Store
from shared.learn import standing
from shared.learn.features import FORM, joined
from shared.learn.kept import embedding
from shared.learn.live import Array
from shared.learn.live_relearn import SteppedLearner
from shared.learn.standing import Standing
from shared.tasks import end
from shared.unread import taken

TELL_S = 1.0
READINGS_S = 5.0
"""Between two versions that tell of readings alone: each answer that was to be read changes them a little."""
STORE_S = 60.0
RECORDED_S = 2.0
ROUTES = 10_000
"""Latest decisions kept in memory; an older one is looked up when its judgement comes."""
KEEP_OLD = 0.1
"""Of a drifting card, what is known counts this much of what it did, once its new level is accepted."""
OUTCOMES_S = 3600.0
"""The outcomes kept (up to 2 MB) are stored this often, and at the end. After a crash, answers judged since then that
are judged again count twice, and topics made anew leave them out."""
_LEARNED, _STANDINGS, _SIGNALS = "learned", "standings", "signals"
_OUTCOMES, _READINGS = "outcomes", "readings"


class Trust:
    """The learner and the cards' standings, owned by the knowledge owner."""

    def __init__(
        self,
        bus: Bus,
        store: Store,
        writer: Writer,
        clock: Callable[[], float],
        log: Any,
        confidences: ConfidenceKeeper,
    ) -> None:
        self._bus = bus
        self._store = store
        self._writer = writer
        self._clock = clock
        self._log = log
        self._confidences = confidences
        self._routes: OrderedDict[str, m.Route] = OrderedDict()
        self._judged: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._unread: OrderedDict[tuple[str, str], None] = OrderedDict()
        """Answers that could not be read, by query and card."""
        self._learner = SteppedLearner(())
        self._relearning = Relearning(self._learner, self._on_relearned, log)
        self._standings: dict[str, Standing] = {}
        self._reasons: dict[str, tuple[str, float]] = {}
        self._version = 0
        self._fresh = self._heard = False
        self._told_at = clock()
        self._changed: set[str] = set()
        self._symptoms: list[m.Symptom] = []
        self._awaited: dict[str, asyncio.Event] = {}
        self._judging: set[asyncio.Task[None]] = set()
        self._signals = Signals()
        self._stored_at = self._outcomes_at = clock()
        self._stored_version = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def learner(self) -> SteppedLearner:
        return self._learner

    @property
    def standings(self) -> dict[str, Standing]:
        """By card; a card without judgements is absent."""
        return self._standings

    async def start(self) -> None:
        """Take up what was stored last, tell it, and go on."""
        async with self._store.read() as connection:
            learned = await reads.latest_parameter(connection, _LEARNED)
            stood = await reads.latest_parameter(connection, _STANDINGS)
            signals = await reads.latest_parameter(connection, _SIGNALS)
            outcomes = await reads.latest_parameter(connection, _OUTCOMES)
            readings = await reads.latest_parameter(connection, _READINGS)
        if learned is not None:
            self._version = self._stored_version = learned[0]
            try:
                self._learner = SteppedLearner.from_bytes(learned[1])
                self._relearning = Relearning(self._learner, self._on_relearned, self._log)
                if outcomes is not None:
                    self._learner.take_outcomes(outcomes[1])
                if readings is not None:
                    self._learner.take_readings(readings[1])
                self._fresh = self._learner.ready
            except ValueError as error:
                self._log.warning("learned_parameters_unusable", error=str(error), remedy="They are learned anew.")
        if signals is not None:
            with contextlib.suppress(msgspec.MsgspecError):
                self._signals = msgspec.msgpack.decode(signals[1], type=Signals)
        if stood is not None:
            with contextlib.suppress(msgspec.MsgspecError):
                self._standings = msgspec.msgpack.decode(stood[1], type=dict[str, Standing])
                self._changed = set(self._standings)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._judging:
            await asyncio.wait(self._judging, timeout=RECORDED_S + 1.0)
        await end(self._judging)
        await self._relearning.stop()
        if self._task is not None:
            await end([self._task])
            self._keep(outcomes=True)

    def use(self, cards: list[str]) -> None:
        """The fleet's cards."""
        if cards:
            self._learner.use(cards)

    # --- what happened ---

    def on_route(self, route: m.Route) -> None:
        """A query was routed."""
        put(self._routes, route.query_id, route, ROUTES)
        if (awaited := self._awaited.get(route.query_id)) is not None:
            awaited.set()
        x = joined(embedding(route.embedding), route.form)
        if route.embedding and (first := self._learner.seen(x)) is not None:
            self._relearning.topics(first, len(FORM) if route.form else 0)
        self._symptoms += self._signals.routed(route, self._clock())

    def _on_relearned(self) -> None:
        self._fresh = True

    def on_done(self, done: m.Done) -> None:
        """A query has ended."""
        self._symptoms += self._signals.ended(done, self._routes.get(done.query_id), self._clock())

    def on_answered(self, done: m.Done, about: bytes, form: bytes) -> None:
        """A query with this embedding and these facts about its text has been answered: learn signs of its answers."""
        limits = self._routes[done.query_id].patience if done.query_id in self._routes else {}
        for card, tokens, _, readable in taken(done):
            if readable is None:
                continue
            if not readable:
                put(self._unread, (done.query_id, card), None, ROUTES)
            if self._standings.get(card, Standing()).state == "healthy":
                x = joined(embedding(about), form)
                self._heard |= self._learner.heard(card, x, readable, done.query_id, tokens, limited=card in limits)

    def on_judged(self, query_id: str, card: str, score: float) -> None:
        """An answer was judged, by a person or a golden probe. Taken in as soon as its decision is at hand."""
        task = asyncio.create_task(self._on_judged(query_id, card, score))
        self._judging.add(task)
        task.add_done_callback(self._on_taken)

    def _on_taken(self, task: asyncio.Task[None]) -> None:
        self._judging.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("judgement_not_learned", exc_info=error)

    async def _on_judged(self, query_id: str, card: str, score: float) -> None:
        route, readable = self._routes.get(query_id), (query_id, card) not in self._unread
        if route is None:
            route, readable = await self._stored(query_id, card)
        if route is None:
            await self._recorded(query_id)
            route = self._routes.get(query_id)
        candidate = next((c for c in route.candidates if c.card == card), None) if route is not None else None
        if route is None or candidate is None:
            return  # decided before this version, or the decision has been forgotten: nothing to compare with
        self.judge(card, score, candidate, joined(embedding(route.embedding), route.form), query_id, readable=readable)
        if readable:
            await self._confidences.on_judged(query_id, card, score, candidate)

    async def _stored(self, query_id: str, card: str) -> tuple[m.Route | None, bool]:
        """The decision on record, and whether the card's answer could be read as far as that is known."""
        record = await reads.query(self._store, query_id)
        if record is None:
            return None, True
        answers = taken(record.done) if record.done is not None else []
        return record.route, not any(name == card and readable is False for name, _, _, readable in answers)

    async def _recorded(self, query_id: str) -> None:
        """Wait a moment for a decision that the recorder has not come to yet: an answer may be quicker than that."""
        event = self._awaited.setdefault(query_id, asyncio.Event())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RECORDED_S):
                await event.wait()
        self._awaited.pop(query_id, None)

    def judge(
        self, card: str, score: float, candidate: m.Candidate, x: Array, query_id: str = "", *,
        readable: bool = True,
    ) -> None:  # fmt: skip
        """Learn from a judgement, and compare it with what had been predicted. A second judgement of an answer takes
        the place of the first in what is learned; it is no further evidence on how the card stands."""
        before = self._standings.get(card, Standing())
        after, event = before, None
        if not self._again(query_id, card):
            scale = candidate.terms.get("scale", 1.0)
            predicted = min(max(candidate.quality / max(scale, 1e-6), 0.0), 1.0)
            after, event = standing.judged(before, predicted, score)
        self._standings[card] = after
        if after.state == "healthy" and self._learner.judged(
            card, x, candidate.terms.get("prior", candidate.quality), score, query_id,
            readable=readable,
        ):  # fmt: skip
            self._fresh = True
            self._relearning.look()
        if event is not None:
            self._happened(card, event, before, after)

    def _again(self, query_id: str, card: str) -> bool:
        """Whether this answer has been judged before; from now on it has."""
        known = (query_id, card) in self._judged or self._learner.knows(query_id, card)
        put(self._judged, (query_id, card), None, ROUTES)
        return known and bool(query_id)

    def _happened(self, card: str, event: str, before: Standing, after: Standing) -> None:
        now = self._clock()
        self._reasons[card] = (event, now)
        self._changed.add(card)
        if event == "rebased":
            self._learner.changed(card, KEEP_OLD)
            self._confidences.changed(card)
        detail = {
            "drift": f"answers became worse than predicted, noticed after {after.since or before.since + 1} judgements",
            "restored": "answers are as good as they used to be: trusted again",
            "rebased": f"answers stay worse: taken back at {after.scale:.2f} of the quality predicted before",
        }[event]
        self._log.warning("standing_changed", card=card, kind=event, detail=detail)
        kind = "drift" if event == "drift" else "recovery"
        symptom = m.Symptom(kind=kind, subject=card, detail=detail, value=before.evidence, at=now)  # type: ignore[arg-type]
        self._symptoms.append(symptom)

    # --- telling and keeping ---

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(TELL_S)
            try:
                await self._tell()
            except (TimeoutError, OSError, nats.errors.Error) as error:
                self._log.warning("learned_not_told", error=str(error) or type(error).__name__)
            if self._clock() - self._stored_at >= STORE_S:
                self._keep(outcomes=self._clock() - self._outcomes_at >= OUTCOMES_S)

    async def _tell(self) -> None:
        bucket = subjects.BUCKET_CONTROL
        while self._symptoms:
            symptom = self._symptoms.pop(0)
            await self._bus.send(subjects.symptom(symptom.kind), symptom)  # the owner records what it hears
        while self._changed:
            card = self._changed.pop()
            try:
                await self._bus.kv_put(bucket, subjects.standing_key(card), self.stands(card))
            except BaseException:
                self._changed.add(card)
                raise
        now = self._clock()
        due = self._fresh or (self._heard and now - self._told_at >= READINGS_S)
        if not due or not self._learner.ready:
            return
        self._version = max(self._version + 1, int(now))
        await tell(self._bus, "quality", self._version, self._learner.to_bytes())
        self._fresh = self._heard = False
        self._told_at = now

    def stands(self, card: str) -> m.CardStanding:
        """How a card stands, as planners are told."""
        now = self._standings.get(card, Standing())
        reason, at = self._reasons.get(card, ("", 0.0))
        return m.CardStanding(
            card=card, state=now.state, scale=now.scale, reason=reason, evidence=now.evidence,
            judgements=now.since, at=at,
        )  # fmt: skip

    def _keep(self, *, outcomes: bool) -> None:
        """Store learner and standings under a version of their own, and the `outcomes` kept if they are due."""
        now = self._clock()
        self._stored_at = now
        if not self._routes and not self._standings:
            return
        version = max(self._version, self._stored_version + 1)
        self._version = self._stored_version = version
        records = {
            _LEARNED: self._learner.to_bytes(),
            _STANDINGS: msgspec.msgpack.encode(self._standings),
            _SIGNALS: msgspec.msgpack.encode(self._signals),
        }
        if outcomes:
            self._outcomes_at = now
            records[_OUTCOMES] = self._learner.outcomes_to_bytes()
            records[_READINGS] = self._learner.readings_to_bytes()
        for name, record in records.items():
            self._writer.note("parameters", {"name": name, "version": version, "at": now, "record": record})
