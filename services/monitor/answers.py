"""Answers to `calm.knowledge.<verb>` and to `calm.feedback`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from sqlalchemy.exc import SQLAlchemyError

from services.monitor.learning import Learning
from services.monitor.trust import Trust
from services.monitor.writer import Unwritable, Writer
from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.errors import CalmError, InvalidQuery, NotFound, NotReady
from shared.knowledge import reads, rows
from shared.knowledge.store import Store
from shared.tasks import end

AT_ONCE = 16
"""Requests answered at the same time; each may hold a database connection."""
_HEADROOM = 1024


class Answers:
    """Serves knowledge requests, feedback, and the intakes' reports of refused input."""

    def __init__(
        self,
        bus: Bus,
        store: Store,
        writer: Writer,
        learning: Learning,
        trust: Trust,
        clock: Callable[[], float],
        log: Any,
        on_judged: Callable[[str], None] = lambda _card: None,
    ) -> None:
        self._bus = bus
        self._store = store
        self._writer = writer
        self._learning = learning
        self._trust = trust
        self._on_judged = on_judged
        self._clock = clock
        self._log = log
        self._room = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscriptions: list[Subscription] = []
        self._verbs: dict[str, Callable[[m.KnowledgeRequest], Awaitable[msgspec.Struct | None]]] = {
            "query": lambda asked: reads.query(self._store, asked.id),
            "recent": lambda asked: reads.recent(self._store, asked.limit),
            "counts": lambda _: reads.counts(self._store),
            "qos": self._qos,
            "operations": lambda asked: reads.operations(self._store, asked.limit),
            "controls": lambda asked: reads.controls(self._store, asked.limit),
            "trial": lambda asked: reads.trial(self._store, asked),
            "placement": lambda asked: reads.placement(self._store, asked.id),
            "energy": lambda _: reads.energy(self._store),
        }

    async def start(self) -> None:
        for verb in self._verbs:
            await self._listen(subjects.knowledge(verb), self._on_request)
        await self._listen(subjects.FEEDBACK, self._on_feedback)
        await self._listen(subjects.REJECTED, self._on_rejected)

    async def stop(self, timeout_s: float) -> None:
        """Leave the queue group and finish what was asked."""
        drains = [asyncio.create_task(s.drain()) for s in self._subscriptions]  # type: ignore[no-untyped-call]
        if drains:
            await asyncio.wait(drains, timeout=timeout_s)
            await end(drains)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        await end(self._tasks)

    async def _listen(self, subject: str, answer: Callable[[Msg], Awaitable[msgspec.Struct]]) -> None:
        async def on_message(message: Msg) -> None:
            await self._room.acquire()
            task = asyncio.create_task(self._answer(message, answer))
            self._tasks.add(task)
            task.add_done_callback(self._on_done)

        self._subscriptions.append(await self._bus.subscribe(subject, on_message, subjects.KNOWLEDGE_QUEUE))

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("answer_failed", exc_info=error)

    async def _answer(self, message: Msg, answer: Callable[[Msg], Awaitable[msgspec.Struct]]) -> None:
        try:
            result = await answer(message)
        except CalmError as error:
            result = codec.failure_of(error)
        except (SQLAlchemyError, Unwritable) as error:
            self._log.error("knowledge_unavailable", subject=message.subject, error=str(error))
            result = codec.failure_of(
                NotReady("The knowledge base cannot be used right now.", "See the monitor's log, then ask again.")
            )
        if message.reply:
            encoding = encoding_of(message)
            data = codec.encode_public(result, encoding)
            limit = self._bus.nc.max_payload - _HEADROOM
            if len(data) > limit and isinstance(result, m.QueryRecord):  # its own text is what the client has
                data = codec.encode_public(msgspec.structs.replace(result, query=None), encoding)
            if len(data) > limit:
                too_large = NotReady("The reply is larger than the broker's max_payload.", "Ask with a lower `limit`.")
                data = codec.encode_public(codec.failure_of(too_large), encoding)
            with contextlib.suppress(nats.errors.Error, OSError):
                await self._bus.nc.publish(message.reply, data)

    # --- what is asked ---

    async def _on_request(self, message: Msg) -> msgspec.Struct:
        asked = decode(message, m.KnowledgeRequest) if message.data else m.KnowledgeRequest()
        verb = message.subject.rpartition(".")[2]
        if verb == "query" and not asked.id:
            raise InvalidQuery("No query id is given.", 'Send {"id": "..."}.')
        found = await self._verbs[verb](asked)
        if found is None:
            what = f"{verb} {asked.id!r}" if asked.id else verb
            raise NotFound(f"The knowledge base has no {what}.", "See `calm recent` for what there is.")
        return found

    async def _qos(self, _asked: m.KnowledgeRequest) -> m.Qos:
        return self._learning.refresh()

    async def _on_feedback(self, message: Msg) -> msgspec.Struct:
        given = decode(message, m.Feedback)
        card = await self._card_of(given.query_id)
        at = self._clock()
        row = {
            "query_id": given.query_id, "score": given.score, "label": given.label, "card": card, "at": at,
            "source": "",
        }  # fmt: skip
        await self._writer.write("feedback", row)
        if card:
            self._learning.on_feedback(card, given)
            self._trust.on_judged(given.query_id, card, given.score)
            self._on_judged(card)
        return m.Ok(message="Thank you: the feedback is stored.")

    async def _card_of(self, query_id: str) -> str:
        """The card that answered a query.

        Raises:
            NotFound: no such query, or it has not ended.
        """
        card = await reads.card_of(self._store, query_id)
        if not card:  # the recorder may not have come to it yet; the broker knows
            try:
                done = await self._bus.claimed(query_id)
            except (TimeoutError, nats.errors.Error):
                done = None
            if done is None and card is None:
                raise NotFound(f"There is no query {query_id!r}.", "Give the `id` that came with the answer.")
            card = (done.card or (done.answer.model if done.answer else "")) if done else ""
        return card

    async def _on_rejected(self, message: Msg) -> msgspec.Struct:
        report = decode(message, m.Rejections)
        for code, count in report.counts.items():
            await self._writer.write("rejections", {"day": rows.day(report.at), "code": code, "count": count})
        return m.Ok()


def encoding_of(message: Msg) -> str:
    """JSON when a request says so, is empty or begins with `{`; services send MessagePack without a header."""
    if codec.CONTENT_TYPE in (message.headers or {}):
        with contextlib.suppress(InvalidQuery):
            return codec.encoding_of(message.headers)
        return "json"
    return "json" if not message.data or message.data.lstrip()[:1] in (b"{", b"[", b'"') else "msgpack"


def decode(message: Msg, kind: type[Any]) -> Any:
    """Decode a request in its own encoding. Raises InvalidQuery."""
    if codec.CONTENT_TYPE in (message.headers or {}):
        codec.encoding_of(message.headers)
    return codec.decode_public(message.data, kind, encoding_of(message))
