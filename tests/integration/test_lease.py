"""Leases against a real nats-server."""

from __future__ import annotations

import asyncio

from shared.broker import Broker
from shared.bus import Bus
from shared.lease import Lease
from shared.settings import Settings


class _Holder:
    """A lease with an event for each gain and loss."""

    def __init__(self, bus: Bus, instance: str) -> None:
        self.gained = asyncio.Event()
        self.lost = asyncio.Event()
        self.lease = Lease(bus, "knowledge", instance, on_gain=self.gained.set, on_loss=self.lost.set)


async def test_one_of_two_holds_the_lease_and_the_other_follows_a_release(bus: Bus) -> None:
    """The second replica gets the lease when the first releases it, and never while that holds it."""
    first, second = _Holder(bus, "a"), _Holder(bus, "b")
    await first.lease.start()
    assert first.lease.held
    assert first.gained.is_set()
    await second.lease.start()
    assert not second.lease.held
    await first.lease.stop()
    assert first.lost.is_set()
    assert not first.lease.held
    async with asyncio.timeout(10):
        await second.gained.wait()
    assert second.lease.held
    await second.lease.stop()


async def test_a_dead_holder_is_followed_after_its_lease_has_run_out(bus: Bus, settings: Settings) -> None:
    """A holder whose connection is gone stops to hold before another gains."""
    other = await Bus.connect(settings, "doomed")
    first, second = _Holder(other, "a"), _Holder(bus, "b")
    await first.lease.start()
    await second.lease.start()
    await other.nc.close()
    async with asyncio.timeout(15):
        await second.gained.wait()
    assert not first.lease.held
    async with asyncio.timeout(5):
        await first.lost.wait()
    await second.lease.stop()
    await first.lease.stop()


async def test_a_holder_keeps_the_lease_while_nobody_interferes(bus: Bus) -> None:
    """Refreshing outlives the time to live of the entry."""
    holder, rival = _Holder(bus, "a"), _Holder(bus, "b")
    await holder.lease.start()
    await rival.lease.start()
    refreshed = asyncio.Queue[bytes]()

    async def on_refresh(message: object) -> None:
        refreshed.put_nowait(b"")

    await bus.subscribe("$KV.calm_leases.knowledge", on_refresh)
    async with asyncio.timeout(20):
        for _ in range(5):
            await refreshed.get()
    assert holder.lease.held
    assert not holder.lost.is_set()
    assert not rival.lease.held
    await rival.lease.stop()
    await holder.lease.stop()


async def test_a_broker_that_lost_the_bucket_gives_the_lease_to_one_again(
    bus: Bus, broker: Broker, settings: Settings
) -> None:
    """After a broker restart (leases are in its memory) exactly one instance holds the lease again."""
    other = await Bus.connect(settings, "other")
    first, second = _Holder(bus, "a"), _Holder(other, "b")
    await first.lease.start()
    await second.lease.start()
    await broker.kill()
    first.gained.clear()
    again = await Broker.start(settings.home / "nats", port=broker.port)
    try:
        async with asyncio.timeout(25):
            waits = {asyncio.create_task(h.gained.wait()) for h in (first, second)}
            _, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        assert first.lease.held != second.lease.held
        await first.lease.stop()
        await second.lease.stop()
        await other.close()
    finally:
        await again.stop()
