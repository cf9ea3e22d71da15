"""The gateway's shell: routes, the listening socket, and leaving it in order."""

from __future__ import annotations

from pathlib import Path

import msgspec
from aiohttp import web

from services.gateway.asking import Asking
from services.gateway.completions import Completions
from services.gateway.dashboard import Dashboard
from services.gateway.decide import keys, response
from services.gateway.decide.request import unknown_model
from services.gateway.fleet import Fleet
from services.gateway.front import REQUEST_ID, Front, OneLine, json_response, read_json
from services.gateway.metrics import Metrics
from shared import listening
from shared import messages as m
from shared.errors import InvalidQuery, NotReady, SettingsInvalid
from shared.runtime import Context
from shared.settings import Settings

HEADROOM_BYTES = 65_536
"""Above the intake's own limit, so that it is the intake that says what is too large, and how large it was."""
LAST_WORD_S = 2.0
"""For handlers whose queries have ended to say so, when the gateway stops."""


class Gateway:
    """HTTP to `calm.query` and back."""

    def __init__(self, context: Context) -> None:
        self._settings = settings = context.settings
        self._log = context.log
        self._address = listening.parse(settings.http)
        self._metrics = Metrics()
        self.fleet = Fleet(context.bus)
        self._asking = Asking(context.bus, context.log)
        self._completions = Completions(self._asking, self.fleet, self._metrics, context.log)
        self._keys = known_keys(settings)
        origins = frozenset(one.strip() for one in settings.http_origins.split(",") if one.strip())
        self._front = Front(self._metrics, context.health, context.log, known_keys=self._keys, origins=origins)
        self._runner = web.AppRunner(
            self._application(),
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=LAST_WORD_S,
            logger=OneLine.logger(context.log),
        )
        self._site: web.SockSite | None = None
        self.url = ""
        """Where it listens, once it does."""
        context.health.in_flight = lambda: self.in_flight
        context.health.detail = lambda: self.url

    @property
    def in_flight(self) -> int:
        """Requests being answered."""
        return self._metrics.in_flight

    def _application(self) -> web.Application:
        app = web.Application(
            middlewares=[self._front.middleware], client_max_size=self._settings.max_prompt_bytes + HEADROOM_BYTES
        )
        app.on_response_prepare.append(self._front.on_prepare)
        app.add_routes([
            web.post("/v1/chat/completions", self._completions.chat),
            web.post("/v1/completions", self._completions.text),
            web.get("/v1/models", self._models),
            web.get("/v1/models/{id}", self._model),
            web.post("/v1/feedback", self._feedback),
            web.get("/health", self._health),
            web.get("/ready", self._ready),
            web.get("/metrics", self._render_metrics),
            *Dashboard(self.fleet).routes(),
        ])  # fmt: skip
        return app

    async def start(self) -> None:
        """Listen.

        Raises:
            SettingsInvalid: the address cannot be had.
        """
        bound = listening.bind(*self._address)  # before all else, so that a port in use is told at once
        await self.fleet.start()
        await self._asking.start()
        await self._runner.setup()
        self._site = web.SockSite(self._runner, bound, backlog=listening.BACKLOG)
        await self._site.start()
        self.url = listening.url(self._address[0], bound.getsockname()[1])
        self._log.info("listening", url=self.url, keys=len(self._keys))
        if not self._keys and not listening.is_local(self._address[0]):
            self._log.warning("no_api_keys", hint="anyone who reaches this port may ask: set CALM_API_KEYS")

    async def stop(self) -> None:
        """Accept no more, let what is in flight end within the drain time, cancel the rest."""
        if self._site is not None:
            await self._site.stop()
        await self._asking.stop(self._settings.drain_s)
        await self._runner.cleanup()

    # --- the small routes ---

    async def _models(self, _request: web.Request) -> web.Response:
        return json_response({"object": "list", "data": response.models(self.fleet.cards.values())})

    async def _model(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        for entry in response.models(self.fleet.cards.values()):
            if entry["id"] == name:
                return json_response(entry)
        if not self.fleet.cards:
            raise NotReady("The fleet's models are not known yet.", "Ask again in a moment.")
        raise unknown_model(name, self.fleet.cards)

    async def _feedback(self, request: web.Request) -> web.Response:
        body = await read_json(request)
        try:
            given = msgspec.json.decode(body, type=_Feedback)
        except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidQuery(
                f"The feedback does not have the right shape: {error}.", 'Send {"id": "...", "score": 0 to 1}.'
            ) from None
        request[REQUEST_ID] = given.id
        ok = await self._asking.judge(m.Feedback(query_id=given.id, score=given.score, label=given.label))
        return json_response({"object": "feedback", "id": given.id, "score": given.score, "message": ok.message})

    async def _health(self, _request: web.Request) -> web.Response:
        return json_response({"status": "ok"})

    async def _ready(self, _request: web.Request) -> web.Response:
        missing = self.fleet.missing()
        if missing:
            return json_response({"status": "not ready", "reason": missing}, 503, {"Retry-After": "1"})
        return json_response({"status": "ready", "workers": len(self.fleet.workers)})

    async def _render_metrics(self, _request: web.Request) -> web.Response:
        text = self._metrics.render(await self.fleet.snapshot(), ready=not self.fleet.missing())
        return web.Response(body=text.encode(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


class _Feedback(msgspec.Struct, forbid_unknown_fields=True):
    id: m.Slug
    score: m.Share
    label: str | None = None


def known_keys(settings: Settings) -> frozenset[bytes]:
    """Digests of the API keys that the settings name.

    Raises:
        SettingsInvalid: the file cannot be read, or there is no key in what should hold some.
    """
    file = settings.api_keys_file
    try:
        listed = Path(file).expanduser().read_text() if file else ""
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsInvalid(
            f"The API keys in {file} cannot be read ({error}).", "Correct CALM_API_KEYS_FILE, or unset it."
        ) from None
    known = keys.digests(settings.api_keys, listed)
    if not known and (settings.api_keys or file):
        raise SettingsInvalid(
            "CALM_API_KEYS or CALM_API_KEYS_FILE is set, and holds no key.", "Put one in, or unset it to ask for none."
        )
    return known
