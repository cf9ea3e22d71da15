"""`python -m shared.health SERVICE`: exit status 0 when that service, on this host, is ready. For containers."""

from __future__ import annotations

import asyncio
import socket
import sys

from nats.aio.msg import Msg

from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.errors import CalmError
from shared.settings import Settings


async def ready(service: str, settings: Settings, timeout_s: float = 3.0) -> bool:
    """Wait for a heartbeat of `service` from this host that says ready."""
    bus = await Bus.connect(settings, "calm-health", wait=False)
    seen = asyncio.Event()

    async def on_beat(message: Msg) -> None:
        beat = codec.unpack(message.data, m.Heartbeat)
        if beat.host == socket.gethostname() and beat.state == "ready":
            seen.set()

    try:
        await bus.subscribe(subjects.health(service), on_beat)
        async with asyncio.timeout(timeout_s):
            await seen.wait()
    except TimeoutError:
        return False
    finally:
        await bus.close()
    return True


def main() -> None:
    try:
        sys.exit(0 if asyncio.run(ready(sys.argv[1], Settings.from_env())) else 1)
    except CalmError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
