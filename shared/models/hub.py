"""Downloads from a model hub over its documented HTTP API: pinned revisions, resumed transfers, checked bytes."""

from __future__ import annotations

import http.client
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from shared.errors import ChecksumMismatch, NoSpace, SourceOffline, SourceUnavailable
from shared.models.files import sha256_of
from shared.models.hub_http import HubHttp, Interrupted, sha256_in
from shared.settings import format_bytes

T = TypeVar("T")
Progress = Callable[[int, int | None], None]
"""Called with bytes so far and bytes in all (None while unknown)."""

PAUSES_S = (0.5, 2.0, 8.0)
"""Waits before a transfer that failed is gone on with; bytes that arrive start them anew."""
RESERVE_BYTES = 64 << 20
"""Disk space that a download leaves free."""
_PIECE = 1 << 20
_AGAIN = "Run the same command again: it goes on from there."


@dataclass(frozen=True)
class RemoteFile:
    size: int | None
    """Bytes; None where the hub does not say."""
    sha256: str
    """Empty for small files, of which the hub keeps none."""


class Hub:
    """One hub at `endpoint`. `pauses_s`: how long to wait before each further attempt at a failed transfer."""

    def __init__(self, endpoint: str, token: str = "", *, pauses_s: Sequence[float] | None = None) -> None:
        self._http = HubHttp(endpoint, token)
        self._pauses_s = tuple(PAUSES_S if pauses_s is None else pauses_s)

    def files(self, repository: str, revision: str) -> tuple[str, dict[str, RemoteFile]]:
        """The commit that `revision` stands for, and its files by name.

        Raises:
            SourceUnavailable: the hub cannot be reached, refuses, or answers something else; see `HubHttp.open`.
        """
        path = f"/api/models/{quote(repository)}/revision/{quote(revision, safe='')}?blobs=true"

        def ask() -> tuple[str, dict[str, RemoteFile]]:
            try:
                with self._http.open(path) as reply:
                    answer = json.loads(reply.read())
                return str(answer["sha"]), {entry["rfilename"]: _remote(entry) for entry in answer["siblings"]}
            except (ValueError, KeyError, TypeError, AttributeError, http.client.HTTPException, OSError) as error:
                raise SourceUnavailable(
                    f"{self._http.endpoint}{path} gave no list of files ({error!r}).", "Check CALM_HUB_URL."
                ) from None

        return self._patiently(ask)

    def download(
        self, repository: str, commit: str, files: Mapping[str, RemoteFile], folder: Path, progress: Progress
    ) -> None:
        """Bring `files` of a commit into `folder`; what an earlier attempt brought is kept and gone on with.

        Raises:
            NoSpace: the disk cannot take what is still to come; nothing was transferred.
            SourceUnavailable: a transfer failed; the part that arrived stays for the next attempt.
            ChecksumMismatch: the bytes are not the hub's; they are removed.
        """
        sizes = [file.size for file in files.values()]
        total = sum(s for s in sizes if s is not None) if None not in sizes else None
        _check_space(files, folder)
        before = 0
        for name, remote in files.items():
            target = folder / name
            if not target.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                path = f"/{quote(repository)}/resolve/{quote(commit, safe='')}/{quote(name)}"
                self._transfer(path, target, remote, _offset(progress, before, total))
            before += target.stat().st_size
            progress(before, total)

    def _transfer(self, path: str, target: Path, remote: RemoteFile, progress: Callable[[int], None]) -> None:
        url = f"{self._http.endpoint}{path}"
        part = target.with_name(f"{target.name}.part")
        tag = target.with_name(f"{target.name}.etag")
        if remote.size is None or _size(part) > remote.size:  # of unknown size, nobody can say whether it is whole
            part.unlink(missing_ok=True)
        if not part.exists() or _size(part) != remote.size:
            remote = self._patiently(lambda: self._append(path, part, tag, remote, progress), lambda: _size(part))
        have = _size(part)
        if remote.size is not None and have != remote.size:
            part.unlink()  # a whole answer of another length: what is there can never become the right one
            raise SourceUnavailable(f"{url} has {have} bytes, and the hub lists {remote.size}.", "Try again later.")
        if remote.sha256 and sha256_of(part) != remote.sha256:
            part.unlink()
            tag.unlink(missing_ok=True)
            raise ChecksumMismatch(
                f"{url} arrived damaged: its sha256 is not the hub's {remote.sha256}.", "Run the same command again."
            )
        part.rename(target)
        tag.unlink(missing_ok=True)

    def _append(
        self, path: str, part: Path, tag: Path, remote: RemoteFile, progress: Callable[[int], None]
    ) -> RemoteFile:
        """Fetch what is missing behind the bytes in `part`; returns `remote` with what the transfer told besides.

        The ETag of an interrupted transfer lies in `tag` and goes into If-Range, so that a file that has changed in
        between is sent whole instead of being joined to the beginning of another.
        """
        url, have = f"{self._http.endpoint}{path}", _size(part)
        headers = {}
        if have:
            headers["Range"] = f"bytes={have}-"
            if tag.is_file():
                headers["If-Range"] = tag.read_text()
        try:
            with self._http.open(path, headers) as reply:
                if have and not _continues(reply, have):
                    have = 0
                etag = reply.headers.get("ETag", "")
                if etag.startswith('"'):  # a weak one may not be used with Range
                    tag.write_text(etag)
                else:
                    tag.unlink(missing_ok=True)
                length = reply.headers.get("Content-Length")
                expected = have + int(length) if length else remote.size
                with part.open("ab" if have else "wb") as file:
                    while piece := reply.read(_PIECE):
                        file.write(piece)
                        have += len(piece)
                        progress(have)
                sha256 = remote.sha256 or reply.linked_sha256
        except (http.client.HTTPException, OSError) as error:
            raise Interrupted(f"{url} broke off ({error}).", _AGAIN) from None
        if expected is not None and have < expected:
            raise Interrupted(f"{url} broke off after {have} of {expected} bytes.", _AGAIN)
        return replace(remote, sha256=sha256)

    def _patiently(self, attempt: Callable[[], T], arrived: Callable[[], int] = lambda: 0) -> T:
        """Make attempts until one succeeds, fails for good, or `pauses_s` are used up without a further byte."""
        left, seen = list(self._pauses_s), arrived()
        while True:
            try:
                return attempt()
            except (Interrupted, SourceOffline) as error:
                if isinstance(error, SourceOffline) and not seen:
                    raise  # nothing has ever come from there: say so at once
                if arrived() > seen:
                    left, seen = list(self._pauses_s), arrived()
                if not left:
                    raise
                time.sleep(left.pop(0))


def _continues(reply: Any, have: int) -> bool:
    """Whether the answer begins where we left off; a server may send another range than was asked for."""
    if reply.status != http.client.PARTIAL_CONTENT:
        return False
    return bool(reply.headers.get("Content-Range", f"bytes {have}-").startswith(f"bytes {have}-"))


def _check_space(files: Mapping[str, RemoteFile], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    coming = sum(
        max((remote.size or 0) - _size(folder / f"{name}.part"), 0)
        for name, remote in files.items()
        if not (folder / name).is_file()
    )
    free = shutil.disk_usage(folder).free
    if coming and coming + RESERVE_BYTES > free:
        raise NoSpace(
            f"{format_bytes(coming)} are to be downloaded, and {format_bytes(free)} are free at {folder}.",
            "Free some space, or set CALM_MODELS_DIR to a larger disk.",
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _offset(progress: Progress, before: int, total: int | None) -> Callable[[int], None]:
    """Report one file's bytes as part of all files' bytes."""
    return lambda done: progress(before + done, total)


def _remote(entry: dict[str, Any]) -> RemoteFile:
    """The revision call says `lfs.sha256`, the tree call and mirrors `lfs.oid`."""
    large = entry.get("lfs") or {}
    said = str(large.get("sha256") or large.get("oid") or "")
    return RemoteFile(size=large.get("size", entry.get("size")), sha256=sha256_in(said))
