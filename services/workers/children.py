"""Engine processes: started, listened to, drained, and ended for certain."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable

import msgspec
import psutil

from services.workers.cradle import Cradle, Forked
from services.workers.engine_main import BACKGROUND
from services.workers.protocol import Activity, Command, Drain, Parked, Ready, Refused, Report, Start, State
from shared.codec import error_of
from shared.errors import EngineLost, OperationTimeout
from shared.processes import bound_to_parent, send

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Report).decode


def _nobody(_state: State) -> None:
    return None


class Child:
    """One engine process. What listens to its states is called in the supervisor's event loop."""

    def __init__(self, process: asyncio.subprocess.Process | Forked) -> None:
        self._process = process
        self._on_state: Callable[[State], None] = _nobody
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self.parked: asyncio.Future[Parked] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.Event()
        self.activity = Activity()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def fork(cls, cradle: Cradle, model: str = "") -> Child:
        """Have the nursery fork an engine process, which waits to be told what to load. It dies with this process too.

        Raises:
            NotReady: the nursery cannot be had.
        """
        return cls(await cradle.fork(model))

    @classmethod
    async def spawn(cls, *, background: bool = False) -> Child:
        """Start an engine process, which waits to be told what to load. It dies with this process, however this
        process dies. In the background it starts only as fast as others leave the processors to it."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.workers.engine_main",
            *([BACKGROUND] if background else []),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            preexec_fn=bound_to_parent,
        )
        return cls(process)

    async def start(self, start: Start, on_state: Callable[[State], None]) -> None:
        """Have it load an artifact, or, when it is parked, serve that artifact again."""
        self._on_state = on_state
        if self.parked.done():
            loop = asyncio.get_running_loop()
            self.ready, self.parked = loop.create_future(), loop.create_future()
        await self.tell(start)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    async def tell(self, command: Command) -> None:
        """Send a command; an engine that has ended does not hear it."""
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError, RuntimeError):
            self._process.stdin.write(_encode(command) + b"\n")
            await self._process.stdin.drain()

    async def wait_ready(self, timeout_s: float) -> Ready:
        """Wait until the model is loaded.

        Raises:
            OperationTimeout: not within `timeout_s`.
            EngineLost: the process ended first.
            CalmError: what the engine itself refused with.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self.ready)
        except TimeoutError:
            raise OperationTimeout(f"The engine was not ready within {timeout_s:.0f} s.", "") from None

    async def drain(self, timeout_s: float) -> None:
        """Let it finish, then end it: SIGTERM and SIGKILL when it does not end by itself."""
        await self.tell(Drain(timeout_s=timeout_s))
        for patience_s, number in ((timeout_s + 3.0, signal.SIGTERM), (2.0, signal.SIGKILL), (5.0, None)):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    await self.ended.wait()
                    return
            if number is not None:
                self.kill(number)

    async def park(self, timeout_s: float) -> int:
        """Let it finish, and keep its model without a KV cache; the bytes that it still holds.

        Raises:
            OperationTimeout, EngineLost: it did not get there, and is to be ended.
        """
        await self.tell(Drain(timeout_s=timeout_s, park=True))
        try:
            async with asyncio.timeout(timeout_s + 3.0):
                return (await asyncio.shield(self.parked)).measured_bytes
        except TimeoutError:
            raise OperationTimeout("The engine did not become a standby in time.", "") from None

    def memory_bytes(self) -> int:
        """Measured memory of the process, its part of what it shares included; 0 once it has ended."""
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return 0
            return int(getattr(process.memory_full_info(), "pss", 0) or process.memory_info().rss)
        except psutil.Error:
            return 0

    def kill(self, number: int = signal.SIGKILL) -> None:
        if isinstance(self._process, Forked):
            self._process.kill(number)
        else:
            send(self._process, number)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            try:
                report = _decode(line)
            except (msgspec.ValidationError, msgspec.DecodeError):
                continue  # a library that prints to standard output
            if isinstance(report, Activity):
                self.activity = report
            elif isinstance(report, State):
                self._on_state(report)
            elif isinstance(report, Parked) and not self.parked.done():
                self.parked.set_result(report)
            elif isinstance(report, Ready) and not self.ready.done():
                self.ready.set_result(report)
            elif isinstance(report, Refused) and not self.ready.done():
                self.ready.set_exception(error_of(report.failure))
        code = await self._process.wait()
        if not self.ready.done():
            self.ready.set_exception(
                EngineLost(f"The engine ended with status {code} while loading.", "See the worker's log.")
            )
        if not self.parked.done():
            self.parked.set_exception(EngineLost(f"The engine ended with status {code}.", "See the worker's log."))
        self.ready.exception(), self.parked.exception()  # retrieved, in case nobody waits any more
        self.ended.set()
