"""Runs one service as a child process: logs to a file, restarts it when it dies, ends it for certain."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from services.cli.decide import History, after_end
from shared.processes import bound_to_parent, send


class Supervised:
    """One service process that should always be running, until `stop`."""

    def __init__(
        self, name: str, module: str, environment: dict[str, str], log: Path, say: Callable[[str], None]
    ) -> None:
        self.name = name
        self._module = module
        self._environment = environment
        self._log = log
        self._say = say
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.history = History()

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def start(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        if self._log.exists():
            self._log.replace(self._log.with_suffix(".log.1"))
        self._task = asyncio.create_task(self._keep_running())

    async def stop(self, timeout_s: float) -> None:
        """SIGTERM, and SIGKILL when it has not ended within `timeout_s`."""
        self._stopping.set()
        if self._process is not None and self.running:
            self._signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(timeout_s):
                    await self._process.wait()
            except TimeoutError:
                self._say(f"{self.name} did not stop within {timeout_s:.0f} s and is killed")
                self.kill()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    def kill(self) -> None:
        self._stopping.set()
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._process is not None:
            send(self._process, number)

    async def _keep_running(self) -> None:
        while not self._stopping.is_set():
            began = time.monotonic()
            with self._log.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", self._module, env=self._environment,
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=bound_to_parent,
                )  # fmt: skip
            code = await self._process.wait()
            if self._stopping.is_set():
                return
            wait_s, self.history = after_end(self.history, time.monotonic() - began)
            self._say(f"{self.name} ended with status {code}; starting it again in {wait_s:.1f} s (see {self._log})")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._stopping.wait()
