"""`POST /v1/chat/completions` and `/v1/completions`: a request, a query, its answer whole or as it is written."""

from __future__ import annotations

import time
from typing import Any

from aiohttp import web

from services.gateway.asking import Asking, Replies
from services.gateway.decide import problem, response
from services.gateway.decide import request as requests
from services.gateway.decide.request import Asked
from services.gateway.decide.response import Events, Kind
from services.gateway.decide.telling import Telling
from services.gateway.fleet import Fleet
from services.gateway.front import BEGAN, REQUEST_ID, Failed, json_response, read_json
from services.gateway.metrics import Metrics
from shared import codec
from shared import messages as m
from shared.errors import NotReady, Restarted

HEADERS_AFTER_S = 10.0
"""A stream's headers wait for its first text, so that an error before that has a status of its own, but no longer."""
COMMENT_EACH_S = 10.0
"""While a stream has nothing to say."""


class Completions:
    """The handlers of both routes."""

    def __init__(self, asking: Asking, fleet: Fleet, metrics: Metrics, log: Any) -> None:
        self._asking = asking
        self._fleet = fleet
        self._metrics = metrics
        self._log = log

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._complete(request, "chat")

    async def text(self, request: web.Request) -> web.StreamResponse:
        return await self._complete(request, "text")

    async def _complete(self, request: web.Request, kind: Kind) -> web.StreamResponse:
        body = await read_json(request)
        read = requests.chat if kind == "chat" else requests.text
        asked = read(body, cards=self._fleet.cards, policy=self._fleet.policy, new_id=request[REQUEST_ID])
        request[REQUEST_ID] = query_id = asked.query.id or ""
        if missing := self._fleet.missing():
            raise NotReady(f"No query can be answered now: {missing}.", "Send the request again in a moment.")
        async with self._asking.ask(asked.query, keep=asked.own_id) as replies:
            created = int(time.time())
            if not asked.stream:
                return self._whole(kind, await _end(replies), asked, created)
            events = Events(kind, query_id, created, asked.include_usage)
            return await _Stream(request, replies, asked, events, self._metrics, self._log).run()

    def _whole(self, kind: Kind, answer: m.Answer, asked: Asked, created: int) -> web.Response:
        self._metrics.answered(answer)
        return json_response(response.whole(kind, answer, asked, created), headers={"x-calm-model": answer.model})


async def _end(replies: Replies) -> m.Answer:
    """The answer.

    Raises:
        Failed: the query ended as an error.
    """
    while True:
        reply = await replies.next()
        if isinstance(reply, m.Answer):
            return reply
        if isinstance(reply, m.Failure):
            raise Failed(reply)


class _Stream:
    """One streamed answer."""

    def __init__(
        self, request: web.Request, replies: Replies, asked: Asked, events: Events, metrics: Metrics, log: Any
    ) -> None:
        self._request = request
        self._replies = replies
        self._asked = asked
        self._events = events
        self._metrics = metrics
        self._log = log
        self._telling = Telling()
        self._model = asked.query.model or ""
        self._response: web.StreamResponse | None = None
        self._told = False
        """Whether some text has been sent."""

    async def run(self) -> web.StreamResponse:
        """Pass on what comes, to its end.

        Raises:
            Failed: the query ended as an error before the headers were sent; later that is an event.
        """
        reply = await self._replies.next(HEADERS_AFTER_S)
        while True:
            if reply is None:
                await self._write(response.WAITING)
            elif isinstance(reply, m.Failure):
                return await self._fail(reply)
            else:
                try:
                    if isinstance(reply, m.Answer):
                        return await self._end(reply)
                    await self._chunk(reply)
                except Restarted as error:
                    return await self._fail(codec.failure_of(error, self._events.id))
            reply = await self._replies.next(COMMENT_EACH_S)

    async def _chunk(self, chunk: m.Chunk) -> None:
        self._model = chunk.model or self._model
        if text := self._telling.heard(chunk):
            await self._tell(text)

    async def _end(self, answer: m.Answer) -> web.StreamResponse:
        self._model = answer.model
        told = response.content(answer, self._asked)
        rest = self._telling.ended(told)
        self._metrics.answered(answer)
        if rest or not self._told:
            await self._tell(rest)
        last = await self._write(self._events.end(answer, told))
        await last.write_eof()
        return last

    async def _tell(self, text: str) -> None:
        if not self._told:
            self._metrics.first.add(self._request.path, time.perf_counter() - self._request[BEGAN])
        await self._write(self._events.text(text, self._model, first=not self._told))
        self._told = True

    async def _fail(self, failure: m.Failure) -> web.StreamResponse:
        if self._response is None:
            raise Failed(failure)
        self._metrics.errors.add(failure.code)
        self._log.info("stream_failed", query_id=self._events.id, code=failure.code)
        await self._response.write(response.event(problem.of_failure(failure).body))
        await self._response.write_eof()
        return self._response

    async def _write(self, data: bytes) -> web.StreamResponse:
        if self._response is None:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            if self._model:
                headers["x-calm-model"] = self._model
            self._response = web.StreamResponse(headers=headers)
            self._response.content_type = "text/event-stream"
            self._response.charset = "utf-8"
            await self._response.prepare(self._request)
        await self._response.write(data)
        return self._response
