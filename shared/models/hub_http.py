"""HTTP to a model hub: redirects that keep the token at home, and every refusal as a typed error."""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from shared.errors import SourceForbidden, SourceMissing, SourceOffline, SourceUnavailable

TIMEOUT_S = 30.0
LINKED_ETAG = "X-Linked-Etag"
"""Of a large file the hub names here the sha256, on the redirect to where its bytes lie."""


class Interrupted(SourceUnavailable):
    """A failure that may pass by itself within seconds: 429, 5xx, a transfer that broke off."""


class HubHttp:
    """GET requests to one hub. The token goes to `endpoint`'s own host only, never to one it redirects to."""

    def __init__(self, endpoint: str, token: str = "") -> None:
        self.endpoint = endpoint.rstrip("/")
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("https", "http") or not parts.netloc:
            raise SourceUnavailable(
                f"{endpoint!r} is not the address of a hub.", "Set CALM_HUB_URL to one like https://huggingface.co."
            )
        self._token = token
        self._opener = urllib.request.build_opener(_Redirects())

    def open(self, path: str, headers: Mapping[str, str] | None = None) -> Any:
        """The open response (a context manager) to GET `path` below the endpoint, redirects followed.

        Its attribute `linked_sha256` is what the hub says of the file on the way, or empty.

        Raises:
            SourceForbidden: 401 or 403.
            SourceMissing: 404 or 410.
            SourceOffline: no connection.
            Interrupted: 429 or 5xx.
            SourceUnavailable: any other refusal.
        """
        url = f"{self.endpoint}{path}"
        request = urllib.request.Request(url, headers={"User-Agent": "calm", **(headers or {})})  # noqa: S310 checked
        if self._token:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            response = self._opener.open(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                cause = error.headers.get("X-Error-Code", "")
                raise refusal(url, error.code, error.reason, cause, with_token=bool(self._token)) from None
        except (http.client.HTTPException, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise SourceOffline(
                f"{url} cannot be reached ({reason}).",
                "Check the network and CALM_HUB_URL, or download the file elsewhere and name its path as the source.",
            ) from None
        linked = getattr(request, "linked_etag", "") or response.headers.get(LINKED_ETAG, "")
        response.linked_sha256 = sha256_in(linked)
        return response


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Keeps the token on redirects within the hub (a renamed repository), and drops it on the way to another host."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is None:
            return None
        token = req.unredirected_hdrs.get("Authorization")
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if old.scheme == "https" and new.scheme != "https":
            raise SourceUnavailable(
                f"{req.full_url} redirects to {new.scheme}://{new.netloc}, which is not encrypted.",
                "Check CALM_HUB_URL.",
            )
        if token and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            following.add_unredirected_header("Authorization", token)
        # urllib gives back the last request only; the first is the one that `open` holds.
        origin = getattr(req, "origin", req)
        vars(following)["origin"] = origin
        if LINKED_ETAG in headers:
            origin.linked_etag = headers[LINKED_ETAG]
        return following


def refusal(url: str, status: int, reason: str, cause: str = "", *, with_token: bool = False) -> SourceUnavailable:
    """The typed error for a refusing answer; `cause` is the hub's own `X-Error-Code` where it sends one."""
    message = f"{url} answers {status} {reason}".rstrip() + (f" ({cause})." if cause else ".")
    if status in (401, 403):
        if cause == "GatedRepo" or status == 403:
            remedy = "Accept the model's licence on its page on the hub, and set HF_TOKEN to a token of that account."
        elif with_token:
            remedy = "The token in HF_TOKEN is not accepted for this; a name that does not exist is answered like this."
        else:
            remedy = "Set HF_TOKEN to a token that may read it; a name that does not exist is answered like this too."
        return SourceForbidden(message, remedy)
    if status in (404, 410):
        remedies = {
            "RepoNotFound": "Check organisation and name in the source; for a private repository set HF_TOKEN.",
            "RevisionNotFound": "Check the revision after `@` in the source.",
            "EntryNotFound": "Check the file after `#` in the source.",
        }
        return SourceMissing(message, remedies.get(cause, "Check organisation, name, revision and file in the source."))
    if status == 429:
        return Interrupted(message, "The hub asks for a pause: try again in some minutes, or set HF_TOKEN.")
    kind = Interrupted if status >= 500 else SourceUnavailable
    return kind(message, "Try again later: what has arrived is kept.")


def sha256_in(etag: str) -> str:
    """The sha256 that an ETag of the hub is for large files, else empty (small files have a git hash of 40 digits)."""
    match = re.fullmatch(r'(?:W/)?"?(?:sha256:)?([0-9a-fA-F]{64})"?', etag.strip())
    return match[1].lower() if match else ""
