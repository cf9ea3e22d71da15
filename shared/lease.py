"""A lease: at most one of several replicas holds it, and another takes over within seconds when that one dies."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from shared import subjects
from shared.bus import Bus
from shared.streams import LIVENESS_S
from shared.tasks import end

REFRESH_S = 1.0
"""Between two refreshes, and between two attempts to gain a lease that another holds."""
_EXPECTED = "Nats-Expected-Last-Subject-Sequence"


class Lease:
    """The lease `name` in the bucket `calm_leases`, wanted by `instance`.

    The entry expires `LIVENESS_S` after its last refresh. A holder counts that time from before it sent the
    refresh, so it stops to hold the lease before anyone else can gain it. The callbacks run in the event loop,
    in the order of what happened.
    """

    def __init__(
        self,
        bus: Bus,
        name: str,
        instance: str,
        *,
        on_gain: Callable[[], None] | None = None,
        on_loss: Callable[[], None] | None = None,
    ) -> None:
        self._bus = bus
        self._subject = subjects.kv(subjects.BUCKET_LEASES, name)
        self._token = f"{instance} {uuid.uuid4().hex}".encode()
        self._on_gain = on_gain or (lambda: None)
        self._on_loss = on_loss or (lambda: None)
        self._revision = 0
        self._until = 0.0
        self._told = False
        self._not_before = 0.0
        self._unsure = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._subscription: Subscription | None = None
        self._running = False

    @property
    def held(self) -> bool:
        return time.monotonic() < self._until

    async def start(self) -> None:
        """Try to gain the lease, and go on trying and refreshing until `stop`."""
        self._running = True
        self._subscription = await self._bus.subscribe(self._subject, self._on_entry)
        self._bus.on_reconnect(self._on_reconnect)
        await self._attempt()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Release the lease at once, if it is held, so that another can gain it without waiting."""
        self._running = False
        await end([self._task])
        if self._subscription is not None:
            with contextlib.suppress(nats.errors.Error, OSError):
                await self._subscription.unsubscribe()
        if self.held:
            headers = {_EXPECTED: str(self._revision), "KV-Operation": "DEL"}
            with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError, OSError):
                await self._bus.js.publish(self._subject, b"", headers=headers, timeout=1)
        self._lose()

    async def _on_entry(self, message: Msg) -> None:
        if (message.headers or {}).get("KV-Operation"):
            self._wake.set()  # released: try at once

    def _on_reconnect(self) -> None:
        # The bucket may have vanished with the broker while another instance still counts on its entry.
        if self._running and not self.held:
            self._not_before = time.monotonic() + LIVENESS_S
        self._unsure = True
        self._wake.set()

    async def _run(self) -> None:
        while True:
            limit = REFRESH_S if not self._told else min(REFRESH_S, max(self._until - time.monotonic(), 0.0))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit):
                    await self._wake.wait()
            self._wake.clear()
            if self._told and not self.held:
                self._lose()
            await self._attempt()

    async def _attempt(self) -> None:
        """Refresh the lease when it is held, else try to gain it."""
        try:
            if self._unsure:
                # Subscribers to the entry count as listeners, so a missing bucket shows as a timeout only.
                async with asyncio.timeout(LIVENESS_S):
                    await self._bus.ensure()
                self._unsure = False
            began = time.monotonic()
            expected = self._revision if self.held else await self._free_at()
            if expected is None or began < self._not_before:
                return
            ack = await self._bus.js.publish(
                self._subject, self._token, headers={_EXPECTED: str(expected)}, timeout=REFRESH_S
            )
        except nats.js.errors.APIError:  # another instance wrote it, or the broker lost the bucket
            if self.held:
                self._lose()
                self._wake.set()
        except (TimeoutError, OSError, nats.errors.Error):
            self._unsure = True  # the broker is away, or came back without the bucket; the lease runs out by itself
        else:
            self._revision, self._until = ack.seq, began + LIVENESS_S
            if not self._told:
                self._told = True
                self._on_gain()

    async def _free_at(self) -> int | None:
        """Revision on which a new entry may follow, or None while another instance holds the lease."""
        bucket = f"KV_{subjects.BUCKET_LEASES}"
        try:
            entry = await self._bus.js.get_last_msg(bucket, self._subject, direct=True)
        except nats.js.errors.NotFoundError:
            return 0
        if (entry.headers or {}).get("KV-Operation") or entry.data == self._token:
            return entry.seq or 0
        return None

    def _lose(self) -> None:
        self._until = 0.0
        if self._told:
            self._told = False
            self._on_loss()
