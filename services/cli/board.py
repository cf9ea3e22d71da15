"""The status lines of `calm up`: a live table on a terminal, a line per change otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from services.cli.supervise import Supervised
from shared import messages as m

STALE_S = 3.5
"""A service that has said nothing for this long is shown as silent."""


class Board:
    """What each service last said of itself, by process id."""

    def __init__(self, children: Sequence[Supervised], url: str) -> None:
        self._children = children
        self._url = url
        self._beats: dict[int, tuple[float, m.Heartbeat]] = {}
        self._shown: dict[str, str] = {}
        self._console = Console()
        self._live: Live | None = None

    def start(self) -> None:
        if sys.stdout.isatty():
            self._live = Live(console=self._console, refresh_per_second=4, get_renderable=self._table)
            self._live.start()

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """A line for people, above the table."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def heard(self, beat: m.Heartbeat) -> None:
        self._beats[beat.pid] = (time.monotonic(), beat)
        if self._live is None:
            self._print_changes()

    def state(self, child: Supervised) -> str:
        if not child.running:
            return "not running"
        at, beat = self._beats.get(child.pid, (0.0, None))
        if beat is None:
            return "starting"
        return beat.state if time.monotonic() - at < STALE_S else "silent"

    def detail(self, child: Supervised) -> str:
        """What it last said of itself."""
        _, beat = self._beats.get(child.pid, (0.0, None))
        return beat.detail if beat is not None else ""

    def all_ready(self) -> bool:
        return all(self.state(child) == "ready" for child in self._children)

    def _print_changes(self) -> None:
        for child in self._children:
            state = self.state(child)
            if self._shown.get(child.name) != state:
                self._shown[child.name] = state
                self.say(f"{child.name:12} {state:12} pid {child.pid}")

    def _table(self) -> Any:
        table = Table(title=f"CALM at {self._url}", title_justify="left", box=None)
        for column in ("service", "state", "pid", "in flight", "handled", "restarts", ""):
            table.add_column(column, justify="right" if column in ("in flight", "handled", "restarts") else "left")
        for child in self._children:
            _, beat = self._beats.get(child.pid, (0.0, m.Heartbeat(service="", instance="", state="starting")))
            table.add_row(
                child.name, self.state(child), str(child.pid), str(beat.in_flight), str(beat.handled),
                str(child.history.restarts), beat.detail,
            )  # fmt: skip
        return table
