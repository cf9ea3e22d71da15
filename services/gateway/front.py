"""What every HTTP request goes through: its id, keys, origins, errors as JSON, counts and times."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from services.gateway.decide import keys, problem
from services.gateway.decide.problem import Problem
from services.gateway.metrics import Metrics
from shared import messages as m
from shared.errors import CalmError, Unauthorized
from shared.runtime import Health

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

BODY_S = 30.0
"""A request's body must have arrived within this time."""
OPEN = frozenset({"/", "/board.css", "/board.js", "/health", "/ready"})
"""Paths that ask for no key: they tell nothing of queries or the fleet."""

REQUEST_ID = web.RequestKey("request_id", str)
BEGAN = web.RequestKey("began", float)
_ORIGIN = web.RequestKey("origin", str)
_REQUEST_ID = "x-request-id"
_EXPOSED = "x-request-id, x-calm-model, retry-after"


class Front:
    """The middleware of all routes."""

    def __init__(
        self, metrics: Metrics, health: Health, log: Any, *, known_keys: frozenset[bytes], origins: frozenset[str]
    ) -> None:
        self._metrics = metrics
        self._health = health
        self._log = log
        self._keys = known_keys
        self._origins = origins

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer, whatever comes of it; nothing of an exception reaches the client but what it is to know."""
        request[BEGAN] = began = time.perf_counter()
        request[REQUEST_ID] = uuid.uuid4().hex
        request[_ORIGIN] = self._origin(request)
        route = _route(request)
        self._metrics.in_flight += 1
        status = 0
        try:
            response = await self._answer(request, handler)
            status = response.status
        except (asyncio.CancelledError, ConnectionResetError):
            self._metrics.disconnects.add(route)
            raise
        else:
            return response
        finally:
            self._metrics.in_flight -= 1
            if status:
                self._health.handled += status < 500
                self._health.failed += status >= 500
                self._metrics.requests.add(route, str(status))
                self._metrics.seconds.add(route, time.perf_counter() - began)
            self._log.debug("request", method=request.method, path=request.path, status=status,
                            request_id=request[REQUEST_ID])  # fmt: skip

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            return web.Response(status=204 if request[_ORIGIN] else 403)
        try:
            self._check_key(request)
            return await handler(request)
        except Failed as error:
            return self._tell(problem.of_failure(error.failure))
        except CalmError as error:
            return self._tell(problem.of_error(error))
        except web.HTTPException as error:
            return self._tell(problem.of_status(error.status, error.reason), error.headers.get("Allow"))
        except (asyncio.CancelledError, ConnectionResetError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it goes to the log and not to the client
            self._log.error("request_failed", request_id=request[REQUEST_ID], exc_info=error)
            return self._tell(problem.of_status(500, ""))

    def _check_key(self, request: web.Request) -> None:
        if not self._keys or request.path in OPEN:
            return
        authorization = request.headers.get("Authorization")
        if not keys.allowed(authorization, self._keys):
            what = "The API key is not known here." if authorization else "There is no API key."
            raise Unauthorized(what, "Send the header `Authorization: Bearer KEY`.")

    def _tell(self, told: Problem, allow: str | None = None) -> web.Response:
        self._metrics.errors.add(told.body["error"]["code"])
        headers = told.headers if allow is None else {**told.headers, "Allow": allow}
        return json_response(told.body, told.status, headers)

    async def on_prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        """Headers that every response has, streams included."""
        response.headers.setdefault(_REQUEST_ID, request.get(REQUEST_ID, ""))
        response.headers["Server"] = "calm"
        response.headers["X-Content-Type-Options"] = "nosniff"
        if origin := request.get(_ORIGIN, ""):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED
            response.headers["Vary"] = "Origin"
            if request.method == "OPTIONS":
                response.headers["Access-Control-Allow-Methods"] = "GET, POST, OPTIONS"
                asked = request.headers.get("Access-Control-Request-Headers", "")
                response.headers["Access-Control-Allow-Headers"] = asked or "authorization, content-type"
                response.headers["Access-Control-Max-Age"] = "600"

    def _origin(self, request: web.Request) -> str:
        """The origin to allow, empty for none."""
        origin = request.headers.get("Origin", "")
        return origin if origin and ("*" in self._origins or origin in self._origins) else ""


class OneLine(logging.Handler):
    """What the HTTP server itself has to say, such as of requests that are no HTTP, in our own log, without traces."""

    def __init__(self, log: Any) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    @classmethod
    def logger(cls, log: Any) -> logging.Logger:
        """A logger that hands everything over to `log`."""
        made = logging.getLogger(__name__)
        made.propagate = False
        made.handlers = [cls(log)]
        return made

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self._log.warning("http_server", message=record.getMessage()[:200], error=str(error or "")[:200])


class Failed(Exception):
    """A query ended as an error."""

    def __init__(self, failure: m.Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return web.Response(body=data, status=status, headers=headers, content_type="application/json")


async def read_json(request: web.Request) -> bytes:
    """A request's body, which is declared as JSON: so no web page can send one without the browser asking first.

    Raises:
        web.HTTPException: not declared as JSON, too large, or too slow.
    """
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType
    try:
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout from None


def _route(request: web.Request) -> str:
    """The path as it was declared, so that metrics have a bounded number of labels."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "other"
