"""Connection to NATS: connects and reconnects without giving up, publishes durably, claims, asks, answers."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar, cast

import msgspec
import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext

from shared import access, codec, streams, subjects, tasks
from shared import messages as m
from shared.durable import Ack, Durable
from shared.errors import BusUnavailable, Overloaded
from shared.settings import Settings

T = TypeVar("T")
Handler = Callable[[Msg], Awaitable[None]]

_WRONG_LAST_SEQUENCE = 10071
_QUEUE_FULL = 10077
JOURNAL_AFTER_S = 0.03
_RETRY_S = 0.25
_ACK_S = 5.0
_REHEARSALS = 64


class Log(Protocol):
    """What the bus needs of a logger."""

    def info(self, event: str, **fields: Any) -> Any: ...
    def warning(self, event: str, **fields: Any) -> Any: ...


class Bus:
    """One NATS connection of one process. Make it with `connect`."""

    def __init__(self, nc: Client, log: Log | None) -> None:
        self.nc = nc
        self.js: JetStreamContext = nc.jetstream(timeout=_ACK_S)
        self._durable = Durable(nc, _ACK_S)
        self._log = log
        self._on_reconnect: list[Callable[[], None]] = []
        self._ensuring: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, settings: Settings, name: str, log: Log | None = None, *, wait: bool = True) -> Bus:
        """Connect; with `wait`, keep trying until a server is there.

        Raises:
            BusUnavailable: no server, when not told to wait.
        """
        nc = Client()
        bus = cls(nc, log)
        waiting = False

        async def on_error(error: Exception) -> None:
            nonlocal waiting
            if log and not nc.is_connected and not waiting:
                waiting = True
                log.warning("waiting_for_broker", url=access.without_password(settings.nats_url), error=str(error))
            elif log and nc.is_connected:
                log.warning("bus_error", error=str(error) or type(error).__name__)

        async def on_reconnect() -> None:
            nonlocal waiting
            waiting = False
            if log:
                log.info("broker_reconnected")
            # A broker that came back without its memory has lost the buckets; our own subscriptions would hide it.
            bus._ensuring = asyncio.create_task(bus.ensure())
            for callback in bus._on_reconnect:
                callback()

        options = access.options(settings)
        try:
            await nc.connect(
                servers=[url.strip() for url in settings.nats_url.split(",")],
                name=name,
                error_cb=on_error,
                reconnected_cb=on_reconnect,
                max_reconnect_attempts=-1 if wait else 1,
                reconnect_time_wait=_RETRY_S,  # type: ignore[arg-type]
                allow_reconnect=wait,
                connect_timeout=2,
                ping_interval=5,
                inbox_prefix=settings.nats_inbox.encode(),
                **options,
            )
        except (TimeoutError, OSError, nats.errors.Error) as error:
            # Refused half way: the library leaves the connection open, and its `close` waits for ever.
            if nc._transport is not None:
                nc._transport.close()  # type: ignore[no-untyped-call]
            raise access.unavailable(settings, error) from None
        if settings.encrypted and nc._server_info.get("tls_required") is not True:
            await nc.close()
            url = access.without_password(settings.nats_url)
            raise BusUnavailable(
                f"`tls://` was asked for, and the NATS server at {url} does not encrypt.",
                "Give the server a `tls` section (docs/security.md), or write `nats://` in CALM_NATS_URL.",
            )
        await bus._durable.start()
        return bus

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call back after every reconnection (with the broker's memory buckets possibly empty)."""
        self._on_reconnect.append(callback)

    async def ensure(self) -> None:
        """Create streams and buckets, waiting for JetStream to be ready."""
        while True:
            try:
                await streams.ensure(self.js)
            except (TimeoutError, nats.errors.Error) as error:
                if self._log:
                    self._log.warning("waiting_for_jetstream", error=str(error) or type(error).__name__)
                await asyncio.sleep(_RETRY_S)  # no event announces that JetStream is up
            else:
                return

    async def rehearse(self) -> None:
        """Send some messages to ourselves, so that the first query does not find the code that carries it cold."""
        inbox, arrived = self.nc.new_inbox(), asyncio.Event()
        left = _REHEARSALS

        async def on_message(_message: Msg) -> None:
            nonlocal left
            left -= 1
            if not left:
                arrived.set()

        subscription = await self.nc.subscribe(inbox, cb=on_message)
        for _ in range(_REHEARSALS):
            await self.nc.publish(inbox, bytes(2048), headers={"Nats-Msg-Id": "rehearsal"})
            await asyncio.sleep(0)
        with contextlib.suppress(TimeoutError, nats.errors.Error):
            await asyncio.wait_for(arrived.wait(), 1)
            await subscription.unsubscribe()

    async def close(self) -> None:
        """Flush what is buffered and close, within 2 s."""
        await tasks.end([self._ensuring])
        with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError, OSError):
            await asyncio.wait_for(self.nc.flush(), 2)
        with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError, OSError):
            await asyncio.wait_for(self.nc.close(), 2)

    # --- sending ---

    async def publish(self, subject: str, message: msgspec.Struct, *, msg_id: str = "") -> int:
        """Publish durably and return the stream sequence; retried until the broker has it.

        With `msg_id` the broker drops repetitions, so a retry never doubles.

        Raises:
            Overloaded: the queue behind the subject is full.
            BusUnavailable: no stream takes the subject.
        """
        headers = {"Nats-Msg-Id": msg_id or uuid.uuid4().hex}
        return (await self._publish(subject, codec.pack(message), headers)).seq

    async def journal(self, subject: str, message: msgspec.Struct, *, msg_id: str) -> None:
        """Publish durably what nobody waits for: a moment later, out of the way of the stages that now work on the
        query it is about."""
        await asyncio.sleep(JOURNAL_AFTER_S)
        await self.publish(subject, message, msg_id=msg_id)

    async def publish_new(self, subject: str, message: msgspec.Struct, *, msg_id: str) -> bool:
        """Publish durably; False when the broker has that message id from an earlier call and dropped this one.

        Raises:
            Overloaded: the queue behind the subject is full.
        """
        return not (await self._publish(subject, codec.pack(message), {"Nats-Msg-Id": msg_id})).duplicate

    async def _publish(self, subject: str, data: bytes, headers: dict[str, str]) -> Ack:
        repeated = False
        while True:
            try:
                ack = await self._durable.publish(subject, data, headers)
            except nats.js.errors.NoStreamResponseError:
                await self.ensure()
            except (nats.errors.TimeoutError, nats.errors.OutboundBufferLimitError,
                    nats.js.errors.ServiceUnavailableError, nats.errors.ConnectionReconnectingError):  # fmt: skip
                repeated = True
                await asyncio.sleep(_RETRY_S)  # the broker is away; the message id makes the retry harmless
            except nats.js.errors.APIError as error:
                if error.err_code == _QUEUE_FULL:
                    raise Overloaded("The queue is full.", "Try again later, or add workers.") from None
                raise
            else:
                if repeated:
                    ack.duplicate = False  # the earlier copy may be our own, with its acknowledgement lost
                return ack

    async def claim(self, done: m.Done) -> bool:
        """Record how a query ended, unless that is already recorded. True when this call was the first.

        The broker accepts one message per `calm.done.<query_id>.<inbox>`: the one claim that wins is the one
        final answer, and the broker hands it to the client. A claim repeated because its acknowledgement was lost is
        still won.
        """
        headers = {
            "Nats-Expected-Last-Subject-Sequence": "0",
            "Nats-Msg-Id": f"{done.query_id}-done-{uuid.uuid4().hex}",
        }
        data, record = codec.pack_done(done)
        try:
            await self._publish(subjects.done(done.query_id, done.reply), data, {**headers, **record})
        except nats.js.errors.APIError as error:
            if error.err_code == _WRONG_LAST_SEQUENCE:
                return False
            raise
        return True

    async def claimed(self, query_id: str) -> m.Done | None:
        """How a query ended, or None while it has not."""
        try:
            raw = await self.js.get_last_msg(subjects.STREAM_DONE, subjects.done_of(query_id))
        except nats.js.errors.NotFoundError:
            return None
        return codec.unpack_done(raw.data or b"", raw.headers)

    async def finish(self, done: m.Done, *, resend: bool = False, chunk: m.Chunk | None = None) -> bool:
        """Claim the end of a query, behind the last `chunk` of its text if there is one. The broker hands the claim
        that wins to the client; to reply subjects that are no NATS client's inbox it is sent from here.

        With `resend` (the input was delivered before, so an earlier holder may have died between
        claiming and sending) the recorded end is sent again from here: the same message, never another one.
        """
        if chunk is not None and done.reply:
            await self.reply(done.reply, chunk, done.encoding)
        won = await self.claim(done)
        final = done if won else (await self.claimed(done.query_id) if resend else None)
        if final is not None:
            await self.deliver(final)
        return won

    async def deliver(self, done: m.Done) -> None:
        """Send a recorded end to its client, unless the broker did so when it stored it."""
        message = done.answer or done.failure
        if message is not None and done.reply and not subjects.delivered_by_broker(done.reply):
            await self.reply(done.reply, message, done.encoding)

    async def reply(self, inbox: str, message: msgspec.Struct, encoding: str) -> None:
        """Send a public message to a client's inbox."""
        await self.nc.publish(inbox, codec.encode_public(message, encoding))

    async def send(self, subject: str, message: msgspec.Struct) -> None:
        """Publish without acknowledgement (telemetry, symptoms)."""
        with contextlib.suppress(nats.errors.OutboundBufferLimitError, nats.errors.ConnectionClosedError):
            await self.nc.publish(subject, codec.pack(message))

    async def dead(self, subject: str, payload: bytes, reason: str, *, service: str, at: float) -> None:
        """Keep a message that was given up in `calm.dead`."""
        await self.publish(
            subjects.DEAD, m.Dead(subject=subject, reason=reason, payload=payload, service=service, at=at)
        )

    async def ask(self, subject: str, message: msgspec.Struct, kind: type[T], timeout_s: float) -> T:
        """Request and reply between services (MessagePack). `kind` is a message type of the catalogue.

        Raises:
            BusUnavailable: nobody listens, or no reply within `timeout_s`.
            CalmError: the other side answered with a Failure; the class is the one that its code names.
        """
        try:
            reply = await self.nc.request(subject, codec.pack(message), timeout=timeout_s)
        except nats.errors.NoRespondersError:
            raise BusUnavailable(f"Nobody listens on {subject}.", "Is the system up? See `calm up`.") from None
        except (TimeoutError, nats.errors.TimeoutError):
            raise BusUnavailable(f"No reply on {subject} within {timeout_s:g} s.", "See `calm status`.") from None
        answer: T | m.Failure = codec.unpack(reply.data, cast("type[T]", kind | m.Failure))
        if isinstance(answer, m.Failure) and kind is not m.Failure:
            raise codec.error_of(answer)
        return cast("T", answer)

    # --- receiving ---

    async def subscribe(self, subject: str, handler: Handler, queue: str = "") -> Subscription:
        """Call `handler` for each message, in order and one at a time."""
        return await self.nc.subscribe(subject, queue=queue, cb=handler)

    async def kv_all(self, bucket: str) -> dict[str, bytes]:
        """Every live key of a bucket with its value."""
        prefix = subjects.kv(bucket, "")
        info = await self.js.stream_info(f"KV_{bucket}", subjects_filter=f"{prefix}>")
        values: dict[str, bytes] = {}
        for subject in info.state.subjects or {}:
            with contextlib.suppress(nats.js.errors.NotFoundError):  # expired meanwhile
                raw = await self.js.get_last_msg(f"KV_{bucket}", subject, direct=True)
                if not (raw.headers or {}).get("KV-Operation"):
                    values[subject.removeprefix(prefix)] = raw.data or b""
        return values

    async def kv_put(self, bucket: str, key: str, message: msgspec.Struct) -> None:
        await self._durable.publish(subjects.kv(bucket, key), codec.pack(message), {})
