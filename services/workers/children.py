"""Engine processes: started, listened to, drained, and ended for certain."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable

import msgspec

from services.workers.protocol import Activity, Command, Drain, Ready, Refused, Report, Start, State
from shared.codec import error_of
from shared.errors import EngineLost, OperationTimeout
from shared.processes import bound_to_parent, send

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Report).decode


class Child:
    """One engine process. `on_state` and `on_end` are called in the supervisor's event loop."""

    def __init__(self, process: asyncio.subprocess.Process, on_state: Callable[[State], None]) -> None:
        self._process = process
        self._on_state = on_state
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.Event()
        self.activity = Activity()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def spawn(cls, start: Start, on_state: Callable[[State], None]) -> Child:
        """Start an engine. It dies with this process, however this process dies."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.workers.engine_main",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
            preexec_fn=bound_to_parent(),
        )
        child = cls(process, on_state)
        await child.tell(start)
        return child

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

    def kill(self, number: int = signal.SIGKILL) -> None:
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
            elif isinstance(report, Ready) and not self.ready.done():
                self.ready.set_result(report)
            elif isinstance(report, Refused) and not self.ready.done():
                self.ready.set_exception(error_of(report.failure))
        code = await self._process.wait()
        if not self.ready.done():
            self.ready.set_exception(
                EngineLost(f"The engine ended with status {code} while loading.", "See the worker's log.")
            )
        self.ready.exception()  # retrieved, in case nobody waits any more
        self.ended.set()
