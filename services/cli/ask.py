"""`calm ask`: streams the answer, then says who gave it, why, how fast and at what energy."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import uuid

import msgspec
import nats.errors
from nats.aio.msg import Msg

from services.cli.options import PREFERENCES
from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.errors import BusUnavailable, InvalidQuery
from shared.settings import Settings

Reply = m.Answer | m.Failure | m.Chunk


def expected(what: str | None) -> m.Expect | None:
    """What `--expect` says, such as `choice:A,B,C`.

    Raises:
        InvalidQuery: it says none of the kinds.
    """
    if what is None:
        return None
    kind, _, rest = what.partition(":")
    words = [word.strip() for word in rest.split(",") if word.strip()]
    fields = {"choice": {"of": words}, "json": {"keys": words}, "contains": {"any_of": words}, "number": {}}
    try:
        return msgspec.convert({"kind": kind, **fields.get(kind, {})}, m.Expect)  # type: ignore[no-any-return]
    except msgspec.ValidationError:
        raise InvalidQuery(
            f"`--expect {what}` is not understood.",
            "Write choice:A,B,C (two or more), number, json, json:KEY,KEY or contains:TEXT,TEXT.",
        ) from None


def query_of(arguments: argparse.Namespace, prompt: str, query_id: str) -> m.Query:
    """The query that the options describe."""
    weights = PREFERENCES.get(arguments.prefer or "", (None, None, None))
    system = [m.ChatMessage(role="system", content=arguments.system)] if arguments.system else []
    messages = [*system, m.ChatMessage(role="user", content=prompt)] if system else None
    return m.Query(
        id=query_id,
        prompt=None if messages else prompt,
        messages=messages,
        stream=not arguments.no_stream,
        model=arguments.model,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        priority="lo" if arguments.low_priority else "hi",
        deadline_s=arguments.deadline,
        constraints=m.Constraints(
            tags=arguments.tag,
            min_quality=arguments.min_quality,
            max_latency_s=arguments.max_latency,
            max_energy_j=arguments.max_energy,
        ),
        preference=m.Preference(quality=weights[0], latency=weights[1], energy=weights[2]),
        expect=expected(arguments.expect),
        retries=arguments.retries,
        cascade=arguments.cascade,
    )


def summary(answer: m.Answer, first_s: float | None, total_s: float) -> str:
    """What to say about an answer, for people."""
    out, times = answer.usage.tokens_out, answer.timings
    speed = (out - 1) / times.decode_s if out > 1 and times.decode_s > 0 else 0.0
    first = f"first token {first_s:.2f} s, " if first_s is not None else ""
    estimated = " (estimated)" if answer.energy.estimated else ""
    waited = "".join(
        f", waited {seconds:.2f} s for {what}"
        for what, seconds in (
            ("the model to load", times.load_s),
            ("a slot", times.queue_s),
            ("other attempts", times.retried_s),
        )
        if seconds >= 0.05
    )
    said = read(answer) + others(answer) + answer.why
    return (
        f"{answer.model} on {answer.worker}: {first}{total_s:.2f} s in all, {out} tokens, {speed:.0f} tokens/s, "
        f"{answer.energy.joules:.1f} J{estimated}{waited}\n{said}\nquery {answer.id}"
    )


def read(answer: m.Answer) -> str:
    """A line on what was read in an answer; empty when nothing was expected of it."""
    if answer.reading is None:
        return ""
    how = answer.reading.why.replace("_", " ")
    return f"read: {answer.reading.value} ({how})\n" if answer.reading.value is not None else f"not readable: {how}\n"


def others(answer: m.Answer) -> str:
    """A line on how likely the answer is right and on those that were passed over; empty where neither is known."""
    sure = "" if answer.chance is None else f"right with a chance of {answer.chance:.2f}"
    passed = ", ".join(
        f"{one.model} ({one.why.replace('_', ' ')}{'' if one.chance is None else f', {one.chance:.2f}'})"
        for one in answer.passed_over
    )
    said = "; ".join(part for part in (sure, passed and f"passed over: {passed}") if part)
    return f"{said}\n" if said else ""


async def ask(arguments: argparse.Namespace, settings: Settings) -> int:
    """Ask, print, and give the exit status: 0 for an answer, 1 for a typed error."""
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    query = query_of(arguments, prompt, uuid.uuid4().hex)
    bus = await Bus.connect(settings, "calm-ask", wait=False)
    replies: asyncio.Queue[Reply | None] = asyncio.Queue()

    async def on_reply(message: Msg) -> None:
        if (message.headers or {}).get("Status") == "503":
            replies.put_nowait(None)
        else:
            replies.put_nowait(codec.from_json(message.data, Reply))  # type: ignore[arg-type]

    try:
        inbox = bus.nc.new_inbox()
        await bus.subscribe(inbox, on_reply)
        began = time.perf_counter()
        try:
            await bus.nc.publish(subjects.QUERY, codec.to_json(query), reply=inbox)
        except nats.errors.MaxPayloadError:
            raise BusUnavailable(
                f"The prompt is larger than the server's {bus.nc.max_payload} bytes.", "Shorten it."
            ) from None
        return await _show(replies, began, arguments)
    except (KeyboardInterrupt, asyncio.CancelledError):
        await bus.nc.publish(subjects.cancel(query.id or ""), b"")
        raise
    finally:
        await bus.close()


async def _show(replies: asyncio.Queue[Reply | None], began: float, arguments: argparse.Namespace) -> int:
    quiet = arguments.json
    first_s: float | None = None
    attempt = 0
    while True:
        async with asyncio.timeout(arguments.deadline + 5):
            reply = await replies.get()
        if reply is None:
            raise BusUnavailable("A NATS server answers, but CALM is not running on it.", "Start it: calm up")
        if isinstance(reply, m.Chunk):
            if reply.restarted and not quiet:
                print("\n[starting over with another model or worker]")
            if first_s is None or reply.restarted:
                first_s = time.perf_counter() - began
            attempt = reply.attempt
            if not quiet:
                print(reply.text, end="", flush=True)
        elif isinstance(reply, m.Answer):
            if quiet:
                print(codec.to_json(reply).decode())
            else:
                if first_s is not None and reply.attempt < attempt:
                    print("\n[nothing better came in time: the answer before]")
                print(reply.text if first_s is None or reply.attempt < attempt else "")
                print(f"\n{summary(reply, first_s, time.perf_counter() - began)}", file=sys.stderr)
            return 0
        else:
            print(codec.to_json(reply).decode() if quiet else f"calm: {reply.message} {reply.remedy}", file=sys.stderr)
            return 1
