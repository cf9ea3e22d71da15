"""How a process gets to the broker: encryption, certificates and users, and what is said when it does not."""

from __future__ import annotations

import ssl
from typing import Any

from shared.errors import BusUnavailable, SettingsInvalid
from shared.settings import Settings


def options(settings: Settings) -> dict[str, Any]:
    """What the connection is to be secured with.

    Raises:
        SettingsInvalid: a file that was named cannot be used.
    """
    found: dict[str, Any] = {"user_credentials": settings.nats_creds} if settings.nats_creds else {}
    if not (settings.encrypted or settings.nats_ca or settings.nats_cert):
        return found
    try:
        found["tls"] = ssl.create_default_context(cafile=settings.nats_ca or None)
        if settings.nats_cert:
            found["tls"].load_cert_chain(settings.nats_cert, settings.nats_key or None)
    except OSError as error:  # of which ssl's own errors are a kind
        names = "CALM_NATS_CA, CALM_NATS_CERT or CALM_NATS_KEY"
        raise SettingsInvalid(
            f"{names} cannot be used: {error}.", "Name readable PEM files: an authority, a certificate, and its key."
        ) from None
    return found


def unavailable(settings: Settings, error: Exception) -> BusUnavailable:
    """What to tell of the error that kept a process from the broker."""
    url, said = without_password(settings.nats_url), str(error) or type(error).__name__
    if "authorization" in said.lower():
        return BusUnavailable(
            f"The NATS server at {url} refuses this user ({said}).",
            "Set CALM_NATS_URL=nats://USER:PASSWORD@HOST:4222, or CALM_NATS_CREDS.",
        )
    if isinstance(error, ssl.SSLError):
        return BusUnavailable(
            f"The certificate of the NATS server at {url} is not trusted ({said}).",
            "Set CALM_NATS_CA to the authority that signed it.",
        )
    return BusUnavailable(
        f"No NATS server answers at {url} ({said}).", "Start the system with `calm up`, or set CALM_NATS_URL."
    )


def without_password(url: str) -> str:
    """An address as it may be shown."""
    return url.rsplit("@", maxsplit=1)[-1] if "@" in url else url
