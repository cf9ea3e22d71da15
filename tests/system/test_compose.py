"""compose.yaml: what can be checked without a container engine, and its services started by exactly what it says."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.bus import Bus
from shared.settings import Settings
from tests.processes import start
from tests.system.client import ask

ROOT = Path(__file__).parents[2]
FILE = ROOT / "compose.yaml"
SERVICES = ("monitor", "analyzer", "planner", "executor", "worker", "gateway")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The file with its defaults filled in, as compose does when no variable is set."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", FILE.read_text())
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def test_every_service_of_the_design_is_there_and_can_be_scaled(compose: dict[str, Any]) -> None:
    """No fixed container names, and only the NATS server and the gateway publish a port: `--scale worker=N` works."""
    services = compose["services"]
    assert {"nats", *SERVICES} <= set(services)
    for name, service in services.items():
        assert "container_name" not in service
        assert ("ports" in service) == (name in ("nats", "gateway"))
    assert services["worker-gpu"]["profiles"] == ["gpu"]
    devices = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices[0]["driver"] == "nvidia"


def test_images_are_pinned_and_processes_are_not_root(compose: dict[str, Any]) -> None:
    """Each image has a version, and our services run as an ordinary user with a read-only root."""
    for name, service in compose["services"].items():
        assert re.search(r":\d+\.\d+\.\d+", service["image"]), name
        if name != "nats":
            assert service["user"] == "10001:10001"
            assert service["read_only"] is True
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^FROM python:3\.11\.\d+-slim-bookworm", dockerfile, re.MULTILINE)
    assert "USER calm" in dockerfile


def test_volumes_and_settings_exist(compose: dict[str, Any]) -> None:
    """Every mounted volume is declared, every CALM variable is a setting, and every service has a health check."""
    known = {f"CALM_{name.upper()}" for name in Settings.defaults()}
    for name, service in compose["services"].items():
        for mount in service.get("volumes", []):
            assert mount.split(":")[0] in compose["volumes"]
        assert set(service.get("environment", {})) <= known
        assert "healthcheck" in service or name == "models"
    assert {"knowledge", "models", "jetstream"} <= set(compose["volumes"])


def test_the_server_of_compose_is_configured_like_ours(compose: dict[str, Any]) -> None:
    """The limits that the code relies on are in the configuration that compose gives to nats-server."""
    content = compose["configs"]["nats"]["content"]
    assert "max_payload: 8388608" in content
    assert "no_fast_producer_stall: true" in content
    assert "jetstream" in content


async def test_the_services_of_compose_answer_a_query(
    compose: dict[str, Any], settings: Settings, bus: Bus, stack: contextlib.AsyncExitStack, tmp_path: Path
) -> None:
    """Started by exactly the command and environment of compose, with paths and host name mapped, they answer."""
    knowledge = tmp_path / "knowledge"
    knowledge.mkdir()
    places = {
        "nats://nats:4222": settings.nats_url,
        "/data/knowledge": str(knowledge),
        "/data/models": str(settings.models_path),
        "/data": str(tmp_path),
        "0.0.0.0:8484": "127.0.0.1:0",
    }

    def local(value: str) -> str:
        for inside, outside in places.items():
            value = value.replace(inside, outside)
        return value

    for name in SERVICES:
        service = compose["services"][name]
        variables = {k: local(str(v)) for k, v in service["environment"].items() if v is not None}
        variables["CALM_FLEET"] = settings.fleet  # what a user sets to use a fleet of their own
        command = [sys.executable if part == "python" else part for part in service["command"]]
        assert command[1] == "-m", shlex.join(command)
        await stack.enter_async_context(start(command, {"PATH": "/usr/bin:/bin", **variables}, name, tmp_path, bus))
    answer = await ask(bus.nc, prompt="hello")
    assert answer["type"] == "answer.v1"
    assert (knowledge / "knowledge.db").is_file()


def test_the_health_checks_are_commands_that_exist(compose: dict[str, Any]) -> None:
    """Each of our services is checked by `python -m shared.health` with its own name."""
    for name in SERVICES:
        assert compose["services"][name]["healthcheck"]["test"] == ["CMD", "python", "-m", "shared.health", name]
