"""One worker for a GPU: each would count all of its energy and promise most of its memory."""

from __future__ import annotations

import asyncio
import contextlib

from shared import subjects
from shared.bus import Bus
from shared.errors import DeviceUnavailable
from shared.lease import REFRESH_S, Lease
from shared.messages import Device
from shared.settings import slug
from shared.streams import LIVENESS_S

WAIT_S = LIVENESS_S + 2 * REFRESH_S
"""A worker that was killed holds its device so long after its end; the one that takes its place waits for that."""


async def claim(bus: Bus, device: Device, worker: str, *, wait_s: float = WAIT_S) -> Lease | None:
    """Claim a GPU for `worker`, to be released by `Lease.stop`; None for a CPU, which workers share by turns.

    Slices of a GPU (MIG) are devices of their own. GPUs are told apart by their UUIDs, whatever host or container.

    Raises:
        DeviceUnavailable: another worker of the fleet has it.
    """
    if device.kind != "cuda" or not device.uuid:
        return None
    gained = asyncio.Event()
    lease = Lease(bus, subjects.lease_of_gpu(slug(device.uuid)), worker, on_gain=gained.set)
    await lease.start()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(wait_s):
            await gained.wait()
    if lease.held:
        return lease
    await lease.stop()
    raise DeviceUnavailable(
        f"Another worker of this fleet has {device.name} ({device.uuid}).",
        "One worker serves a GPU, and holds as many models as fit; give each worker a GPU (or MIG slice) of its own by"
        " CALM_DEVICE=cuda:N or CUDA_VISIBLE_DEVICES.",
    )
