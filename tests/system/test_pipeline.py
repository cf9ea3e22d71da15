"""The real processes, a real broker, a real (tiny) model: queries are routed, answered once, and remembered."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from tests.processes import engines_of, running
from tests.system.client import ask, converse, knowledge
from tests.system.conftest import System

pytestmark = pytest.mark.system


async def _counts(system: System, **wanted: int) -> dict[str, Any]:
    """The knowledge base's counts, once they are as wanted (it writes in batches), or after ten seconds."""
    counts: dict[str, Any] = {}
    for _ in range(100):
        counts = await knowledge(system.bus.nc, "counts")
        if all(counts.get(name, 0) >= value for name, value in wanted.items()):
            break
        await asyncio.sleep(0.1)  # the recorder announces nothing
    return counts


async def test_plain_and_streamed_answers_and_what_is_remembered(system: System) -> None:
    """A plain query gets one answer, a streamed one its chunks and then the same text; both can be looked up."""
    await system.add_worker("w1")
    nc = system.bus.nc
    answer = await ask(nc, prompt="hello there")
    assert answer["type"] == "answer.v1"
    assert answer["usage"]["tokens_out"] > 0
    assert answer["timings"]["total_s"] > 0
    talk = await converse(nc, prompt="hello there", stream=True, model="plain")
    final = await talk.final()
    assert final["type"] == "answer.v1"
    assert talk.text == final["text"]
    assert [c["seq"] for c in talk.chunks] == list(range(len(talk.chunks)))

    counts = await _counts(system, answered=2)
    assert (counts["accepted"], counts["answered"]) == (2, 2)
    assert sum(counts["by_card"].values()) == 2
    record = await knowledge(nc, "query", id=answer["id"])
    assert record["state"] == "answered"
    assert record["route"]["order"][0] == answer["model"]
    assert {c["card"] for c in record["route"]["candidates"]} == {"plain", "other", "third"}
    operations = (await knowledge(nc, "operations"))["operations"]
    assert counts["loads"] == sum(o["kind"] == "load" and o["ok"] for o in operations) >= 1
    assert all(o["reason"] for o in operations)


async def test_bad_queries_are_answered_at_once_with_what_to_change(system: System) -> None:
    """Each kind of bad input gets a typed error with a remedy."""
    await system.add_worker("w1")
    nc = system.bus.nc
    for query, code in (
        ({"prompt": 5}, "invalid_query"),
        ({"prompt": ""}, "invalid_query"),
        ({"promt": "typo"}, "invalid_query"),
        ({"prompt": "x", "model": "nobody"}, "unknown_model"),
        ({"prompt": "y" * 2**21}, "prompt_too_large"),
        ({"prompt": "word " * 9000}, "context_exceeded"),
    ):
        reply = await ask(nc, **query)
        assert (reply["type"], reply["code"]) == ("error.v1", code)
        assert reply["remedy"]


async def test_models_are_loaded_and_evicted_on_demand(system: System) -> None:
    """With memory for one model, asking for each swaps them; each swap is on record, with what it gave back."""
    await system.add_worker("w1", CALM_WORKER_MEMORY="42 MB")
    nc = system.bus.nc
    for name in ("plain", "other", "third", "plain"):
        answer = await ask(nc, prompt="hi", model=name)
        assert answer["model"] == name, answer
    counts = await _counts(system, answered=4, evictions=3, loads=4)
    assert counts["by_card"] == {"plain": 2, "other": 1, "third": 1}
    assert counts["evictions"] >= 3
    assert counts["loads"] == counts["evictions"] + 1
    operations = (await knowledge(nc, "operations"))["operations"]
    assert all(o["held_bytes"] > 0 for o in operations)
    assert all(o["freed_bytes"] >= 0.95 * o["held_bytes"] for o in operations if o["kind"] == "evict")


async def test_a_killed_worker_s_queries_are_answered_by_another(system: System) -> None:
    """SIGKILL while generating: every query ends exactly once, streams start over, within ten seconds."""
    first = await system.add_worker("w1")
    nc = system.bus.nc
    warm = await ask(nc, prompt="hi", model="plain")
    assert warm["worker"] == "w1"
    # A random model may end early by chance, so several are asked, for more tokens than there is time for.
    talks = [await converse(nc, prompt=f"question {i}", stream=True, model="plain", max_tokens=3500) for i in range(6)]
    async with asyncio.timeout(20):
        await asyncio.wait([asyncio.create_task(t.first.wait()) for t in talks], return_when=asyncio.FIRST_COMPLETED)
    engines = await engines_of("w1", system.bus)
    await first.kill()
    await system.add_worker("w2")
    finals = await asyncio.gather(*(t.final(60) for t in talks))
    assert [f["type"] for f in finals] == ["answer.v1"] * 6
    restarted = [f for f in finals if f["attempt"] > 1]
    assert restarted, "every answer was finished before the kill"
    assert {f["worker"] for f in restarted} == {"w2"}
    assert all(len(t.finals) == 1 for t in talks)
    assert all(t.text == f["text"] for t, f in zip(talks, finals, strict=True))
    assert engines
    assert not any(_alive(pid) for pid in engines)


async def test_cancel_ends_a_query_that_is_running_and_one_that_waits(system: System) -> None:
    """`calm.cancel.<id>` ends a running query and one that no worker serves yet, each with one typed error."""
    nc = system.bus.nc
    waiting = await converse(nc, prompt="hi", id="waits")
    await nc.publish("calm.cancel.waits", b"")
    await system.add_worker("w1")
    assert (await waiting.final())["code"] == "cancelled"
    running_query = await converse(nc, prompt="hi", id="runs", stream=True, max_tokens=3000)
    async with asyncio.timeout(20):
        await running_query.first.wait()
    await nc.publish("calm.cancel.runs", b"")
    assert (await running_query.final())["code"] == "cancelled"


async def test_a_query_that_nobody_can_serve_expires(system: System) -> None:
    """Without workers an accepted query ends at its deadline with a typed error."""
    reply = await ask(system.bus.nc, prompt="hi", deadline_s=1.5)
    assert (reply["type"], reply["code"]) == ("error.v1", "deadline_expired")


async def test_stages_killed_and_started_again_lose_nothing(system: System) -> None:
    """Queries accepted while a stage is dead are answered once it is back."""
    await system.add_worker("w1")
    nc = system.bus.nc
    await ask(nc, prompt="warm")
    for name in ("analyzer", "planner", "executor"):
        await system.stages[name].kill()
        talks = [await converse(nc, prompt=f"q {i}") for i in range(4)]
        system.stages[name] = await system.exits.enter_async_context(running(name, system.settings, system.bus))
        finals = await asyncio.gather(*(t.final(60) for t in talks))
        assert [f["type"] for f in finals] == ["answer.v1"] * 4, (name, finals)
        assert all(len(t.finals) == 1 for t in talks)


async def test_every_service_stops_on_sigterm_with_status_zero(system: System) -> None:
    """SIGTERM drains: exit status 0, and no engine is left."""
    worker = await system.add_worker("w1")
    await ask(system.bus.nc, prompt="hi")
    engines = await engines_of("w1", system.bus)
    assert engines
    assert await worker.stop() == 0
    assert not any(_alive(pid) for pid in engines)
    for process in system.stages.values():
        assert await process.stop() == 0


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
