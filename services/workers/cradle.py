"""The worker's side of the nursery (`nursery.py`): finds it or starts it, and has engines forked there."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import msgspec

import services
import shared
from services.workers.nursery import MESSAGE_BYTES, Birth, Born, Died, credentials, same_user
from shared.errors import NotReady, SettingsInvalid
from shared.messages import Device
from shared.processes import own_group
from shared.settings import Settings

FIRST_S = 30.0
"""Within this time the nursery has imported everything and forked."""
RETRY_S = 0.02
ATTEMPTS = 3
STDERR = 2
UNKNOWN = 255
"""Exit status of an engine that outlived the nursery."""
INSTEAD = "The engine is started as a process of its own."
FROZEN = ("LD_", "PYTHON", "MALLOC_", "GLIBC_", "OMP_", "OPENBLAS_", "ORT_", "CUDA_")
"""Variables that act when a process starts or imports: engines with others of these come from another nursery."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Born | Died).decode


def possible() -> bool:
    """Whether engines can be forked on this system at all."""
    return sys.platform == "linux" and hasattr(os, "pidfd_open")


def wanted(settings: Settings, device: Device) -> bool:
    """Whether the engines of a worker are to be forked. Never with CUDA: a device belongs to the process that opened
    it, and what a library may have begun by being imported there does not survive a fork.

    Raises:
        SettingsInvalid: `engine_start` is neither `fork` nor `spawn`.
    """
    if settings.engine_start not in ("fork", "spawn"):
        raise SettingsInvalid(f"CALM_ENGINE_START={settings.engine_start!r} is unknown.", "Use `fork` or `spawn`.")
    return settings.engine_start == "fork" and device.kind == "cpu" and possible()


class Forked:
    """An engine forked by the nursery; what `Child` needs of an `asyncio.subprocess.Process`."""

    def __init__(self, pid: int, stdin: asyncio.StreamWriter, stdout: asyncio.StreamReader) -> None:
        self.pid = pid
        self.stdin = stdin
        self.stdout = stdout
        self.returncode: int | None = None
        self._ended = asyncio.Event()
        self._life = -1
        with contextlib.suppress(ProcessLookupError):  # it has ended, and the nursery is about to say so
            self._life = os.pidfd_open(pid)

    async def wait(self) -> int:
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def kill(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self._life >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._life, number)

    def orphan(self) -> None:
        """Nobody will tell how it ends: see by itself that it has."""
        if self._life < 0:
            self.end(UNKNOWN)
        else:
            asyncio.get_running_loop().add_reader(self._life, self.end, UNKNOWN)

    def end(self, status: int) -> None:
        """It has ended."""
        self.returncode = status
        if self._life >= 0:
            asyncio.get_running_loop().remove_reader(self._life)
            os.close(self._life)
            self._life = -1
        self.stdin.close()
        self._ended.set()


class Cradle:
    """A worker's connection to the nursery of its host."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._lock = asyncio.Lock()
        self._born: asyncio.Future[int] | None = None
        self._engines: dict[int, Forked] = {}
        self._early: dict[int, int] = {}
        """Statuses of engines that ended before they were known here."""

    async def connect(self) -> None:
        """Find the nursery, or start it.

        Raises:
            NotReady: there can be none.
        """
        async with self._lock:
            await self._connect()

    async def fork(self, model: str = "") -> Forked:
        """A new engine process that has imported everything and has the tokenizer of `model`, and waits to be told what
        to load.

        Raises:
            NotReady: the nursery cannot be reached, or cannot fork.
        """
        async with self._lock:
            for _ in range(ATTEMPTS):
                await self._connect()
                with contextlib.suppress(ConnectionError):  # it ended with its last worker just then
                    return await self._fork(model)
        raise NotReady("The nursery ends as soon as it is asked.", INSTEAD)

    @property
    def nursery(self) -> int:
        """Process id of the nursery; 0 while there is no connection to one."""
        return credentials(self._socket)[0] if self._socket is not None else 0

    def close(self) -> None:
        """Leave the nursery, which ends what engines are left."""
        self._lose()

    async def _connect(self) -> None:
        if self._socket is None:
            self._socket = await _connected(name())
            asyncio.get_running_loop().add_reader(self._socket, self._hear)

    async def _fork(self, model: str) -> Forked:
        (in_reads, in_writes), (out_reads, out_writes) = os.pipe(), os.pipe()
        try:
            pid = await self._ask(model, [in_reads, out_writes, STDERR])
        except BaseException:
            os.close(in_writes)
            os.close(out_reads)
            raise
        finally:
            os.close(in_reads)
            os.close(out_writes)
        engine = Forked(pid, await _writer(in_writes), await _reader(out_reads))
        self._engines[pid] = engine
        if pid in self._early:
            self._die(pid, self._early.pop(pid))
        elif self._socket is None:
            engine.orphan()
        return engine

    async def _ask(self, model: str, descriptors: list[int]) -> int:
        """Process id of a new engine with these as its standard input, output and error.

        Raises:
            ConnectionError: the nursery has gone.
            NotReady: it does not answer, or cannot fork.
        """
        assert self._socket is not None
        self._born = asyncio.get_running_loop().create_future()
        birth = _encode(Birth(environ=dict(os.environ), folder=str(Path.cwd()), model=model))
        try:
            socket.send_fds(self._socket, [birth], descriptors)
            async with asyncio.timeout(FIRST_S):
                pid = await self._born
        except ConnectionError:
            self._lose()
            raise
        except (OSError, TimeoutError) as error:
            self._lose()
            raise NotReady(f"The nursery does not answer: {error!r}.", INSTEAD) from None
        if not pid:
            raise NotReady("The nursery could not fork an engine.", INSTEAD)
        return pid

    def _hear(self) -> None:
        assert self._socket is not None
        try:
            message = self._socket.recv(MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._lose()
            return
        told = _decode(message)
        if isinstance(told, Died):
            self._die(told.pid, told.status)
        elif self._born is not None and not self._born.done():
            self._born.set_result(told.pid)

    def _die(self, pid: int, status: int) -> None:
        engine = self._engines.pop(pid, None)
        if engine is None:
            self._early[pid] = status
        else:
            engine.end(status)

    def _lose(self) -> None:
        """Without the nursery its engines live on; the next call finds or starts another."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        if self._born is not None and not self._born.done():
            self._born.set_exception(ConnectionError("the nursery has gone"))
        engines, self._engines = self._engines, {}
        for engine in engines.values():
            engine.orphan()


async def _connected(name: str) -> socket.socket:
    """A connection to the nursery of this name, which is started when there is none.

    Raises:
        NotReady: it cannot be had.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        for attempt in range(ATTEMPTS):
            try:
                connection.connect(f"\0{name}")
                break
            except ConnectionRefusedError:
                if attempt + 1 == ATTEMPTS:
                    raise
                await _start(name)
    except (OSError, TimeoutError) as error:
        connection.close()
        raise NotReady(f"The nursery cannot be reached: {error!r}.", INSTEAD) from None
    except BaseException:
        connection.close()
        raise
    if not same_user(connection):
        connection.close()
        raise NotReady("Another user's process has the name of this host's nursery.", INSTEAD)
    connection.setblocking(False)
    return connection


async def _start(name: str) -> None:
    """Start the nursery; it listens when this returns, unless another worker is starting it at the same time."""
    launcher = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.workers.nursery", name,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # it starts threads when it is imported
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, preexec_fn=own_group,
    )  # fmt: skip
    async with asyncio.timeout(FIRST_S):
        await launcher.wait()
    await asyncio.sleep(RETRY_S)  # between another's bind and its listen there is no event to wait for


def name() -> str:
    """Of the nursery whose engines are just those that this process would start itself: the same user, session,
    program and code, the same limits and place in the system."""
    facts: list[object] = [
        os.getuid(), os.getsid(0), sys.executable, sys.path,
        os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0), sorted(os.sched_getaffinity(0)),
        Path("/proc/self/cgroup").read_text(),
        [Path(f"/proc/self/ns/{kind}").readlink() for kind in ("mnt", "pid", "net")],
        sorted((k, v) for k, v in os.environ.items() if k.startswith(FROZEN)),
        Path(sysconfig.get_path("purelib")).stat().st_mtime_ns,
    ]  # fmt: skip
    for package in (services, shared):
        for file in sorted(Path(package.__path__[0]).rglob("*.py")):
            facts.append((str(file), file.stat().st_mtime_ns))
    return f"calm-nursery-{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}"


async def _writer(descriptor: int) -> asyncio.StreamWriter:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.connect_write_pipe(
        lambda: asyncio.streams.FlowControlMixin(loop=loop), os.fdopen(descriptor, "wb", 0)
    )  # fmt: skip
    return asyncio.StreamWriter(transport, protocol, None, loop)


async def _reader(descriptor: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", 0)
    )  # fmt: skip
    return reader
