"""`calm feedback` and `calm cancel`."""

from __future__ import annotations

import argparse

import nats.errors

from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.errors import BusUnavailable, InvalidQuery
from shared.settings import Settings


async def feedback(arguments: argparse.Namespace, settings: Settings) -> int:
    """Send a score for an answer."""
    if not 0.0 <= arguments.score <= 1.0:
        raise InvalidQuery(f"A score of {arguments.score:g} is out of range.", "Give 0 (bad) to 1 (good).")
    message = m.Feedback(query_id=arguments.query_id, score=arguments.score, label=arguments.label)
    return await _request(settings, subjects.FEEDBACK, codec.to_json(message), "noted")


async def cancel(arguments: argparse.Namespace, settings: Settings) -> int:
    """Cancel a query."""
    return await _request(settings, subjects.cancel(arguments.query_id), b"", "cancelling")


async def _request(settings: Settings, subject: str, data: bytes, done: str) -> int:
    bus = await Bus.connect(settings, "calm-cli", wait=False)
    try:
        reply = await bus.nc.request(subject, data, timeout=5)
    except nats.errors.NoRespondersError:
        raise BusUnavailable("CALM is not running on this NATS server.", "Start it: calm up") from None
    except TimeoutError:
        raise BusUnavailable("No reply within 5 s.", "See `calm status`.") from None
    finally:
        await bus.close()
    answer = codec.from_json(reply.data, m.Ok | m.Failure)  # type: ignore[arg-type]
    if isinstance(answer, m.Failure):
        raise codec.error_of(answer)
    print(answer.message or done)
    return 0
