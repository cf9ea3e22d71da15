"""Where in a TOML text each key stands: the standard parser gives values without line numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator

Path = tuple[str | int, ...]
_STEP = re.compile(r"\.([A-Za-z0-9_-]+)|\[(\d+)\]")
_KEY = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'[^']*'|[A-Za-z0-9_-]+)\s*(\.|$)""")


def parse_path(path: str) -> Path:
    """`$.cards[2].quality`, as msgspec writes paths, as `("cards", 2, "quality")`."""
    return tuple(key if key else int(index) for key, index in _STEP.findall(path))


class LineIndex:
    """Lines of tables and keys of a TOML text that is known to parse."""

    def __init__(self, text: str) -> None:
        self._lines: dict[Path, int] = {}
        counts: dict[Path, int] = {}
        table: Path = ()
        for number, line in _logical_lines(text):
            if line.startswith("[["):
                at = _resolve(_keys(line[2:].split("]]")[0]), counts)
                index = counts.get(at, 0)
                counts[at] = index + 1
                table = (*at, index)
                self._lines.setdefault(at, number)
                self._lines[table] = number
            elif line.startswith("["):
                table = _resolve(_keys(line[1:].split("]")[0]), counts)
                self._lines.setdefault(table, number)
            else:
                keys = _keys(line.split("=", 1)[0])
                for depth in range(1, len(keys) + 1):
                    self._lines.setdefault((*table, *keys[:depth]), number)

    def line(self, path: Path) -> int:
        """1-based line of `path`, or of the nearest thing around it; 0 when there is nothing."""
        for end in range(len(path), 0, -1):
            if path[:end] in self._lines:
                return self._lines[path[:end]]
        return 0


def _resolve(keys: list[str], counts: dict[Path, int]) -> Path:
    """Put the current index behind every key that names an array of tables, but not behind the last."""
    path: Path = ()
    for position, key in enumerate(keys):
        path = (*path, key)
        if position < len(keys) - 1 and path in counts:
            path = (*path, counts[path] - 1)
    return path


def _keys(text: str) -> list[str]:
    keys: list[str] = []
    position = 0
    while match := _KEY.match(text.rstrip(), position):
        keys.append(match[1].strip("\"'"))
        position = match.end()
        if not match[2]:
            break
    return keys


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line that begins a statement, past comments, long strings and long arrays."""
    depth = 0
    quote = ""
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not quote and not depth and stripped and not stripped.startswith("#"):
            yield number, stripped
            if stripped.startswith("["):
                continue
        position = 0
        while position < len(line):
            if quote:
                if quote[0] == '"' and line[position] == "\\":
                    position += 2
                    continue
                if line.startswith(quote, position):
                    position += len(quote)
                    quote = ""
                    continue
            elif line.startswith(('"""', "'''"), position):
                quote = line[position : position + 3]
                position += 3
                continue
            elif line[position] in "\"'":
                quote = line[position]
            elif line[position] in "[{":
                depth += 1
            elif line[position] in "]}":
                depth -= 1
            elif line[position] == "#":
                break
            position += 1
        if len(quote) == 1:
            quote = ""
