"""The monitor's shell: intake and registry in every replica, the knowledge base in the one that holds the lease."""

from __future__ import annotations

import asyncio
import contextlib

import nats.errors

from services.monitor.intake import Intake
from services.monitor.owner import Owner
from services.monitor.refusals import Refusals
from services.monitor.registry import Registry
from shared.models.fleet_file import Manifests, load_fleet
from shared.runtime import Context


class Monitor:
    """Composes the monitor's parts and starts and stops them in order."""

    def __init__(self, context: Context, store: Manifests) -> None:
        self._settings = context.settings
        self._bus = context.bus
        self._registry = Registry(context.bus, load_fleet(self._settings.fleet), store, context.log)
        self._refusals = Refusals(context.bus, context.clock)
        self._intake = Intake(
            context.bus,
            cards=lambda: self._registry.cards,
            on_refusal=self._refusals.add,
            max_bytes=self._settings.max_prompt_bytes,
            clock=context.clock,
            health=context.health,
            log=context.log,
        )
        self._owner = Owner(context, self._registry)
        context.health.in_flight = lambda: self._intake.in_flight + self._owner.in_flight
        context.health.detail = self._detail

    async def start(self) -> None:
        self._registry.start()
        await self._owner.start()
        self._refusals.start()
        await self._intake.start()
        with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError, OSError):
            await self._bus.nc.flush()  # ready means that the broker knows our subscriptions

    async def stop(self) -> None:
        """No new queries; store or refuse those at hand; then commit and close the knowledge base."""
        await self._intake.stop(self._settings.drain_s)
        await self._refusals.stop()
        await self._registry.stop()
        await self._owner.stop()

    def _detail(self) -> str:
        return self._registry.problem or ("owns the knowledge base" if self._owner.owns else "")
