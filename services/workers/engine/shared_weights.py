"""Weights that processes share: optimised and packed once for this kind of CPU, written to disk, mapped by everyone.

ONNX Runtime packs weights anew for each session, into memory of its own: four engines of one model on one host hold
four copies. Packed weights that it saved with the optimised graph are mapped from the file instead, so that the kernel
holds them once, for however many processes, and can drop and reread them as it likes.

`calm models pull` and `add` write entries into the model store (`services.workers.pack`), where every home and every
container that uses the store finds them; an engine that finds none writes its own, there or under its home.

An entry is written to a folder of its own and renamed into place; a lock of the entry lets one process write while
those that want the same wait. Whatever goes wrong, the model is loaded the ordinary way.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import onnxruntime as ort

from shared.settings import WORTH_PACKING_BYTES

GRAPH = "model.onnx"
_LAYOUT = "3"
"""Of an entry: what it holds beside the graph and the weights (the joint graph, since 2), and how they are written (in
large pieces, since 3)."""
_PIECE_BYTES = 4 << 20
LEAST_BYTES = WORTH_PACKING_BYTES
ROOM = 5.0
"""Free disk space wanted, in times the weights: the file holds them as they are and packed, and is written twice."""
WAIT_S = 60.0
KEEP_S = 30 * 86400.0
"""Entries that were not used for so long (another CPU, another version) are removed when a new one is written."""


def find_or_make(
    caches: Sequence[Path],
    name: str,
    model: Path,
    weights_bytes: int,
    make: Callable[[Path], object],
    *,
    wait_s: float = WAIT_S,
) -> Path | None:
    """The graph to open instead of `model`, with its weights beside it; None when there is to be none.

    It is looked for in each of `caches`, and else made in the first where that can be. `make(folder)` writes
    `model.onnx` and its weights there. `name` is only for people.
    """
    if weights_bytes < LEAST_BYTES:
        return None
    entry = f"{name}-{_key(model)}"
    for cache in caches:
        if (cache / entry / GRAPH).is_file():
            with contextlib.suppress(OSError):  # in a store that is read here and written elsewhere
                os.utime(cache / entry)
            return cache / entry / GRAPH
    for cache in caches:
        graph = cache / entry / GRAPH
        with contextlib.suppress(Exception):  # read-only, full, too old an ONNX Runtime: elsewhere, or not at all
            cache.mkdir(parents=True, exist_ok=True)
            with _locked(cache / f".lock-{entry}", wait_s):
                if not graph.is_file():
                    _write(cache, entry, weights_bytes, make)
            return graph
    return None


def _write(cache: Path, entry: str, weights_bytes: int, make: Callable[[Path], object]) -> None:
    for old in cache.iterdir():
        if old.is_dir() and time.time() - old.stat().st_mtime > KEEP_S:
            shutil.rmtree(old, ignore_errors=True)
    folder = cache / f".new-{entry}"
    shutil.rmtree(folder, ignore_errors=True)  # whoever wrote it had the lock, and died
    if shutil.disk_usage(cache).free < ROOM * weights_bytes:
        raise OSError("no room for shared weights")
    folder.mkdir()
    try:
        make(folder)
        for file in list(folder.iterdir()):
            if file.stat().st_size >= _PIECE_BYTES:
                in_large_pieces(file)
        folder.rename(cache / entry)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def in_large_pieces(file: Path) -> None:
    """Write a file anew, with the same bytes, a few megabytes at a time.

    Linux keeps what is written in pieces of memory as large as the writes, where its file system can (ext4, xfs), and
    ONNX Runtime writes one matrix after another. Of SmolLM2-135M int4 a quarter then lay in pieces of 64 kB and more,
    all of it afterwards: decoding is 1.05 times as quick (docs/decisions/0030).
    """
    copy = file.with_name(file.name + ".new")
    with file.open("rb", buffering=0) as source, copy.open("wb", buffering=0) as target:
        while piece := source.read(_PIECE_BYTES):
            rest = memoryview(piece)
            while rest:
                rest = rest[target.write(rest) :]
    copy.replace(file)


@contextlib.contextmanager
def _locked(path: Path, wait_s: float) -> Iterator[None]:
    with path.open("a") as file:
        ends_at = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= ends_at:
                    raise
            time.sleep(0.02)  # flock tells nobody when it becomes free, and blocking in it cannot be bounded
        yield


def _key(model: Path) -> str:
    """Of the model's files, ONNX Runtime's version, and what its kernels choose a packing by."""
    digest = hashlib.sha256()
    for file in sorted(model.parent.iterdir()):
        facts = file.stat()
        digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    digest.update(f"{_LAYOUT} {model.parent.resolve()} {ort.__version__} {cpu_features()}".encode())
    return digest.hexdigest()[:16]


def cpu_features() -> str:
    """What this CPU can do, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return " ".join(sorted(found[1].split())) if found else f"{platform.machine()} {platform.processor()}"
