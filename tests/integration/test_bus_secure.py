"""Connections to brokers with certificates and users: what is trusted, what is refused, and what is said then."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme

from shared.broker import Broker
from shared.bus import Bus
from shared.errors import BusUnavailable, SettingsInvalid
from shared.settings import Settings

PATIENT_S = 15.0


@dataclasses.dataclass(frozen=True)
class Papers:
    """Files of one authority: its own, the broker's, a client's."""

    ca: Path
    server: Path
    client: Path
    client_key: Path

    @classmethod
    def issued(cls, folder: Path) -> Papers:
        folder.mkdir()
        authority = trustme.CA()
        found = cls(folder / "ca.pem", folder / "server.pem", folder / "client.pem", folder / "client.key")
        authority.cert_pem.write_to_path(found.ca)
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(found.server)
        client = authority.issue_cert("client@calm")
        client.private_key_pem.write_to_path(found.client_key)
        for part in client.cert_chain_pems:
            part.write_to_path(found.client, append=True)
        return found


@pytest.fixture
def papers(tmp_path: Path) -> Papers:
    return Papers.issued(tmp_path / "papers")


@contextlib.asynccontextmanager
async def encrypting(folder: Path, papers: Papers, more: str = "") -> AsyncIterator[Settings]:
    """A broker with the certificate of `papers`; settings that name it."""
    tls = f'tls {{ cert_file: "{papers.server}", key_file: "{papers.server}", {more} }}\n'
    server = await Broker.start(folder / "nats", more=tls)
    try:
        yield Settings(nats_url=server.url.replace("nats://", "tls://"), home=folder, nats_ca=str(papers.ca))
    finally:
        await server.stop()


async def connected(settings: Settings) -> Bus:
    return await Bus.connect(settings, "test", wait=False)


@pytest.mark.timeout(60)
async def test_a_broker_with_a_certificate_is_trusted_by_its_authority_alone(tmp_path: Path, papers: Papers) -> None:
    """Streams work in cipher; without the authority, or with another's, the connection is refused with the remedy."""
    async with encrypting(tmp_path, papers) as settings:
        bus = await connected(settings)
        await bus.ensure()
        assert await bus.js.streams_info()
        await bus.close()
        other = Papers.issued(tmp_path / "others")
        for ca in ("", str(other.ca)):
            with pytest.raises(BusUnavailable, match="not trusted") as caught:
                await connected(dataclasses.replace(settings, nats_ca=ca))
            assert "CALM_NATS_CA" in caught.value.remedy


@pytest.mark.timeout(60)
async def test_a_broker_that_verifies_its_clients_takes_their_certificates(tmp_path: Path, papers: Papers) -> None:
    """With certificate and key it connects, and without them it does not."""
    async with encrypting(tmp_path, papers, f'ca_file: "{papers.ca}", verify: true') as settings:
        shown = dataclasses.replace(settings, nats_cert=str(papers.client), nats_key=str(papers.client_key))
        bus = await connected(shown)
        await bus.ensure()
        await bus.close()
        with pytest.raises(BusUnavailable):
            await connected(settings)


@pytest.mark.timeout(60)
async def test_a_broker_that_does_not_encrypt_is_refused_where_cipher_was_asked_for(broker: Broker) -> None:
    """`tls://` is not taken for a wish."""
    settings = Settings(nats_url=broker.url.replace("nats://", "tls://"))
    with pytest.raises(BusUnavailable, match="does not encrypt"):
        await connected(settings)


async def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    """A missing authority and one that is no certificate."""
    odd = tmp_path / "odd.pem"
    odd.write_text("no certificate")
    for file in (tmp_path / "absent.pem", odd):
        with pytest.raises(SettingsInvalid, match="CALM_NATS_CA"):
            await connected(Settings(nats_url="tls://127.0.0.1:1", nats_ca=str(file)))


@pytest.mark.timeout(60)
async def test_a_wrong_password_is_said_to_be_one(tmp_path: Path) -> None:
    """And the password is in no message."""
    server = await Broker.start(tmp_path / "nats", more='authorization { user: a, password: "right" }\n')
    try:
        url = server.url.replace("nats://", "nats://a:wrong-one@")
        with pytest.raises(BusUnavailable, match="refuses this user") as caught:
            await connected(Settings(nats_url=url))
        assert "wrong-one" not in str(caught.value)
        bus = await connected(Settings(nats_url=server.url.replace("nats://", "nats://a:right@")))
        await bus.close()
    finally:
        await server.stop()
