"""Turns at a device's cores: engines that share them compute one after the other, none of them waits for long.

An engine's session has as many threads as its worker may use. Two that run at once on the same cores are slower than
one after the other (measured on 2 cores, two processes of two threads each: 140 tokens/s; taking turns: 186), so no
more run at a time than the cores hold. Advisory file locks keep the order: the kernel gives up those of a process that
dies, and one who has just had a turn stands behind whoever waits at the turnstile.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

CONTENDED_S = 1.0
"""After having had to wait, others are taken to want the device for this long."""


class Gate(Protocol):
    """Held while a step computes."""

    @property
    def contended(self) -> bool:
        """Others want the device as well."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Open:
    """No one to share with."""

    contended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class Turnstile:
    """At most `places` of the engines that share `folder` compute at a time."""

    def __init__(self, folder: Path, places: int, timer: Callable[[], float] = time.monotonic) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._turnstile = _opened(folder / "turnstile")
        self._places = [_opened(folder / f"place-{index}") for index in range(places)]
        self._timer = timer
        self._held = -1
        self._waited_at = -CONTENDED_S

    @property
    def contended(self) -> bool:
        return self._timer() - self._waited_at < CONTENDED_S

    def __enter__(self) -> Self:
        waited = not _try(self._turnstile)
        if waited:
            fcntl.flock(self._turnstile, fcntl.LOCK_EX)
        try:
            self._held = next((place for place in self._places if _try(place)), -1)
            if self._held < 0:
                waited = True
                self._held = self._places[os.getpid() % len(self._places)]
                fcntl.flock(self._held, fcntl.LOCK_EX)
        finally:
            fcntl.flock(self._turnstile, fcntl.LOCK_UN)
        if waited:
            self._waited_at = self._timer()
        return self

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._held, fcntl.LOCK_UN)
        self._held = -1

    def close(self) -> None:
        for handle in (self._turnstile, *self._places):
            with contextlib.suppress(OSError):
                os.close(handle)


def host_gate(cores: int, threads: int) -> Gate:
    """The gate of all engines of this user on this host that run `threads` threads each."""
    places = max(1, cores // threads)
    folder = Path(tempfile.gettempdir()) / f"calm-{os.getuid()}" / f"turns-{cores}-{threads}"
    try:
        return Turnstile(folder, places)
    except OSError:  # nowhere to write
        return Open()


def _opened(path: Path) -> int:
    return os.open(path, os.O_CREAT | os.O_RDWR, 0o600)


def _try(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
