"""Weights that processes share: optimised and packed once for this kind of CPU, written to disk, mapped by everyone.

ONNX Runtime packs weights anew for each session, into memory of its own: four engines of one model on one host hold
four copies. Packed weights that it saved with the optimised graph are mapped from the file instead, so that the kernel
holds them once, for however many processes, and can drop and reread them as it likes.

An entry is written to a folder of its own and renamed into place; a lock lets one process write while others wait.
Whatever goes wrong, the model is loaded the ordinary way.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import onnxruntime as ort

LEAST_BYTES = 8 * 2**20
"""Smaller models are not worth a file."""
ROOM = 3.0
"""Free disk space wanted, in times the weights: the file holds them as they are and packed."""
WAIT_S = 60.0
KEEP_S = 30 * 86400.0
"""Entries that were not used for so long (another CPU, another version) are removed when a new one is written."""


def find_or_make(
    cache: Path, name: str, model: Path, weights_bytes: int, make: Callable[[Path], object], *, wait_s: float = WAIT_S
) -> Path | None:
    """The graph to open instead of `model`, with its weights beside it; None when there is to be none.

    `make(folder)` writes `model.onnx` and its weights there. `name` is only for people.
    """
    if weights_bytes < LEAST_BYTES:
        return None
    try:
        entry = cache / f"{name}-{_key(model)}"
        graph = entry / "model.onnx"
        if not graph.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            with _locked(cache / ".lock", wait_s):
                if not graph.is_file():
                    _write(cache, entry, weights_bytes, make)
        os.utime(entry)
    except Exception:  # noqa: BLE001 read-only, full, too old an ONNX Runtime: the model is loaded the ordinary way
        return graph if "graph" in locals() and graph.is_file() else None
    return graph


def _write(cache: Path, entry: Path, weights_bytes: int, make: Callable[[Path], object]) -> None:
    for old in cache.iterdir():
        unfinished = old.name.startswith(".new-")  # whoever wrote it had the lock, and died
        if old.is_dir() and (unfinished or time.time() - old.stat().st_mtime > KEEP_S):
            shutil.rmtree(old, ignore_errors=True)
    if shutil.disk_usage(cache).free < ROOM * weights_bytes:
        raise OSError("no room for shared weights")
    folder = Path(tempfile.mkdtemp(prefix=".new-", dir=cache))
    try:
        make(folder)
        folder.chmod(0o755)
        folder.rename(entry)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    digest.update(f"{model.parent.resolve()} {ort.__version__} {cpu_features()}".encode())
    return digest.hexdigest()[:16]


def cpu_features() -> str:
    """What this CPU can do, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return " ".join(sorted(found[1].split())) if found else f"{platform.machine()} {platform.processor()}"
