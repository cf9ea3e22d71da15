"""The nursery: one process of a host that has imported what engines need, and forks them.

What an engine has after its imports, some 40 MB of interpreter, libraries and tables, its siblings have too, and those
with the same model its tokenizer: forked from one process they share it until they write to it, and each starts in
milliseconds. The nursery has one thread, and opens no session and no device, so that a fork is safe. It serves the
workers of its user that would make the very same engine process (see `cradle.py`), and ends with the last of them; the
engines of a worker that has gone are ended at once.

Workers speak to it over a local socket: a `Birth` with three descriptors (standard input, output, error) is answered by
`Born`, and by `Died` when that engine has ended.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec

from services.workers import lean  # noqa: F401 before anything imports structlog
from shared.models.store import ModelStore
from shared.settings import Settings

LONELY_S = 30.0
"""Without any worker for so long from its start, it ends."""
MESSAGE_BYTES = 2**18
ARENAS = 2
"""Heaps of glibc. By default each thread of an engine gets one of its own, which keeps what was freed in it."""
_M_ARENA_MAX = -8


class Birth(msgspec.Struct, frozen=True, kw_only=True, tag="birth"):
    """Fork an engine with this environment and working folder."""

    environ: dict[str, str]
    folder: str
    model: str = ""
    """The model that it will be told to load, by its name in the store; its tokenizer is read here, and kept as long as
    an engine with it lives."""


class Born(msgspec.Struct, frozen=True, kw_only=True, tag="born"):
    """The engine's process id; 0 when it could not be forked."""

    pid: int


class Died(msgspec.Struct, frozen=True, kw_only=True, tag="died"):
    """`status` is the exit status, or minus the number of the signal that ended it."""

    pid: int
    status: int


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Birth).decode


class Nursery:
    """Serves the workers that connect to a listening socket, until the last has gone."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._workers: dict[socket.socket, dict[int, int]] = {}
        """Of each connection: its engines' process ids, and the descriptors that tell when they end."""
        self._tokenizers: dict[int, Any] = {}
        """Of each engine: the key of its model's tokenizer."""

    def run(self) -> None:
        patience: float | None = LONELY_S
        while ready := self._selector.select(patience):
            key, _ = ready[0]  # one at a time: what it does may close the others
            key.data(key.fileobj)
            if not self._workers:
                return
            patience = None

    def _accept(self, listener: socket.socket) -> None:
        try:
            worker, _ = listener.accept()
        except OSError:
            return
        if not same_user(worker):
            worker.close()
            return
        worker.setblocking(False)
        self._workers[worker] = {}
        self._selector.register(worker, selectors.EVENT_READ, self._hear)

    def _hear(self, worker: socket.socket) -> None:
        try:
            message, descriptors = _receive(worker)
        except OSError:
            message, descriptors = b"", []
        if not message:
            self._part(worker)
            return
        pid, tokenizer = 0, None
        with contextlib.suppress(OSError, msgspec.DecodeError, msgspec.ValidationError):
            birth = _decode(message)
            tokenizer = _read_tokenizer(birth)
            pid = self._fork(birth, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        if pid:
            self._tokenizers[pid] = tokenizer
            life = os.pidfd_open(pid)
            self._workers[worker][pid] = life
            self._selector.register(life, selectors.EVENT_READ, lambda _life: self._bury(worker, pid))
        self._tell(worker, Born(pid=pid))

    def _fork(self, birth: Birth, descriptors: list[int]) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            self._leave(birth, descriptors)
            status = _live()
        finally:
            os._exit(status)

    def _leave(self, birth: Birth, descriptors: list[int]) -> None:
        """In the child: keep nothing that is the nursery's."""
        os.setpgid(0, 0)  # as `shared.processes.own_group`
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        self._selector.close()
        for engines in self._workers.values():
            for life in engines.values():
                os.close(life)
        for held in (self._listener, *self._workers):
            held.close()
        for descriptor in descriptors:
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(birth.environ)
        os.chdir(birth.folder)

    def _bury(self, worker: socket.socket, pid: int) -> None:
        """An engine has ended: tell its worker how."""
        life = self._workers[worker].pop(pid)
        self._selector.unregister(life)
        os.close(life)
        _, status = os.waitpid(pid, 0)
        self._forget(pid)
        self._tell(worker, Died(pid=pid, status=os.waitstatus_to_exitcode(status)))

    def _part(self, worker: socket.socket) -> None:
        """A worker has gone, however it went: its engines go with it."""
        for pid, life in self._workers.pop(worker).items():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._selector.unregister(life)
            os.close(life)
            self._forget(pid)
        self._selector.unregister(worker)
        worker.close()

    def _forget(self, pid: int) -> None:
        tokenizer = self._tokenizers.pop(pid)
        if tokenizer is not None and tokenizer not in self._tokenizers.values():
            _modules().text.drop(tokenizer)
            _modules().loader.give_back()

    def _tell(self, worker: socket.socket, what: Born | Died) -> None:
        with contextlib.suppress(OSError):  # gone: its end of the connection is about to be read
            worker.send(_encode(what))


def _receive(worker: socket.socket) -> tuple[bytes, list[int]]:
    message, descriptors, _, _ = socket.recv_fds(worker, MESSAGE_BYTES, 3)
    return message, descriptors


def _modules() -> Any:
    """The engine's package, which `main` has imported before anybody can ask."""
    return importlib.import_module("services.workers.engine")


def _read_tokenizer(birth: Birth) -> Any:
    """The key of the tokenizer that an engine will need; None when there is none to be had, as the engine will tell."""
    if not birth.model:
        return None
    try:
        store = ModelStore(Settings.from_env(birth.environ).models_path)
        key = _modules().text.keep(store.path(birth.model) / store.get(birth.model).tokenizer.file)
        _modules().loader.give_back()  # reading it takes twice what it keeps
        return key  # noqa: TRY300
    except BaseException:  # noqa: BLE001 panics of the library among them
        return None


def _live() -> int:
    """What an engine process does; its exit status."""
    try:
        importlib.import_module("services.workers.engine_process").main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 as the interpreter would at the end of a program
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    return 0


def same_user(peer: socket.socket) -> bool:
    """Whether the other end of a local connection belongs to the user of this process."""
    return credentials(peer)[1] == os.getuid()


def credentials(peer: socket.socket) -> tuple[int, int]:
    """Process and user of the other end of a local connection."""
    pid, uid, _ = array.array("i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def main() -> None:
    """`python -m services.workers.nursery NAME`: goes on in the background, nobody's child, since it may outlive the
    worker that started it, and returns when it listens under the name, or when the name is taken."""
    listening, listens = os.pipe()
    if os.fork():
        os.close(listens)
        os.read(listening, 1)  # ends with what the other process holds of the pipe
        os._exit(0)
    os.close(listening)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(f"\0{sys.argv[1]}")
    except OSError:
        return  # another worker started one at the same time
    listener.listen(64)  # who connects during the imports waits for their end
    os.close(listens)
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, ARENAS)
    importlib.import_module("services.workers.engine_process")
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        sys.exit("a library has started a thread: engines cannot be forked")
    gc.collect()
    gc.freeze()  # the collector would write to what is to be shared
    Nursery(listener).run()


if __name__ == "__main__":
    main()
