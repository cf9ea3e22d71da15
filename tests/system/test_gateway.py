"""The gateway among the real processes, over a real model: plain HTTP, as OpenAI's clients speak it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import ClientSession, ClientTimeout
from nats.aio.msg import Msg

from shared import codec, subjects
from shared import messages as m
from tests.integration.monitor_parts import until
from tests.processes import Process, engines_of, running
from tests.system import web
from tests.system.client import knowledge
from tests.system.conftest import System

pytestmark = pytest.mark.system

CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {
    "model": "plain", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3000, "stream": True
}  # fmt: skip
"""The tiny model writes a fifth of a second on this."""


@contextlib.asynccontextmanager
async def front(system: System, **more: str) -> AsyncIterator[tuple[Process, ClientSession]]:
    """A gateway of this system, and a client of it."""
    async with running("gateway", system.settings, system.bus, **more) as gateway:
        url = await web.address(gateway, system.bus)
        async with ClientSession(url, timeout=ClientTimeout(total=60)) as http:
            yield gateway, http


@pytest.fixture
async def http(system: System) -> AsyncIterator[ClientSession]:
    async with front(system) as (_, client):
        yield client


async def ready(http: ClientSession) -> None:
    """Wait until the gateway has seen what it needs."""

    async def is_ready() -> bool | None:
        async with http.get("/ready") as response:
            return response.status == 200 or None

    await until(is_ready)


async def ended(system: System, query_id: str) -> dict[str, Any]:
    """The record of a query, once it has ended."""

    async def found() -> dict[str, Any] | None:
        record = await knowledge(system.bus.nc, "query", id=query_id)
        return record if record.get("state") in ("answered", "failed") else None

    return await until(found)


async def freeze(system: System, worker: str) -> list[int]:
    """Stop a worker's engines where they are; their processes."""
    found = await engines_of(worker, system.bus)
    for pid in found:
        os.kill(pid, signal.SIGSTOP)
    return found


async def test_plain_and_streamed_completions_say_the_same_and_can_be_judged(
    system: System, http: ClientSession
) -> None:
    """Text, finish reason, usage, the id for feedback and the model that routing chose; streamed piece by piece."""
    await system.add_worker("w1")
    await ready(http)
    body: dict[str, Any] = {"model": "calm", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 9}
    async with http.post(CHAT, json=body) as response:
        whole = await response.json()
        assert response.status == 200, whole
        assert response.headers["x-request-id"] == whole["id"] == whole["calm"]["id"]
        assert response.headers["x-calm-model"] == whole["model"] == "plain"
    choice = whole["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    used = whole["usage"]
    assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]
    assert 0 < used["completion_tokens"] <= 9
    assert whole["calm"]["why"]
    assert whole["calm"]["energy"]["joules"] > 0
    assert whole["calm"]["timings"]["total_s"] > 0

    async with http.post(CHAT, json={**body, "stream": True, "stream_options": {"include_usage": True}}) as response:
        assert response.content_type == "text/event-stream"
        assert response.headers["x-calm-model"] == "plain"
        told = [event async for event in web.events(response)]
    assert told[-1] == "[DONE]"
    *chunks, last, usage = [event for event in told if isinstance(event, dict)]
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == choice["message"]["content"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert last["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert last["calm"]["model"] == "plain"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], used["completion_tokens"])
    assert {c["id"] for c in (*chunks, last, usage)} == {response.headers["x-request-id"]}

    async with http.post("/v1/completions", json={"model": "other", "prompt": "hello", "max_tokens": 4}) as response:
        text = await response.json()
    assert (text["object"], text["model"]) == ("text_completion", "other")
    assert isinstance(text["choices"][0]["text"], str)

    async with http.post("/v1/feedback", json={"id": whole["id"], "score": 0.9, "label": "good"}) as response:
        assert response.status == 200, await response.text()
    record = await ended(system, whole["id"])
    assert [one["score"] for one in record["feedback"]] == [0.9]
    async with http.post("/v1/feedback", json={"id": "nobody", "score": 1}) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (404, "not_found")


async def test_models_and_metrics_tell_of_the_fleet(system: System, http: ClientSession) -> None:
    """Every card and routing itself are models; the metrics count what was asked, and show workers and models."""
    await system.add_worker("w1")
    await ready(http)
    async with http.get("/v1/models") as response:
        names = [model["id"] for model in (await response.json())["data"]]
    assert names == ["calm", "other", "plain", "third"]
    async with http.get("/v1/models/other") as response:
        assert (await response.json())["calm"]["tags"] == ["other"]
    async with http.get("/v1/models/gpt-4.1") as response:
        assert response.status == 404
    status, answer = await web.chat(http, model="other", max_tokens=5)
    assert status == 200
    await ended(system, answer["id"])

    async def told() -> str | None:
        async with http.get("/metrics") as response:
            assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            text = await response.text()
        return (
            text if "calm_energy_joules_total{" in text and 'calm_queries_total{state="answered"} 1' in text else None
        )

    text = await until(told)
    assert f'calm_http_requests_total{{route="{CHAT}",status="200"}} 1' in text
    assert f'calm_http_request_seconds_count{{route="{CHAT}"}} 1' in text
    assert f'calm_http_tokens_total{{model="other",kind="completion"}} {answer["usage"]["completion_tokens"]}' in text
    assert "calm_workers 1\n" in text
    assert re.search(r'calm_engine\{artifact="tiny-int8",state="ready",worker="w1"\} 1\n', text)
    assert 'calm_worker_memory_budget_bytes{worker="w1"} 100000000\n' in text
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) .+|[a-z0-9_]+(\{([a-z]+="[^"]*",?)+\})? [-+0-9.e]+', line), line


async def test_the_dashboard_is_a_page_that_asks_nobody_else_for_anything(system: System, http: ClientSession) -> None:
    """The page and its two files, allowed to speak to this gateway alone; the fleet, and a decision with all of its
    candidates, as JSON without the words of query and answer."""
    await system.add_worker("w1")
    await ready(http)
    async with http.get("/") as response:
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        page = await response.text()
    files = re.findall(r'(?:src|href)="(?!data:)([^"]+)"', page)
    assert sorted(files) == ["board.css", "board.js"]
    for file in files:
        async with http.get(f"/{file}") as response:
            assert response.status == 200
            assert "http" + "s:" not in await response.text()
    _, answer = await web.chat(http, "SECRET", max_tokens=5)

    async def shown() -> dict[str, Any] | None:
        async with http.get("/v1/fleet") as response:
            fleet: dict[str, Any] = await response.json()
        done = fleet["decisions"] and fleet["decisions"][0]["state"] == "answered" and fleet["services"]
        return fleet if done else None

    async def explained() -> dict[str, Any] | None:
        async with http.get(f"/v1/queries/{answer['id']}") as response:
            told: dict[str, Any] = await response.json()
        return told if told.get("candidates") else None

    fleet = await until(shown)
    assert (fleet["missing"], fleet["decisions"][0]["model"]) == ("", answer["model"])
    assert [engine["state"] for worker in fleet["workers"] for engine in worker["engines"]].count("ready") >= 1
    told = await until(explained)
    assert {candidate["card"] for candidate in told["candidates"]} == {"plain", "other", "third"}
    assert "SECRET" not in str(fleet) + str(told)
    async with http.get("/v1/queries/nobody") as response:
        assert response.status == 404


async def test_errors_have_the_status_and_shape_that_openai_s_clients_know(system: System, http: ClientSession) -> None:
    """Each kind of bad request is refused with its own status, our code, the parameter meant, and what to change."""
    await system.add_worker("w1")
    await ready(http)
    for more, status, code, param in (
        ({"model": "gpt-4.1"}, 404, "unknown_model", "model"),
        ({"model": "plan"}, 404, "unknown_model", "model"),
        ({"messages": []}, 400, "invalid_query", None),
        ({"temperature": 9}, 400, "invalid_query", "temperature"),
        ({"n": 2}, 400, "unsupported", "n"),
        ({"tools": [{"type": "function"}]}, 400, "unsupported", "tools"),
        ({"temprature": 1}, 400, "unsupported", "temprature"),
        ({"calm": {"deadline_s": 0}}, 400, "invalid_query", "calm.deadline_s"),
        ({"calm": {"constraints": {"tags": ["none"]}}}, 400, "invalid_query", None),
        ({"calm": {"constraints": {"min_quality": 0.99}}}, 422, "no_feasible_model", None),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "context_exceeded", None),
        ({"messages": [{"role": "user", "content": "y" * 1_020_000}]}, 413, "prompt_too_large", None),
        ({"messages": [{"role": "user", "content": "y" * 2**21}]}, 413, "prompt_too_large", None),
    ):
        for stream in (False, True):
            told, body = await web.chat(http, **{"stream": stream, **more})
            assert (told, body["error"]["code"], body["error"]["param"]) == (status, code, param), body
            assert body["error"]["remedy"]
            assert body["error"]["message"].endswith(body["error"]["remedy"])
    assert "Did you mean `plain`?" in (await web.chat(http, model="plan"))[1]["error"]["message"]
    for data, kind, status in ((b"{", "application/json", 400), (b"[]", "application/json", 400),
                               (b"{}", "text/plain", 415)):  # fmt: skip
        async with http.post(CHAT, data=data, headers={"Content-Type": kind}) as response:
            assert response.status == status
            assert (await response.json())["error"]["remedy"]
    async with http.get(CHAT) as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")
    async with http.get("/v2") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (404, "not_found")


async def test_without_a_worker_it_is_live_and_not_ready_and_says_when_to_come_again(
    system: System, http: ClientSession
) -> None:
    """Live, not ready, and 503 at once with Retry-After, rather than a wait for the deadline."""
    async with http.get("/health") as response:
        assert response.status == 200
    async with http.get("/ready") as response:
        assert (response.status, (await response.json())["reason"]) == (503, "no worker is running")
    body = {"messages": [{"role": "user", "content": "hi"}]}

    async def known() -> bool | None:
        async with http.post(CHAT, json=body) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (503, "not_ready")
            assert int(response.headers["Retry-After"]) > 0
            return "no worker" in error["message"] or None

    await until(known)


async def test_a_client_that_leaves_cancels_its_query(system: System, http: ClientSession) -> None:
    """In the middle of a stream, and while it waits for a whole answer; a query with an id of the client's own goes
    on, and the client may come back for its answer."""
    await system.add_worker("w1")
    await ready(http)
    async with http.post(CHAT, json=LONG) as response:
        query_id = response.headers["x-request-id"]
        async for _ in web.events(response):
            break
        response.close()
    assert (await ended(system, query_id))["done"]["failure"]["code"] == "cancelled"

    taken: asyncio.Queue[str] = asyncio.Queue()

    async def on_accepted(message: Msg) -> None:
        taken.put_nowait(codec.unpack(message.data, m.Accepted).query_id)

    await system.bus.subscribe(subjects.NEW, on_accepted)
    waiting = asyncio.create_task(http.post(CHAT, json={**LONG, "stream": False}))
    async with asyncio.timeout(20):
        query_id = await taken.get()
    waiting.cancel()
    assert (await ended(system, query_id))["done"]["failure"]["code"] == "cancelled"

    own = {**LONG, "max_tokens": 40, "calm": {"id": "mine"}}
    async with http.post(CHAT, json=own) as response:
        assert response.headers["x-request-id"] == "mine"
        response.close()
    status, body = await web.chat(http, calm={"id": "mine"})
    assert (status, body["id"]) == (200, "mine")
    assert body["usage"]["completion_tokens"] > 16  # of the first request: the card's own limit is 16


async def test_a_deadline_that_passes_is_a_time_out(system: System, http: ClientSession) -> None:
    """504, and no client is to repeat it by itself."""
    await system.add_worker("w1")
    await ready(http)
    assert (await web.chat(http, model="plain"))[0] == 200
    frozen = await freeze(system, "w1")
    assert frozen
    body = {**LONG, "stream": False, "calm": {"deadline_s": 0.5}}
    async with http.post(CHAT, json=body) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"], error["type"]) == (504, "deadline_expired", "timeout_error")
        assert response.headers["x-should-retry"] == "false"
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)


async def test_json_is_asked_for_and_held_back_until_it_has_been_read(system: System, http: ClientSession) -> None:
    """`response_format` of a random model: there is no JSON, the text is given as it is, and the reading says so."""
    await system.add_worker("w1")
    await ready(http)
    asked = {"response_format": {"type": "json_object"}, "model": "plain"}
    status, body = await web.chat(http, **asked)
    assert status == 200, body
    assert body["calm"]["reading"]["value"] is None
    streamed = {**LONG, **asked, "max_tokens": 16}
    async with http.post(CHAT, json=streamed) as response:
        told = [event async for event in web.events(response) if isinstance(event, dict)]
    assert len(told) == 2  # the whole text, and how it ended


async def test_a_worker_that_is_lost_in_a_stream_goes_unnoticed_or_ends_it_with_an_error(
    system: System, http: ClientSession
) -> None:
    """SIGKILL in the middle: what arrived is one attempt's text from its first word to its last, or the stream ends
    with a typed error and no `[DONE]`."""
    first = await system.add_worker("w1")
    await ready(http)
    assert (await web.chat(http, model="plain"))[0] == 200
    async with http.post(CHAT, json=LONG) as response:
        told: list[dict[str, Any] | str] = []
        async for event in web.events(response):
            if not told:
                assert await freeze(system, "w1")
                await first.kill()
                await system.add_worker("w2")
            told.append(event)
    status, whole = await web.chat(http, "hi", model="plain", max_tokens=3000)
    assert status == 200
    if told[-1] == "[DONE]":
        pieces = [event["choices"][0]["delta"].get("content", "") for event in told if isinstance(event, dict)]
        assert "".join(pieces) == whole["choices"][0]["message"]["content"]
        assert isinstance(told[-2], dict)
        assert (told[-2]["calm"]["attempt"], told[-2]["calm"]["worker"]) == (2, "w2")
    else:
        assert isinstance(told[-1], dict)
        assert told[-1]["error"]["code"] == "restarted"


async def test_keys_are_asked_for_and_origins_allowed_where_they_are_set(system: System) -> None:
    """Without a key only liveness and readiness are told; a browser's preflight is answered for allowed origins."""
    settings = {"CALM_API_KEYS": "alpha, beta", "CALM_HTTP_ORIGINS": "https://app.example"}
    async with front(system, **settings) as (_, http):
        for path, status in (("/health", 200), ("/v1/models", 401), ("/metrics", 401), ("/v2", 401)):
            async with http.get(path) as response:
                assert response.status == status, path
        for key, status in (("alpha", 200), ("beta", 200), ("alpha, beta", 401), ("", 401), ("alph\u00e4", 401)):
            async with http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}) as response:
                assert response.status == status, key
        async with http.get("/v1/models", headers={"Authorization": "Basic alpha"}) as response:
            assert (response.status, response.headers["WWW-Authenticate"]) == (401, "Bearer")
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        for origin, allowed in (("https://app.example", True), ("https://evil.example", False)):
            async with http.options(CHAT, headers={"Origin": origin, **asked}) as response:
                assert response.status == (204 if allowed else 403)
                assert response.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)
        async with http.get("/health", headers={"Origin": "https://app.example"}) as response:
            assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"


async def test_it_lets_clients_have_their_answers_before_it_leaves(system: System) -> None:
    """SIGTERM while a stream runs: the stream ends as it should, new connections are refused, the status is 0. What
    takes longer than the drain time is told so, and its query is cancelled."""
    await system.add_worker("w1")
    async with front(system, CALM_DRAIN_S="20") as (gateway, http):
        await ready(http)
        async with http.post(CHAT, json=LONG) as response:
            leaving: asyncio.Task[int] | None = None
            told = []
            async for event in web.events(response):
                leaving = leaving or asyncio.create_task(gateway.stop())
                told.append(event)
        assert told[-1] == "[DONE]"
        assert leaving is not None
        assert await leaving == 0, gateway.log.read_text()[-3000:]
    async with front(system, CALM_DRAIN_S="0.2") as (gateway, http):
        await ready(http)
        async with http.post(CHAT, json=LONG) as response:
            leaving, told = None, []
            async for event in web.events(response):
                if leaving is None:
                    frozen = await freeze(system, "w1")
                    leaving = asyncio.create_task(gateway.stop())
                told.append(event)
        assert isinstance(told[-1], dict)
        assert told[-1]["error"]["code"] == "not_ready"
        assert leaving is not None
        assert await leaving == 0
        assert "Traceback" not in gateway.log.read_text()
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    record = await ended(system, response.headers["x-request-id"])
    assert record["done"]["failure"]["code"] == "cancelled"


async def test_a_port_in_use_is_told_with_what_to_change(system: System) -> None:
    """The second gateway at one address ends with status 2 and says which setting to change."""
    async with front(system) as (gateway, http):
        taken = f"{http._base_url.host}:{http._base_url.port}"  # type: ignore[union-attr]
        with pytest.raises(AssertionError, match=r"another program listens there.*CALM_HTTP"):
            async with running("gateway", system.settings, system.bus, CALM_HTTP=taken):
                pass
        assert gateway.process.returncode is None
