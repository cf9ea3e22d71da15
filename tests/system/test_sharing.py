"""Two choices of a fleet file on the running system: more `sequences` than slots, and `prompt_lookup`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from nats.aio.msg import Msg

from shared import codec, subjects
from shared.messages import Done
from tests.system import fleet
from tests.system.client import ask
from tests.system.conftest import System
from tests.tiny import write_tiny_embedder, write_tiny_gguf

pytestmark = pytest.mark.system

SLOTS, SEQUENCES, CONTEXT = 2, 6, 512


@pytest.fixture(scope="session")
def tiny_fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands in for the fleet that the other tests of the system use."""
    folder = tmp_path_factory.mktemp("sharing")
    gguf = write_tiny_gguf(folder / "tiny.gguf", context=CONTEXT)
    embedder = write_tiny_embedder(folder / "embedder")
    file = folder / "sharing.toml"
    file.write_text(f"""
[fleet]
name = "sharing"

[residency]
worker_memory = "100 MB"
engine_overhead = "20 MB"

[embedder]
name = "embedder"
source = "{embedder}"
licence = "none"
variant = "fp32"

[[models]]
name = "tiny"
source = "{gguf}"
licence = "none"
variants = ["fp32"]
context = {CONTEXT}
slots = {SLOTS}
sequences = {SEQUENCES}

[[cards]]
name = "plain"
model = "tiny"
variant = "fp32"
description = "answers everything"

[[cards]]
name = "lookup"
model = "tiny"
variant = "fp32"
description = "repeats pieces of its prompt"
prompt_lookup = true
""")
    return fleet.stored(file)


class Ended:
    """How queries ended, as the services tell each other."""

    def __init__(self) -> None:
        self.all: dict[str, Done] = {}
        self._came = asyncio.Condition()

    async def take(self, message: Msg) -> None:
        async with self._came:
            done = codec.unpack_done(message.data, message.headers)
            self.all[done.query_id] = done
            self._came.notify_all()

    async def of(self, query_id: str) -> Done:
        async with asyncio.timeout(30), self._came:
            await self._came.wait_for(lambda: query_id in self.all)
            return self.all[query_id]


@pytest.fixture
async def ended(system: System) -> Ended:
    result = Ended()
    await system.bus.nc.subscribe(subjects.done_of("*"), cb=result.take)
    return result


async def test_more_sequences_than_slots_run_at_once(system: System, ended: Ended) -> None:
    """Short answers share the memory of two slots, six at a time; one that needs nearly all of it is answered too."""
    await system.add_worker("w1")
    nc = system.bus.nc
    await ask(nc, prompt="hello", model="plain", max_tokens=2)  # loads the model
    short = [ask(nc, prompt=f"hello {n}", model="plain", max_tokens=100, seed=n) for n in range(SEQUENCES)]
    long = ask(nc, prompt="tell me everything " * 8, model="plain", max_tokens=CONTEXT)
    answers = await asyncio.gather(*short, long)
    assert all(a["type"] == "answer.v1" for a in answers), answers
    together = [(await ended.of(a["id"])).batch_mean for a in answers]
    assert max(together) > SLOTS


async def test_guesses_out_of_the_prompt_change_no_answer(system: System, ended: Ended) -> None:
    """A card with `prompt_lookup` answers word for word as the one without, in fewer steps."""
    await system.add_worker("w1")
    nc = system.bus.nc
    question = {"prompt": "one two three one two three one two three", "max_tokens": 120, "temperature": 0.0}
    plain, lookup = [await ask(nc, model=card, **question) for card in ("plain", "lookup")]
    assert lookup["text"] == plain["text"]
    assert (await ended.of(plain["id"])).tokens_drafted == 0
    guessed = await ended.of(lookup["id"])
    assert 0 < guessed.tokens_accepted <= guessed.tokens_drafted
