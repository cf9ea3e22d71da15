"""API keys: which there are, and whether a request brings one. Pure."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable


def digests(*texts: str) -> frozenset[bytes]:
    """Of the keys in comma- or line-separated lists; a line that begins with # is a remark."""
    keys: set[str] = set()
    for text in texts:
        for line in text.splitlines():
            if not line.lstrip().startswith("#"):
                keys.update(key.strip() for key in line.split(",") if key.strip())
    return frozenset(_digest(key) for key in keys)


def allowed(authorization: str | None, known: Iterable[bytes]) -> bool:
    """Whether an `Authorization` header brings a known key. Takes as long whichever it brings."""
    scheme, _, key = (authorization or "").partition(" ")
    given = _digest(key.strip())
    found = False
    for digest in known:
        found |= hmac.compare_digest(given, digest)
    return found and scheme.lower() == "bearer"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
