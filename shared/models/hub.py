"""Downloads from a model hub over its documented HTTP API: pinned revisions, resumed transfers, checked bytes."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from shared.errors import ChecksumMismatch, SourceUnavailable
from shared.models.files import sha256_of

Progress = Callable[[int, int | None], None]
"""Called with bytes so far and bytes in all (None while unknown)."""

_PIECE = 1 << 20
_REMEDIES = {
    401: "Set CALM_HUB_TOKEN to a token that may read it; a name that does not exist is answered like this too.",
    403: "Accept the model's licence on the hub, and set CALM_HUB_TOKEN.",
    404: "Check organisation, name, revision and file in the source.",
    429: "The hub asks for a pause: try again in some minutes, or set CALM_HUB_TOKEN.",
}


@dataclass(frozen=True)
class RemoteFile:
    size: int | None
    sha256: str
    """Empty for small files, of which the hub keeps none."""


class Hub:
    """One hub at `endpoint`; `token` is sent to that host only, never to the one it redirects to."""

    def __init__(self, endpoint: str, token: str = "") -> None:
        self._endpoint = endpoint.rstrip("/")
        if not self._endpoint.startswith(("https://", "http://")):
            raise SourceUnavailable(f"{endpoint!r} is not an http address.", "Check CALM_HUB_URL.")
        self._token = token
        self._opener = urllib.request.build_opener(_Redirects())

    def files(self, repository: str, revision: str) -> tuple[str, dict[str, RemoteFile]]:
        """The commit that `revision` stands for, and its files by name.

        Raises:
            SourceUnavailable: the hub cannot be reached, refuses, or answers something else.
        """
        url = f"{self._endpoint}/api/models/{quote(repository)}/revision/{quote(revision, safe='')}?blobs=true"
        try:
            with self._open(url) as reply:
                answer = json.loads(reply.read())
            found = {entry["rfilename"]: _remote(entry) for entry in answer["siblings"]}
            return str(answer["sha"]), found
        except (ValueError, KeyError, TypeError, http.client.HTTPException, OSError) as error:
            raise SourceUnavailable(f"{url} gave no list of files ({error!r}).", "Check CALM_HUB_URL.") from None

    def download(
        self, repository: str, commit: str, files: Mapping[str, RemoteFile], folder: Path, progress: Progress
    ) -> None:
        """Bring `files` of a commit into `folder`; what an earlier attempt brought is kept and gone on with.

        Raises:
            SourceUnavailable: a transfer failed; the part that arrived stays for the next attempt.
            ChecksumMismatch: the bytes are not the hub's; they are removed.
        """
        sizes = [file.size for file in files.values()]
        total = sum(s for s in sizes if s is not None) if None not in sizes else None
        before = 0
        for name, remote in files.items():
            target = folder / name
            if not target.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                url = f"{self._endpoint}/{quote(repository)}/resolve/{quote(commit, safe='')}/{quote(name)}"
                self._transfer(url, target, remote, _offset(progress, before, total))
            before += target.stat().st_size
            progress(before, total)

    def _transfer(self, url: str, target: Path, remote: RemoteFile, progress: Callable[[int], None]) -> None:
        part = target.with_name(f"{target.name}.part")
        have = part.stat().st_size if part.exists() else 0
        if remote.size is not None and have > remote.size:
            part.unlink()
            have = 0
        if have == 0 or have != remote.size:
            have = self._append(url, part, have, progress)
        if remote.size is not None and have != remote.size:
            raise SourceUnavailable(f"{url} broke off after {have} of {remote.size} bytes.", _AGAIN)
        if remote.sha256 and sha256_of(part) != remote.sha256:
            part.unlink()
            raise ChecksumMismatch(f"{url} arrived damaged.", "Run `calm models pull` again.")
        part.rename(target)

    def _append(self, url: str, part: Path, have: int, progress: Callable[[int], None]) -> int:
        """Fetch what is missing behind the first `have` bytes; returns the bytes there are then."""
        try:
            with self._open(url, have) as reply:
                if have and reply.status != http.client.PARTIAL_CONTENT:
                    have = 0
                length = reply.headers.get("Content-Length")
                expected = have + int(length) if length else None
                with part.open("ab" if have else "wb") as file:
                    while piece := reply.read(_PIECE):
                        file.write(piece)
                        have += len(piece)
                        progress(have)
        except (http.client.HTTPException, OSError) as error:
            raise SourceUnavailable(f"{url} broke off ({error}).", _AGAIN) from None
        if expected is not None and have != expected:
            raise SourceUnavailable(f"{url} broke off after {have} of {expected} bytes.", _AGAIN)
        return have

    def _open(self, url: str, start: int = 0) -> Any:
        request = urllib.request.Request(url, headers={"User-Agent": "calm"})  # noqa: S310 checked in __init__
        if self._token:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        if start:
            request.add_header("Range", f"bytes={start}-")
        try:
            return self._opener.open(request, timeout=30)
        except urllib.error.HTTPError as error:
            error.close()
            raise SourceUnavailable(
                f"{url} answers {error.code} {error.reason}.", _REMEDIES.get(error.code, "Try again later.")
            ) from None
        except (http.client.HTTPException, OSError) as error:
            raise SourceUnavailable(
                f"{url} cannot be reached ({error}).",
                "Check the network, or download the file elsewhere and name its path as the source.",
            ) from None


_AGAIN = "Run `calm models pull` again: it goes on from there."


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Keeps the token on redirects within the hub (a renamed repository), and drops it on the way to another host."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.unredirected_hdrs.get("Authorization")
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if following is not None and token and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            following.add_unredirected_header("Authorization", token)
        return following


def _offset(progress: Progress, before: int, total: int | None) -> Callable[[int], None]:
    """Report one file's bytes as part of all files' bytes."""
    return lambda done: progress(before + done, total)


def _remote(entry: dict[str, Any]) -> RemoteFile:
    large = entry.get("lfs") or {}
    return RemoteFile(size=large.get("size", entry.get("size")), sha256=str(large.get("sha256", "")))
