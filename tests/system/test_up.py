"""`calm up` with the embedded fleet: the newcomer's way, with the real SmolLM2."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared import listening
from tests.processes import of_home

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
CALM = [sys.executable, "-m", "services.cli"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded fleet's models: fetched here, unless CALM_TEST_MODELS names a store that has them."""
    given = os.environ.get("CALM_TEST_MODELS")
    return Path(given) if given else tmp_path_factory.mktemp("models")


def _environment(home: Path, models: Path) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("CALM_")}
    return {**inherited, "CALM_HOME": str(home), "CALM_MODELS_DIR": str(models)}


class Up:
    """A running `calm up`."""

    def __init__(self, process: asyncio.subprocess.Process, environment: dict[str, str]) -> None:
        self.process = process
        self.environment = environment
        self.lines: list[str] = []

    async def until_ready(self) -> None:
        assert self.process.stdout is not None
        async with asyncio.timeout(300):
            async for raw in self.process.stdout:
                self.lines.append(raw.decode().rstrip())
                if self.lines[-1].startswith("ready:"):
                    return
        raise AssertionError("\n".join(self.lines))

    async def run(self, *command: str, status: int = 0, stdin: bytes | None = None) -> str:
        """Run another command against this system; its output."""
        child = await asyncio.create_subprocess_exec(
            *command, env=self.environment, stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        async with asyncio.timeout(120):
            out, _ = await child.communicate(stdin)
        assert child.returncode == status, out.decode()
        return out.decode()

    async def interrupt(self) -> str:
        """Ctrl-C; what it still printed."""
        assert self.process.stdout is not None
        os.kill(self.process.pid, signal.SIGINT)
        async with asyncio.timeout(60):
            rest = await self.process.stdout.read()
            assert await self.process.wait() == 0
        return rest.decode()


@contextlib.asynccontextmanager
async def _up(home: Path, models: Path, *options: str) -> AsyncIterator[Up]:
    environment = _environment(home, models)
    process = await asyncio.create_subprocess_exec(
        *CALM, "up", "--port", "0", *(options or ("--http", "127.0.0.1:0")), env=environment, cwd=ROOT,
        start_new_session=True, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    up = Up(process, environment)
    try:
        await up.until_ready()
        yield up
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.timeout(600)
async def test_a_newcomer_s_first_quarter_of_an_hour(tmp_path: Path, models: Path) -> None:
    """Fetch, start, ask, look, explain, judge, fail, stop, start again: all as the README says."""
    async with _up(tmp_path, models) as up:
        asked = await up.run(*CALM, "ask", "If 3 pens cost 6 dollars, how much do 5 pens cost?", "--max-tokens", "24")
        assert "smollm2-math on worker-1" in asked
        assert "tokens/s" in asked
        query_id = asked.strip().splitlines()[-1].removeprefix("query ")
        explained = await up.run(*CALM, "explain", query_id)
        assert "decision: best_utility" in explained
        assert explained.count("excluded") == 0
        assert all(card in explained for card in ("smollm2-fast", "smollm2-accurate", "smollm2-code"))
        await up.run(*CALM, "feedback", query_id, "0.9")
        assert "feedback 0.9" in await up.run(*CALM, "explain", query_id)
        status = await up.run(*CALM, "status")
        assert "1 accepted, 1 answered" in status
        assert "smollm2-135m-int8" in status
        assert "unknown_model" not in await up.run(*CALM, "ask", "hi", "--model", "nobody", status=1)
        answer = json.loads(await up.run(*CALM, "ask", "-", "--json", "--max-tokens", "8", stdin=b"Say hello."))
        assert answer["type"] == "answer.v1"

        url = (tmp_path / "run" / "nats_url").read_text()
        for script in ("ask.py", "stream.py", "bad.py"):
            text = (ROOT / "examples" / script).read_text().replace("nats://127.0.0.1:4222", url)
            copy = tmp_path / script
            copy.write_text(text)
            printed = await up.run(sys.executable, str(copy))
            if script == "bad.py":
                codes = [line.split(":")[0] for line in printed.splitlines()]
                assert codes == [
                    "invalid_query", "unknown_model", "invalid_query", "prompt_too_large", "context_exceeded"
                ]  # fmt: skip
            elif script == "stream.py":
                assert "[answer.v1]" in printed
            else:
                assert printed.strip()

        http = next(line for line in up.lines if line.startswith("ready:")).partition(", or at ")[2].partition("/v1")[0]
        assert f"{http}\n" in status
        over_http = (ROOT / "examples" / "over_http.py").read_text().replace("http://127.0.0.1:8484", http)
        assert "[smollm2" in await up.run(sys.executable, "-c", over_http)

        assert len(of_home(tmp_path)) >= 8
        rest = await up.interrupt()
        assert "stopped" in rest
        await _nothing_left(tmp_path)
        assert not (tmp_path / "run" / "nats_url").exists()

    async with _up(tmp_path, models) as again:
        status = await again.run(*CALM, "status")
        # Before the stop: two by the command line, three by the examples over NATS, of which one failed, one by HTTP.
        assert "6 accepted, 5 answered, 1 failed" in status
        again.process.kill()
        await again.process.wait()
        await _nothing_left(tmp_path)


@pytest.mark.timeout(600)
async def test_without_a_gateway_or_with_its_port_in_use_everything_else_runs(tmp_path: Path, models: Path) -> None:
    """A port in use is told, with what to change; `--no-http` starts no gateway."""
    with listening.bind("127.0.0.1", 0) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with _up(tmp_path, models, "--http", address) as up:
            told = "\n".join(up.lines)
            assert f"cannot listen on {address}: another program listens there" in told
            assert "calm up --http" in told
            assert "\n  gateway " not in await up.run(*CALM, "status")
            await up.interrupt()
    async with _up(tmp_path, models, "--no-http") as up:
        assert not any(line.startswith("gateway ") for line in up.lines)
        assert "/v1" not in up.lines[-1]
        await up.interrupt()


@pytest.mark.timeout(600)
async def test_choices_are_read_in_answers_and_another_model_is_asked_where_none_can_be(
    tmp_path: Path, models: Path
) -> None:
    """The real model names the capital, which is read; it names neither of two odd words, and then another card, asked
    as was allowed, does not either: one answer, which says so, and the record tells of both attempts."""
    async with _up(tmp_path, models) as up:
        question = "What is the capital of France?"
        asked = await up.run(*CALM, "ask", question, "--max-tokens", "24", "--expect", "choice:Paris,London")
        assert "read: Paris (only)" in asked
        odd = ("--expect", "choice:xylograph,quincunx", "--retries", "1", "--max-tokens", "8")
        answer = json.loads(await up.run(*CALM, "ask", question, *odd, "--json"))
        assert answer["type"] == "answer.v1"
        assert answer["reading"]["value"] is None
        assert answer["attempt"] == 2
        assert 0 < answer["energy"]["retried_j"] < answer["energy"]["joules"]
        for _ in range(100):  # the recorder announces nothing
            explained = await up.run(*CALM, "explain", answer["id"], "--json")
            if json.loads(explained).get("done"):
                break
            await asyncio.sleep(0.1)
        text = await up.run(*CALM, "explain", answer["id"])
        assert "not readable" in text
        assert "not given: " in text
        assert ": nothing readable (" in text
        streamed = await up.run(*CALM, "ask", question, *odd)
        assert "[starting over with another model or worker]" in streamed
        assert "not readable" in streamed
        refused = await up.run(*CALM, "ask", question, "--expect", "choice:A,a", status=1)
        assert "cannot be told apart" in refused
        url = (tmp_path / "run" / "nats_url").read_text()
        example = (ROOT / "examples" / "expect.py").read_text().replace("nats://127.0.0.1:4222", url)
        assert " by smollm2" in await up.run(sys.executable, "-c", example)


async def _nothing_left(home: Path) -> None:
    """Every process ends with the system: the kernel and the nursery see to it; nothing announces it."""
    for _ in range(50):
        if not of_home(home):
            return
        await asyncio.sleep(0.1)
    raise AssertionError(of_home(home))
