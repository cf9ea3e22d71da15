"""The gateway among the real processes, over a real model: plain HTTP, as OpenAI's clients speak it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import ClientSession

from tests.integration.monitor_parts import until
from tests.system import web
from tests.system.conftest import System

pytestmark = pytest.mark.system


@pytest.fixture
async def http(system: System) -> AsyncIterator[ClientSession]:
    async with web.front(system) as (_, client):
        yield client


async def test_plain_and_streamed_completions_say_the_same_and_can_be_judged(
    system: System, http: ClientSession
) -> None:
    """Text, finish reason, usage, the id for feedback and the model that routing chose; streamed piece by piece."""
    await system.add_worker("w1")
    await web.ready(http)
    body: dict[str, Any] = {"model": "calm", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 9}
    async with http.post(web.CHAT, json=body) as response:
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

    async with http.post(
        web.CHAT, json={**body, "stream": True, "stream_options": {"include_usage": True}}
    ) as response:
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
    record = await web.ended(system, whole["id"])
    assert [one["score"] for one in record["feedback"]] == [0.9]
    async with http.post("/v1/feedback", json={"id": "nobody", "score": 1}) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (404, "not_found")


async def test_models_and_metrics_tell_of_the_fleet(system: System, http: ClientSession) -> None:
    """Every card and routing itself are models; the metrics count what was asked, and show workers and models."""
    await system.add_worker("w1")
    await web.ready(http)
    async with http.get("/v1/models") as response:
        names = [model["id"] for model in (await response.json())["data"]]
    assert names == ["calm", "other", "plain", "third"]
    async with http.get("/v1/models/other") as response:
        assert (await response.json())["calm"]["tags"] == ["other"]
    async with http.get("/v1/models/gpt-4.1") as response:
        assert response.status == 404
    status, answer = await web.chat(http, model="other", max_tokens=5)
    assert status == 200
    await web.ended(system, answer["id"])

    async def told() -> str | None:
        async with http.get("/metrics") as response:
            assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            text = await response.text()
        return (
            text if "calm_energy_joules_total{" in text and 'calm_queries_total{state="answered"} 1' in text else None
        )

    text = await until(told)
    assert f'calm_http_requests_total{{route="{web.CHAT}",status="200"}} 1' in text
    assert f'calm_http_request_seconds_count{{route="{web.CHAT}"}} 1' in text
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
    await web.ready(http)
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
    await web.ready(http)
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
        async with http.post(web.CHAT, data=data, headers={"Content-Type": kind}) as response:
            assert response.status == status
            assert (await response.json())["error"]["remedy"]
    async with http.get(web.CHAT) as response:
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
        async with http.post(web.CHAT, json=body) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (503, "not_ready")
            assert int(response.headers["Retry-After"]) > 0
            return "no worker" in error["message"] or None

    await until(known)


async def test_json_is_asked_for_and_held_back_until_it_has_been_read(system: System, http: ClientSession) -> None:
    """`response_format` of a random model: there is no JSON, the text is given as it is, and the reading says so."""
    await system.add_worker("w1")
    await web.ready(http)
    asked = {"response_format": {"type": "json_object"}, "model": "plain"}
    status, body = await web.chat(http, **asked)
    assert status == 200, body
    assert body["calm"]["reading"]["value"] is None
    streamed = {**web.LONG, **asked, "max_tokens": 16}
    async with http.post(web.CHAT, json=streamed) as response:
        told = [event async for event in web.events(response) if isinstance(event, dict)]
    assert len(told) == 2  # the whole text, and how it ended


async def test_keys_are_asked_for_and_origins_allowed_where_they_are_set(system: System) -> None:
    """Without a key only liveness and readiness are told; a browser's preflight is answered for allowed origins."""
    settings = {"CALM_API_KEYS": "alpha, beta", "CALM_HTTP_ORIGINS": "https://app.example"}
    async with web.front(system, **settings) as (_, http):
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
            async with http.options(web.CHAT, headers={"Origin": origin, **asked}) as response:
                assert response.status == (204 if allowed else 403)
                assert response.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)
        async with http.get("/health", headers={"Origin": "https://app.example"}) as response:
            assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
