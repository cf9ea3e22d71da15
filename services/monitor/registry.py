"""The registry: publishes the fleet's cards and policy, as soon as its models are in the store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import nats.errors
import nats.js.errors

from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.errors import ModelError
from shared.models import fleet_file
from shared.models.fleet import FleetFile
from shared.tasks import end

RETRY_S = 2.0
"""Another process fills the model store, and a folder announces nothing: look again after this long."""


class Registry:
    """Keeps KV `calm_models` equal to the fleet file.

    `cards` is None until the registry has been published.
    """

    def __init__(self, bus: Bus, fleet: FleetFile, store: fleet_file.Manifests, log: Any) -> None:
        self._bus = bus
        self._fleet = fleet
        self._store = store
        self._log = log
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._on_publish: list[Callable[[], None]] = []
        self.policy = fleet_file.policy(fleet)
        self.probes = fleet.probes
        self.cards: dict[str, m.Card] | None = None
        self.problem = "models are looked for"

    def on_publish(self, callback: Callable[[], None]) -> None:
        """Call back whenever the registry has been published."""
        self._on_publish.append(callback)

    def start(self) -> None:
        self._bus.on_reconnect(self._changed.set)  # a broker that came back without its files has lost the bucket
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        await end([self._task])

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            cards = await self._load()
            wait_s = None if await self._publish(cards) else RETRY_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()

    async def _load(self) -> dict[str, m.Card]:
        while True:
            try:
                # Reads manifests from files; in a thread, for a store on a slow disk must not delay intake.
                cards = await asyncio.to_thread(fleet_file.cards, self._fleet, self._store)
            except (ModelError, OSError) as error:
                if self.problem != str(error):
                    self.problem = str(error)
                    self._log.warning(
                        "models_missing",
                        fleet=self._fleet.fleet.name,
                        error=str(error),
                        remedy=getattr(error, "remedy", "") or "Fetch the models with `calm models pull`.",
                    )
                await asyncio.sleep(RETRY_S)
            else:
                return {card.name: card for card in cards}

    async def _publish(self, cards: dict[str, m.Card]) -> bool:
        """Put what differs and delete what the fleet no longer has; True when all of it is in the bucket."""
        wanted: dict[str, bytes] = {name: codec.pack(card) for name, card in cards.items()}
        wanted[subjects.POLICY_KEY] = codec.pack(self.policy)
        bucket = subjects.BUCKET_MODELS
        try:
            present = await self._bus.kv_all(bucket)
            for key, data in wanted.items():
                if present.get(key) != data:
                    await self._bus.js.publish(subjects.kv(bucket, key), data)
            for key in present.keys() - wanted.keys():
                await self._bus.js.publish(subjects.kv(bucket, key), b"", headers={"KV-Operation": "DEL"})
        except (nats.js.errors.NotFoundError, nats.js.errors.NoStreamResponseError):
            await self._bus.ensure()
            return False
        except (TimeoutError, OSError, nats.errors.Error) as error:
            self._log.warning("registry_not_published", error=str(error) or type(error).__name__)
            return False
        self.cards, self.problem = cards, ""
        for callback in self._on_publish:
            callback()
        self._log.info("registry_published", fleet=self._fleet.fleet.name, cards=sorted(cards))
        return True
