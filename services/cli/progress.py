"""Progress bars on standard error; plain lines when it is not a terminal."""

from __future__ import annotations

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Bars:
    """Shows the stages of a pull, as `shared.models.pull.Progress`."""

    def __init__(self) -> None:
        self._fancy = sys.stderr.isatty()
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn(),
            console=Console(stderr=True),
        )  # fmt: skip
        self._task: TaskID | None = None
        self._name = ""
        self._began = 0.0
        self._shown = 0.0

    def __enter__(self) -> Self:
        if self._fancy:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        if self._fancy:
            self._progress.stop()

    def stage(self, name: str, total: int | None) -> None:
        self._close()
        self._name, self._began, self._shown = name, time.monotonic(), time.monotonic()
        if self._fancy:
            self._task = self._progress.add_task(name, total=total)
        else:
            print(f"{name} ...", file=sys.stderr, flush=True)

    def advance(self, done: int, total: int | None) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total)
        elif time.monotonic() - self._shown > 2.0:
            self._shown = time.monotonic()
            share = f" of {total / 1e6:.0f}" if total else ""
            print(f"{self._name}: {done / 1e6:.0f}{share} MB", file=sys.stderr, flush=True)

    def _close(self) -> None:
        if self._task is not None:
            task = self._progress.tasks[-1]
            finished = task.total or task.completed or 1
            self._progress.update(self._task, completed=finished, total=finished)
            self._task = None
