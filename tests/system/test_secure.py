"""compose.secure.yaml: its broker's users, with all services against it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import nats
import pytest
import yaml
from nats.aio.client import Client

from shared.broker import Broker
from shared.bus import Bus
from shared.settings import Settings
from tests.processes import running
from tests.system.client import ask, converse
from tests.system.conftest import STAGES

ROOT = Path(__file__).parents[2]
PASSWORDS = {"CALM_SERVICE_PASSWORD": "5e1f", "CALM_CLIENT_PASSWORD": "12e5"}
"""Passwords of digits: a configuration that does not quote them takes them for numbers."""


def secure() -> dict[str, object]:
    """The file with its variables filled in, as compose does."""
    text = (ROOT / "compose.secure.yaml").read_text()
    for name, value in PASSWORDS.items():
        text = re.sub(rf"\$\{{{name}:\?[^}}]*\}}", value, text)
    assert "${" not in text
    loaded: dict[str, object] = yaml.safe_load(text)
    return loaded


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    """A broker with the users of compose.secure.yaml."""
    content: str = secure()["configs"]["nats"]["content"]  # type: ignore[index]
    server = await Broker.start(tmp_path / "nats", more=content[content.index("authorization") :])
    yield server
    await server.stop()


def as_user(url: str, user: str, password: str) -> str:
    return url.replace("nats://", f"nats://{user}:{password}@")


@pytest.fixture
def settings(broker: Broker, tmp_path: Path, tiny_fleet: Path) -> Settings:
    url = as_user(broker.url, "service", PASSWORDS["CALM_SERVICE_PASSWORD"])
    return Settings(nats_url=url, home=tmp_path, models_dir=tiny_fleet.parent / "models", fleet=str(tiny_fleet))


@contextlib.asynccontextmanager
async def client(broker: Broker, inbox: str = "_INBOX.client") -> AsyncIterator[tuple[Client, asyncio.Queue[str]]]:
    """A connection as `client`, and what the broker refused it."""
    refused: asyncio.Queue[str] = asyncio.Queue()

    async def on_error(error: Exception) -> None:
        refused.put_nowait(str(error))

    nc = await nats.connect(
        as_user(broker.url, "client", PASSWORDS["CALM_CLIENT_PASSWORD"]), inbox_prefix=inbox.encode(), error_cb=on_error
    )
    try:
        yield nc, refused
    finally:
        await nc.close()


def test_every_service_of_compose_is_a_user() -> None:
    """The same services as in compose.yaml, each with the service's password, and the broker's other settings kept."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / "compose.yaml").read_text())
    plain, more = yaml.safe_load(text), secure()
    ours = {name for name, service in plain["services"].items() if "CALM_NATS_URL" in service.get("environment", {})}
    changed: dict[str, dict[str, dict[str, str]]] = more["services"]  # type: ignore[assignment]
    assert set(changed) == ours - {"models"}, "fetching models needs no broker"
    for service in changed.values():
        assert service["environment"]["CALM_NATS_URL"] == "nats://service:5e1f@nats:4222"
    content: str = more["configs"]["nats"]["content"]  # type: ignore[index]
    assert content.startswith(plain["configs"]["nats"]["content"])


@pytest.mark.timeout(180)
async def test_a_client_may_ask_and_nothing_else(
    broker: Broker, settings: Settings, bus: Bus, stack: contextlib.AsyncExitStack
) -> None:
    """Whole and streamed answers come to its inbox; commands, other inboxes, telemetry and streams are refused."""
    for name in (*STAGES, "worker"):
        await stack.enter_async_context(running(name, settings, bus, CALM_THREADS="1"))
    async with client(broker) as (nc, refused):
        answer = await ask(nc, prompt="hello")
        assert answer["type"] == "answer.v1"
        talk = await converse(nc, prompt="hello", stream=True)
        assert (await talk.final())["text"] == talk.text
        bad = await ask(nc, prompt="hello", model="absent")
        assert bad["code"] == "unknown_model"
        assert refused.empty()

        for subject in ("calm.>", "_INBOX.>", "_INBOX.other.>", "$KV.>", ">"):
            await nc.subscribe(subject)
        for subject in ("calm.command.evict.w", "calm.queries.planned", "calm.control", "$JS.API.STREAM.NAMES"):
            await nc.publish(subject, b"")
        async with asyncio.timeout(10):
            said = [await refused.get() for _ in range(9)]
        assert all("permissions violation" in error for error in said), said

    url = as_user(broker.url, "client", PASSWORDS["CALM_CLIENT_PASSWORD"])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = await asyncio.create_subprocess_exec(
        "calm", "ask", "hello", env={"PATH": path, "CALM_NATS_URL": url, "CALM_NATS_INBOX": "_INBOX.client"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(60):
        _, errors = await command.communicate()
    assert command.returncode == 0, errors.decode()
