"""Cards with LoRA adapters on the running system: one engine, one copy of the base, answers of their own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests import tiny_adapter
from tests.system import fleet
from tests.system.client import ask, knowledge
from tests.system.conftest import System
from tests.tiny import write_tiny_embedder
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.system

CARDS = ("plain", "one", "two")


@pytest.fixture(scope="session")
def tiny_fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands in for the fleet that the other tests of the system use."""
    folder = tmp_path_factory.mktemp("adapters")
    checkpoint = write_tiny_checkpoint(folder / "checkpoint", context=1024)
    embedder = write_tiny_embedder(folder / "embedder")
    sections = f"""
[fleet]
name = "specialists"

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
source = "{checkpoint}"
licence = "none"
variants = ["fp32"]
context = 1024
slots = 4
"""
    for seed, name in enumerate(CARDS):
        adapter = ""
        if name != "plain":
            made = tiny_adapter.factors(checkpoint, rank=2 + seed, seed=seed)
            source = tiny_adapter.write_peft(folder / name, made, alpha=8.0)
            sections += f'\n[[adapters]]\nname = "{name}"\nmodel = "tiny"\nsource = "{source}"\nlicence = "none"\n'
            adapter = f'adapter = "{name}"\n'
        sections += f'\n[[cards]]\nname = "{name}"\nmodel = "tiny"\nvariant = "fp32"\n{adapter}description = "{name}"\n'
    file = folder / "specialists.toml"
    file.write_text(sections)
    return fleet.stored(file)


async def test_three_cards_answer_from_one_engine(system: System) -> None:
    """Asked at the same time, each answers otherwise than the others and always alike; the base is loaded once."""
    await system.add_worker("w1")
    nc = system.bus.nc
    asked = [ask(nc, prompt="hello there", model=card, max_tokens=12) for card in (*CARDS, *CARDS)]
    answers = await asyncio.gather(*asked)
    assert len({a["artifact"] for a in answers}) == 1
    texts = [a["text"] for a in answers]
    assert texts[:3] == texts[3:]
    assert len(set(texts)) == 3
    operations = (await knowledge(nc, "operations"))["operations"]
    assert [o["kind"] for o in operations] == ["load"]
