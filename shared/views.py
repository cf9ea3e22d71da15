"""Live views of the KV buckets, kept by plain subscriptions, which survive a broker restart (watchers do not)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import nats.errors
from nats.aio.msg import Msg

from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.streams import LIVENESS_S


class FleetView:
    """The workers that are alive, as they last described themselves."""

    def __init__(self, bus: Bus, on_change: Callable[[m.WorkerState | None], None] | None = None) -> None:
        self._bus = bus
        self._seen: dict[str, tuple[float, m.WorkerState]] = {}
        self._on_change = on_change or (lambda _state: None)

    async def start(self) -> None:
        """Subscribe, then read what is there already."""
        await self._bus.subscribe(subjects.kv(subjects.BUCKET_FLEET, "worker.>"), self._on_message)
        with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError):
            for data in (await self._bus.kv_all(subjects.BUCKET_FLEET)).values():
                if data:
                    self._put(codec.unpack(data, m.WorkerState))

    async def _on_message(self, message: Msg) -> None:
        if (message.headers or {}).get("KV-Operation") or not message.data:
            worker = message.subject.removeprefix(subjects.kv(subjects.BUCKET_FLEET, "worker."))
            if self._seen.pop(worker, None):
                self._on_change(None)
            return
        self._put(codec.unpack(message.data, m.WorkerState))

    def _put(self, state: m.WorkerState) -> None:
        self._seen[state.worker] = (time.monotonic(), state)
        self._on_change(state)

    def workers(self) -> list[m.WorkerState]:
        """Workers heard of within the last `LIVENESS_S`, by name."""
        limit = time.monotonic() - LIVENESS_S
        for worker in [w for w, (at, _) in self._seen.items() if at < limit]:
            del self._seen[worker]
        return [state for _, (_, state) in sorted(self._seen.items())]

    def worker(self, name: str) -> m.WorkerState | None:
        return next((w for w in self.workers() if w.worker == name), None)


class ModelsView:
    """The cards of the fleet and its policy, as the monitor publishes them."""

    def __init__(self, bus: Bus, on_change: Callable[[], None] | None = None) -> None:
        self._bus = bus
        self._on_change = on_change or (lambda: None)
        self.cards: dict[str, m.Card] = {}
        self.policy: m.Policy | None = None
        self.ready = asyncio.Event()

    async def start(self) -> None:
        await self._bus.subscribe(subjects.kv(subjects.BUCKET_MODELS, ">"), self._on_message)
        for key, data in (await self._bus.kv_all(subjects.BUCKET_MODELS)).items():
            self._put(key, data)

    async def _on_message(self, message: Msg) -> None:
        key = message.subject.removeprefix(subjects.kv(subjects.BUCKET_MODELS, ""))
        self._put(key, b"" if (message.headers or {}).get("KV-Operation") else message.data)

    def _put(self, key: str, data: bytes) -> None:
        if key == subjects.POLICY_KEY:
            self.policy = codec.unpack(data, m.Policy) if data else None
        elif data:
            self.cards[key] = codec.unpack(data, m.Card)
        else:
            self.cards.pop(key, None)
        if self.policy is not None and self.cards:
            self.ready.set()
        self._on_change()


class ControlView:
    """Objectives in force, weights moved and on trial, standings and learned parameters, as planners and monitor tell
    them."""

    def __init__(self, bus: Bus, on_change: Callable[[str], None] | None = None) -> None:
        """`on_change` is called with the key that changed."""
        self._bus = bus
        self._on_change = on_change or (lambda _key: None)
        self.in_force: m.InForce | None = None
        self.moved: m.Moved | None = None
        self.trial: m.Trial | None = None
        self.standings: dict[str, m.CardStanding] = {}
        self.learned: dict[str, tuple[int, bytes]] = {}
        """By name: version and bytes, of the newest version that is complete."""
        self._parts: dict[str, dict[int, m.LearnedPart]] = {}

    async def start(self) -> None:
        """Subscribe, then read what is there already."""
        await self._bus.subscribe(subjects.kv(subjects.BUCKET_CONTROL, ">"), self._on_message)
        for key, data in (await self._bus.kv_all(subjects.BUCKET_CONTROL)).items():
            self._put(key, data)

    async def _on_message(self, message: Msg) -> None:
        key = message.subject.removeprefix(subjects.kv(subjects.BUCKET_CONTROL, ""))
        self._put(key, b"" if (message.headers or {}).get("KV-Operation") else message.data)

    def _put(self, key: str, data: bytes) -> None:
        if key == subjects.OBJECTIVES_KEY:
            self.in_force = codec.unpack(data, m.InForce) if data else None
        elif key == subjects.WEIGHTS_KEY:
            self.moved = codec.unpack(data, m.Moved) if data else None
        elif key == subjects.TRIAL_KEY:
            trial = codec.unpack(data, m.Trial) if data else None
            self.trial = None if trial is None or trial.ended else trial
        elif key.startswith("standing."):
            card = key.removeprefix("standing.")
            if data:
                self.standings[card] = codec.unpack(data, m.CardStanding)
            else:
                self.standings.pop(card, None)
        elif key.startswith("learned.") and data:
            self._join(codec.unpack(data, m.LearnedPart))
        self._on_change(key)

    def _join(self, part: m.LearnedPart) -> None:
        parts = self._parts.setdefault(part.name, {})
        parts[part.index] = part
        whole = [p for p in parts.values() if p.version == part.version]
        if len(whole) == part.count:
            data = b"".join(p.data for p in sorted(whole, key=lambda p: p.index))
            self.learned[part.name] = (part.version, data)
