"""The dashboard: a page at `/`, and what it shows as JSON."""

from __future__ import annotations

from pathlib import Path

import msgspec
from aiohttp import web

from services.gateway.decide import board
from services.gateway.fleet import Fleet
from services.gateway.front import json_response
from shared import messages as m

STATIC = Path(__file__).parent / "static"
FILES = {"/": "index.html", "/board.css": "board.css", "/board.js": "board.js"}
"""Paths that ask for no key: there is nothing in them but the page."""
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Dashboard:
    """Handlers of the page, of `/v1/fleet` and of `/v1/queries/{id}`."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._files = {path: (STATIC / name).read_text() for path, name in FILES.items()}

    def routes(self) -> list[web.RouteDef]:
        return [
            *(web.get(path, self._file) for path in FILES),
            web.get("/v1/fleet", self._show),
            web.get("/v1/queries/{id}", self._explain),
        ]

    async def _file(self, request: web.Request) -> web.Response:
        kind = _TYPES[Path(FILES[request.path]).suffix]
        headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache", "Referrer-Policy": "no-referrer"}
        return web.Response(text=self._files[request.path], content_type=kind, charset="utf-8", headers=headers)

    async def _show(self, _request: web.Request) -> web.Response:
        snapshot = await self._fleet.snapshot()
        body = board.fleet(
            missing=self._fleet.missing(), services=snapshot.services, workers=snapshot.workers, cards=snapshot.cards,
            queues=snapshot.queues, counts=snapshot.counts, qos=snapshot.qos, energy=snapshot.energy,
            recent=await self._fleet.recent(), at=snapshot.at,
        )  # fmt: skip
        return json_response(msgspec.json.encode(body))

    async def _explain(self, request: web.Request) -> web.Response:
        record = await self._fleet.record("query", m.QueryRecord, id=request.match_info["id"])
        return json_response(board.explained(record))
