"""Asks a running system and keeps what came of each query."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from bench.system import running
from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.settings import Settings
from shared.views import FleetView, ModelsView

HIT_S = 0.05
"""An answer that waited less than this for its model found it resident."""


@dataclass
class Live:
    """What became of queries, by id."""

    at: dict[str, float] = field(default_factory=dict)
    latency: dict[str, float] = field(default_factory=dict)
    answer: dict[str, dict[str, Any]] = field(default_factory=dict)
    route: dict[str, m.Route] = field(default_factory=dict)
    preference: dict[str, m.Preference] = field(default_factory=dict)
    operations: list[m.Operation] = field(default_factory=list)
    """Loads and evictions, as they ended."""


class Asker:
    """Asks and listens on one connection."""

    def __init__(self, nc: Client, max_tokens: int) -> None:
        self._nc, self.max_tokens = nc, max_tokens
        self._inbox = nc.new_inbox()
        self.live = Live()
        self._ended: dict[str, asyncio.Event] = {}

    async def start(self) -> None:
        await self._nc.subscribe(f"{self._inbox}.*", cb=self._on_answer)
        await self._nc.subscribe(subjects.DECISION_ROUTE, cb=self._on_route)
        await self._nc.subscribe(subjects.JOURNAL_OPERATION, cb=self._on_operation)

    async def ask(self, prompt: str, model: str | None = None, preference: m.Preference | None = None) -> str:
        """Publish a query; its id."""
        query_id = uuid.uuid4().hex
        query: dict[str, Any] = {"prompt": prompt, "max_tokens": self.max_tokens, "deadline_s": 300, "id": query_id}
        if model is not None:
            query["model"] = model
        if preference is not None:
            query["preference"] = msgspec.to_builtins(preference)
            self.live.preference[query_id] = preference
        self._ended[query_id] = asyncio.Event()
        self.live.at[query_id] = time.perf_counter()
        await self._nc.publish("calm.query", json.dumps(query).encode(), reply=f"{self._inbox}.{query_id}")
        return query_id

    @property
    def idle(self) -> bool:
        """All that was asked has ended."""
        return all(event.is_set() for event in self._ended.values())

    async def ended(self, query_id: str) -> None:
        async with asyncio.timeout(320):
            await self._ended[query_id].wait()

    async def alone(self, prompt: str, model: str | None = None) -> str:
        """Ask, and wait for the answer."""
        query_id = await self.ask(prompt, model)
        await self.ended(query_id)
        return query_id

    async def together(self, prompts: Sequence[str], model: str) -> list[str]:
        """Ask all at once, and wait for all."""
        ids = [await self.ask(prompt, model) for prompt in prompts]
        await asyncio.gather(*(self.ended(i) for i in ids))
        return ids

    async def _on_answer(self, message: Msg) -> None:
        query_id, body = message.subject.rsplit(".", 1)[1], json.loads(message.data)
        if body["type"] == "answer.v1":
            self.live.latency[query_id] = time.perf_counter() - self.live.at[query_id]
            self.live.answer[query_id] = body
        if body["type"] != "chunk.v1":
            self._ended[query_id].set()

    async def _on_route(self, message: Msg) -> None:
        route = codec.unpack(message.data, m.Route)
        self.live.route[route.query_id] = route

    async def _on_operation(self, message: Msg) -> None:
        self.live.operations.append(codec.unpack(message.data, m.Operation))


@dataclass(frozen=True)
class System:
    """A running system, to ask and to look at."""

    asker: Asker
    models: ModelsView
    fleet: FleetView
    nc: Client

    @property
    def residence_s(self) -> float:
        """After this long a model that has been loaded may leave again."""
        assert self.models.policy is not None
        return self.models.policy.min_residence_s + 0.3

    def absent(self, artifacts: Iterable[str]) -> list[str]:
        """Of these, what no worker holds or loads."""
        held = {e.artifact for w in self.fleet.workers() for e in w.engines}
        return [name for name in artifacts if name not in held]

    async def qos(self) -> m.Qos:
        """What it has learned so far."""
        return msgspec.json.decode((await self.nc.request("calm.knowledge.qos", b"{}", timeout=5)).data, type=m.Qos)


@asynccontextmanager
async def system(workers: int, fleet: str, memory: str, max_tokens: int) -> AsyncIterator[System]:
    """Start it as a user would, and stop it again."""
    async with running(workers=workers, fleet=fleet, memory=memory) as url:
        nc = await nats.connect(url)
        bus = await Bus.connect(replace(Settings.from_env(), nats_url=url), "bench-live")
        try:
            models, seen = ModelsView(bus), FleetView(bus)
            await models.start()
            await seen.start()
            asker = Asker(nc, max_tokens)
            await asker.start()
            async with asyncio.timeout(10):
                await models.ready.wait()
            yield System(asker, models, seen, nc)
        finally:
            await nc.close()
            await bus.close()


def loaded(live: Live, query_id: str) -> bool:
    """Whether an answer waited for its model."""
    return bool(live.answer[query_id]["timings"]["load_s"] > HIT_S)


def beside(live: Live, query_id: str) -> float:
    """Seconds of an answer that are neither waiting nor the engine's work, as the client sees it."""
    t = live.answer[query_id]["timings"]
    return live.latency[query_id] - float(t["queue_s"] + t["load_s"] + t["prefill_s"] + t["decode_s"])


def read_tokens(answer: dict[str, Any]) -> int:
    """Tokens of the prompt that had to be read."""
    return int(answer["usage"]["tokens_in"] - answer["usage"].get("tokens_cached", 0))
