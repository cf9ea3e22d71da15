"""`calm up`: the whole system on this machine, supervised, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from nats.aio.msg import Msg

from services.cli import packing
from services.cli.board import Board
from services.cli.options import url_file
from services.cli.supervise import Supervised
from shared import codec, listening, subjects
from shared import messages as m
from shared.broker import Broker
from shared.bus import Bus
from shared.errors import BusUnavailable, CalmError, SettingsInvalid, SourceUnavailable
from shared.models import pull
from shared.models.fleet_file import load_fleet
from shared.models.store import ModelStore
from shared.processes import bound_to_parent
from shared.settings import Settings, parse_bytes

STAGES = ("monitor", "analyzer", "planner", "executor")
MARGIN_S = 5.0
"""Beyond its own drain time, a service gets this long to end."""


async def up(arguments: argparse.Namespace, settings: Settings) -> int:
    """Run until SIGINT or SIGTERM; exit status 0 after a clean stop."""
    fleet = arguments.fleet or settings.fleet
    load_fleet(fleet)  # a bad file is told before anything starts
    http = "" if arguments.no_http else arguments.http or settings.http
    if http:
        listening.parse(http)
    if arguments.workers < 1:
        raise SettingsInvalid(f"--workers {arguments.workers} starts no worker.", "Give 1 or more.")
    with _only_one(settings.home):
        external = arguments.nats or (settings.nats_url if "CALM_NATS_URL" in os.environ else "")
        broker = None if external else await _broker(settings.home, arguments.port)
        url = external or (broker.url if broker else "")
        note = url_file(settings.home)
        note.write_text(url)
        try:
            return await _System(arguments, settings, fleet, url, http).run()
        finally:
            note.unlink(missing_ok=True)
            if broker is not None:
                await broker.stop()


async def _broker(home: Path, port: int) -> Broker:
    try:
        return await Broker.start(home / "nats", port=port or -1)
    except BusUnavailable as error:
        raise BusUnavailable(
            f"The NATS server could not start on port {port}: {error.message}",
            "Use --port 0 for a free port, or --nats URL for a server that is running.",
        ) from None


def _hindrance(http: str) -> str:
    """Why there can be no gateway at an address, for people; empty when there can. All else runs without one, too."""
    try:
        listening.bind(*listening.parse(http)).close()
    except SettingsInvalid as error:
        return f"{error} Everything else is started."
    return ""


@contextlib.contextmanager
def _only_one(home: Path) -> Iterator[None]:
    run = home / "run"
    run.mkdir(parents=True, exist_ok=True)
    with (run / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsInvalid(
                f"A CALM system is already running in {home}.", "Use it, or give another --home."
            ) from None
        yield


class _System:
    def __init__(self, arguments: argparse.Namespace, settings: Settings, fleet: str, url: str, http: str) -> None:
        self._settings = settings
        self._fleet = fleet
        self._url = url
        environment = {
            **os.environ,
            "CALM_NATS_URL": url,
            "CALM_HOME": str(settings.home),
            "CALM_MODELS_DIR": str(settings.models_path),
            "CALM_FLEET": fleet,
        }
        logs = settings.home / "logs"
        self._stages = [
            Supervised(name, f"services.{name}", environment, logs / f"{name}.log", self._say) for name in STAGES
        ]
        threads = arguments.threads or settings.threads or max(1, (os.cpu_count() or 1) // arguments.workers)
        self._device = device = arguments.device or settings.device
        memory = str(parse_bytes(arguments.memory)) if arguments.memory else str(settings.worker_memory)
        self._workers = [
            Supervised(
                name,
                "services.workers",
                {
                    **environment,
                    "CALM_WORKER_ID": name,
                    "CALM_THREADS": str(threads),
                    "CALM_DEVICE": device,
                    "CALM_WORKER_MEMORY": memory,
                },
                logs / f"{name}.log",
                self._say,
            )
            for name in (f"worker-{n}" for n in range(1, arguments.workers + 1))
        ]
        self._gateway: Supervised | None = None
        self._no_gateway = _hindrance(http) if http else ""
        if http and not self._no_gateway:
            own = {**environment, "CALM_HTTP": http}
            self._gateway = Supervised("gateway", "services.gateway", own, logs / "gateway.log", self._say)
        self._board = Board(self._children, url)
        self._signals = 0
        self._stop = asyncio.Event()
        self._heard = asyncio.Event()

    @property
    def _children(self) -> list[Supervised]:
        return [*self._stages, *self._workers, *([self._gateway] if self._gateway is not None else [])]

    def _say(self, text: str) -> None:
        self._board.say(text)

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        self._say(f"NATS server at {self._url}, files in {self._settings.home}")
        if self._no_gateway:
            self._say(self._no_gateway)
        for child in self._children:
            child.start()
        failed: CalmError | None = None
        try:
            # The services wait for the models, and start up meanwhile.
            await self._pull()
            if not self._stop.is_set():
                await self._watch()
        except CalmError as error:
            failed = error
        finally:
            await self._shut_down()
        if failed is not None:
            raise failed
        return 0

    async def _pull(self) -> None:
        """Fetch what is missing and pack it for this processor, in processes that Ctrl-C can end."""
        store, fleet = ModelStore(self._settings.models_path), load_fleet(self._fleet)
        if not pull.missing(pull.wanted_by(fleet), store):
            if names := packing.of_fleet(fleet, store):
                await self._run(*packing.command(names))
            return
        self._say(f"fetching the fleet's models into {store.root}")
        if await self._run(sys.executable, "-m", "services.cli", "models", "pull", "--fleet", self._fleet):
            raise SourceUnavailable("The fleet's models could not be fetched (see above).", "Run `calm up` again.")

    async def _run(self, *command: str) -> int:
        """Run a command to its end, or until `calm up` is to stop; its exit status."""
        process = await asyncio.create_subprocess_exec(
            *command, env={**packing.environment(self._settings), "CALM_DEVICE": self._device},
            preexec_fn=bound_to_parent,
        )  # fmt: skip
        await self._unless_stopped(process.wait())
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            return 0
        return process.returncode

    async def _watch(self) -> None:
        bus = await Bus.connect(self._settings_here(), "calm-up")

        async def on_beat(message: Msg) -> None:
            self._board.heard(codec.unpack(message.data, m.Heartbeat))
            self._heard.set()

        try:
            await bus.subscribe(subjects.health("*"), on_beat)
            self._board.start()
            told = False
            while not self._stop.is_set():
                await self._unless_stopped(self._heard.wait())
                self._heard.clear()
                if not told and self._board.all_ready():
                    told = True
                    http = f", or at {self._board.detail(self._gateway)}/v1" if self._gateway is not None else ""
                    self._say(f'ready: ask with `calm ask "..."`{http}, look with `calm status`, stop with Ctrl-C')
        finally:
            self._board.stop()
            await bus.close()

    def _settings_here(self) -> Settings:
        return dataclasses.replace(self._settings, nats_url=self._url)

    async def _unless_stopped(self, awaitable: object) -> None:
        work = asyncio.ensure_future(awaitable)  # type: ignore[call-overload]
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if work.done():
            work.result()
        else:
            work.cancel()

    def _on_signal(self) -> None:
        self._signals += 1
        self._stop.set()
        if self._signals > 1:
            for child in self._children:
                child.kill()

    async def _shut_down(self) -> None:
        """The gateway lets its clients have their answers; workers finish or hand back; the monitor, which records how
        queries ended, goes last."""
        self._say("stopping")
        limit_s = self._settings.drain_s + MARGIN_S
        if self._gateway is not None:
            await self._gateway.stop(limit_s)
        await asyncio.gather(*(worker.stop(limit_s + MARGIN_S) for worker in self._workers))
        for name in ("executor", "planner", "analyzer", "monitor"):
            await next(s for s in self._stages if s.name == name).stop(limit_s)
        self._say("stopped")
