"""`calm replay` on what real processes have recorded: as it was, with changes, and on a trace."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from services.cli import options, replay
from services.cli.replay import Outcome
from shared import messages as m
from shared import subjects
from shared.errors import DataInvalid
from tests.system.client import ask
from tests.system.conftest import System

pytestmark = pytest.mark.system
QUERIES = 24
TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,37,4
2023-11-16 18:15:47.9951690,39,10
2023-11-16 18:15:48.1951690,39,2
"""


async def _recorded(system: System, ids: list[str]) -> None:
    """Wait until every answer is in the knowledge base with its query and decision, which come later."""
    async with asyncio.timeout(20):
        for query_id in ids:
            while True:
                request = m.KnowledgeRequest(id=query_id)
                found = await system.bus.ask(subjects.knowledge("query"), request, m.QueryRecord, 5.0)
                if found.done is not None and found.query is not None and found.route is not None:
                    break
                await asyncio.sleep(0.1)


async def test_recorded_queries_are_replayed_as_they_were_and_with_changes(
    system: System, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same queries under other weights, memory, objective, fleet and arrivals; figures as table, JSON, page."""
    await system.add_worker("one")
    kinds: list[dict[str, object]] = [{}, {"constraints": {"tags": ["other"]}}, {"preference": {"latency": 5.0}}]
    ids: list[str] = []
    for i in range(QUERIES):
        reply = await ask(system.bus.nc, prompt=f"question {i}", max_tokens=4, **kinds[i % 3])
        assert reply["type"] == "answer.v1"
        ids.append(reply["id"])
    await _recorded(system, ids)

    async def run(*arguments: str) -> list[Outcome]:
        parsed = options.parser().parse_args(["replay", "--json", *arguments])
        assert await replay.replay(parsed, system.settings) == 0
        return msgspec.json.decode(capsys.readouterr().out, type=list[Outcome])

    page = tmp_path / "replay.html"
    was, then = await run("--w-latency", "2", "--slo", "0.5", "--memory", "200 MB", "--plot", str(page))
    assert was.queries == then.queries == QUERIES
    assert was.shares.keys() == {"tiny-fp32", "tiny-int8", "tiny-int4"}
    assert was.shares["tiny-int8"] >= 1 / 3  # those that had to
    assert 0.0 < was.latency_s_mean < 10.0
    assert "share of tiny-int8" in page.read_text()
    faster, _ = await run("--faster", "50", "--workers", "2", "--residency", "lru")
    assert faster.latency_s_mean == pytest.approx(was.latency_s_mean)  # what was recorded does not change
    again = await run("--fleet", system.settings.fleet)
    assert again[1].latency_s_mean == pytest.approx(again[0].latency_s_mean, rel=0.5)
    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE)
    assert (await run("--trace", str(trace)))[0].queries == 3
    trace.write_text(TRACE + "yesterday,1,2\n")
    with pytest.raises(DataInvalid, match="no arrival"):
        await run("--trace", str(trace))
