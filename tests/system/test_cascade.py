"""Real processes: judgements teach what a card's confidence says; answers that are then likely wrong are handed on."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from nats.aio.msg import Msg

from services.monitor.confidences import ConfidenceKeeper
from shared import codec, subjects
from shared import messages as m
from shared.learn import confidence
from shared.views import ControlView
from tests.processes import running
from tests.system.client import ask, converse, knowledge
from tests.system.conftest import System

pytestmark = pytest.mark.system
QUESTIONS = [f"{word} {number}" for number in range(8) for word in ("why is it", "tell me of", "count to")]
PRICE = 0.4
"""Of an answer of `other`, in units of quality: it promises 0.3 more than `plain`."""


async def _judged(system: System) -> tuple[str, str]:
    """Ask `plain` and judge its answers right where it is surer than usual; the question that it is least sure of, and
    the one that it is surest of, once planners know."""
    nc = system.bus.nc
    answers = [(await ask(nc, prompt=q, model="plain"), q) for q in QUESTIONS]
    answers.sort(key=lambda one: one[0]["confidence"]["mean_logprob"])
    for rank, (answer, _) in enumerate(answers):
        given = m.Feedback(query_id=answer["id"], score=float(rank >= len(answers) // 2))
        await nc.request(subjects.FEEDBACK, codec.to_json(given), timeout=10)
    view = ControlView(system.bus)
    await view.start()
    async with asyncio.timeout(40):
        while True:
            _, data = view.learned.get(ConfidenceKeeper.name, (0, b""))
            if data and confidence.heard(data)["plain"].slope > 0.8:
                break
            await asyncio.sleep(0.1)  # judgements are taken in one by one, and told every few seconds
    return answers[0][1], answers[-1][1]


async def _dear(system: System, query_id: str) -> dict[str, float]:
    """A preference under which an answer of `other` costs `PRICE`, as the record of this query estimates its energy."""
    record: dict[str, Any] = {}
    async with asyncio.timeout(20):
        while not record.get("route"):
            record = await knowledge(system.bus.nc, "query", id=query_id)
    joules = {c["card"]: c["energy_j"] for c in record["route"]["candidates"] if "energy_j" in c}
    assert joules["other"] > 4.0 * joules["plain"]
    return {"latency": 0.0, "energy": PRICE * 50.0 / joules["other"]}


@pytest.mark.timeout(240)
async def test_an_unsure_answer_is_handed_on_where_that_was_asked_for_and_an_executor_s_death_changes_nothing(
    system: System,
) -> None:
    await system.add_worker("w1")
    nc, view = system.bus.nc, await system.bus.kv_all(subjects.BUCKET_MODELS)
    better = msgspec.structs.replace(codec.unpack(view["other"], m.Card), quality=0.9, max_tokens=400)
    await system.bus.kv_put(subjects.BUCKET_MODELS, "other", better)
    unsure, sure = await _judged(system)
    common: dict[str, Any] = {"constraints": {"models": ["plain", "other"]}}
    first = await ask(nc, prompt=unsure, preference={"quality": 0.0}, **common)
    assert (first["model"], first["chance"], first["passed_over"]) == ("plain", None, [])  # not asked for
    common["preference"] = await _dear(system, first["id"])

    kept = await ask(nc, prompt=sure, cascade=True, **common)
    assert (kept["model"], kept["attempt"], kept["passed_over"]) == ("plain", 1, [])
    assert kept["chance"] > 0.5
    plain = await ask(nc, prompt=unsure, **common)
    assert (plain["model"], plain["passed_over"]) == ("plain", [])

    handing_on = asyncio.Event()

    async def on_failed(_message: Msg) -> None:
        await system.stages["executor"].kill()
        handing_on.set()

    await system.bus.subscribe(subjects.FAILED, on_failed)
    talk = await converse(nc, prompt=unsure, cascade=True, **common)
    async with asyncio.timeout(30):
        await handing_on.wait()
    system.stages["executor"] = await system.exits.enter_async_context(running("executor", system.settings, system.bus))
    handed = await talk.final(60)
    assert len(talk.finals) == 1
    assert (handed["model"], handed["attempt"]) == ("other", 2)
    assert [(one["model"], one["why"]) for one in handed["passed_over"]] == [("plain", "unsure")]
    assert handed["passed_over"][0]["chance"] < 0.4 < handed["chance"]
    assert handed["energy"]["retried_j"] > 0.0
