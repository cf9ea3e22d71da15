"""Starts the whole system for a benchmark, as a user would, and stops it again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from shared import messages as m
from shared.bus import Bus
from shared.settings import Settings
from shared.views import FleetView

READY_S = 600.0
"""Includes fetching the models, where they are not in the store yet."""
SETTLE_S = 10.0


async def _settled(url: str) -> None:
    """Wait, `SETTLE_S` at most, until every worker has what it begins with: starting up is measured elsewhere."""
    bus = await Bus.connect(Settings(nats_url=url), "bench")
    changed = asyncio.Event()
    fleet = FleetView(bus, lambda _state: changed.set())
    await fleet.start()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SETTLE_S):
            while not _settled_now(fleet.workers()):
                changed.clear()
                await changed.wait()
    await bus.close()


def _settled_now(workers: list[m.WorkerState]) -> bool:
    return bool(workers) and all(w.engines and all(e.state == "ready" for e in w.engines) for w in workers)


@contextlib.asynccontextmanager
async def running(
    *, workers: int, fleet: str, memory: str = "", home: Path | None = None, http: bool = False
) -> AsyncIterator[str]:
    """`calm up` in a home of its own with the user's model store, and a gateway with `http`; gives the NATS URL once
    the fleet has settled.

    Raises:
        RuntimeError: it did not become ready; holds what it printed.
    """
    store = Settings.from_env().models_path
    folder = home or Path(tempfile.mkdtemp(prefix="calm-bench-"))
    options = ["--port", "0", "--workers", str(workers), "--home", str(folder), "--fleet", fleet]
    options += ["--http", "127.0.0.1:0"] if http else ["--no-http"]
    if memory:
        options += ["--memory", memory]
    environment = {k: v for k, v in os.environ.items() if k != "CALM_NATS_URL"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.cli", "up", *options,
        env={**environment, "CALM_MODELS_DIR": str(store)}, stdout=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    printed: list[str] = []
    ready = asyncio.Event()

    async def read() -> None:
        assert process.stdout is not None
        async for raw in process.stdout:
            printed.append(raw.decode().rstrip())
            if printed[-1].startswith("ready:"):
                ready.set()
        ready.set()

    reader = asyncio.create_task(read())
    try:
        async with asyncio.timeout(READY_S):
            await ready.wait()
        if process.returncode is not None:
            raise RuntimeError("calm up did not start: " + " | ".join(printed[-5:]))
        url = (folder / "run" / "nats_url").read_text().strip()
        await _settled(url)
        yield url
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
            await asyncio.wait_for(process.wait(), 60)
        reader.cancel()
        if home is None:
            shutil.rmtree(folder, ignore_errors=True)
