"""Where an HTTP server listens: addresses as written in settings, and a socket bound to one."""

from __future__ import annotations

import errno
import socket

from shared.errors import SettingsInvalid

BACKLOG = 512


def parse(text: str) -> tuple[str, int]:
    """`HOST:PORT`, `[IPV6]:PORT`, `:PORT` (every address of the machine) or `PORT` (this machine alone).

    Raises:
        SettingsInvalid: it is none of these.
    """
    host, colon, port = text.strip().rpartition(":")
    host = (host.removeprefix("[").removesuffix("]") or "0.0.0.0") if colon else "127.0.0.1"  # noqa: S104 - asked for
    if not port.isascii() or not port.isdigit() or int(port) > 65535 or any(c.isspace() or c in "/@" for c in host):
        raise SettingsInvalid(
            f"{text!r} is no address to listen on.", "Write HOST:PORT, such as 127.0.0.1:8484; port 0 takes a free one."
        )
    return host, int(port)


def url(host: str, port: int) -> str:
    """Where a client on this machine finds it."""
    named = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{named}]:{port}" if ":" in named else f"http://{named}:{port}"


def is_local(host: str) -> bool:
    """Whether only this machine reaches it."""
    return host in ("localhost", "::1") or host.startswith("127.")


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        SettingsInvalid: the address is in use, or none of this machine's.
    """
    bound: socket.socket | None = None
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(where)
        bound.listen(BACKLOG)
    except OSError as error:
        if bound is not None:
            bound.close()
        why = "another program listens there" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise SettingsInvalid(
            f"The HTTP gateway cannot listen on {host}:{port}: {why}.",
            "Choose another HOST:PORT with CALM_HTTP or `calm up --http`; port 0 takes a free one.",
        ) from None
    bound.setblocking(False)
    return bound
