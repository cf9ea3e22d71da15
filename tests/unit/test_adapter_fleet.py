"""Adapters in fleet files: checked with their models, pulled after them, counted in bytes beside one base."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.executor.decide import attempts
from services.workers.engine.loader import open_model, start
from shared.errors import FleetFileInvalid, ModelMissing
from shared.messages import Accepted, Device, Planned, Query, Route
from shared.models import fleet_file, pull
from shared.models.store import ModelStore
from tests import tiny_adapter
from tests.tiny_checkpoint import write_tiny_checkpoint

CPU = Device(kind="cpu", name="cpu", threads=1)


class NoMeter:
    source = "model"

    def read_j(self) -> float:
        return 0.0


def text(source: str = "x", one: str = "x", two: str = "x", card_adapter: str = "two", base: str = "tiny") -> str:
    return f"""
[fleet]
name = "specialists"

[[models]]
name = "tiny"
source = "{source}"
licence = "none"
variants = ["fp32"]
context = 64
slots = 3

[[adapters]]
name = "one"
model = "{base}"
source = "{one}"
licence = "none"

[[adapters]]
name = "two"
model = "tiny"
source = "{two}"
licence = "none"

[[cards]]
name = "plain"
model = "tiny"
variant = "fp32"
description = "everything"
max_tokens = 8

[[cards]]
name = "first"
model = "tiny"
variant = "fp32"
adapter = "one"
description = "law"
max_tokens = 8

[[cards]]
name = "second"
model = "tiny"
variant = "fp32"
adapter = "{card_adapter}"
description = "medicine"
max_tokens = 8
"""


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[pull.FleetFile, ModelStore]:
    """A fleet with two adapters, and a store with all it needs but the embedder."""
    root = tmp_path_factory.mktemp("adapters")
    checkpoint = write_tiny_checkpoint(root / "checkpoint")
    one = tiny_adapter.write_peft(root / "one", tiny_adapter.factors(checkpoint, rank=4, seed=1))
    two = tiny_adapter.write_gguf(root / "two.gguf", tiny_adapter.factors(checkpoint, rank=2, seed=2))
    fleet = fleet_file.parse_fleet(text(str(checkpoint), str(one), str(two)), "f.toml")
    store = ModelStore(root / "models")
    wanted = [w for w in pull.wanted_by(fleet) if not w.embedder]
    assert [w.name for w in wanted] == ["tiny", "one", "two"]
    for one_ in wanted:
        pull.pull(one_, store, pull.Silent())
    assert not [w for w in pull.missing(wanted, store) if not w.embedder]
    return fleet, store


def test_cards_over_one_base_share_its_artifact(filled: tuple[pull.FleetFile, ModelStore]) -> None:
    """Two adapters cost their own bytes, not another base; each attempt says which it uses."""
    fleet, store = filled
    cards = {card.name: card for card in fleet_file.cards(fleet, store)}
    plain, first = cards["plain"], cards["first"]
    assert plain.artifact == first.artifact == cards["second"].artifact
    assert (plain.adapter, first.adapter, cards["second"].adapter) == ("", "one", "two")
    spec = plain.artifact
    assert spec.adapters == ["one", "two"]
    assert spec.adapter_bytes == sum(v.weights_bytes for n in ("one", "two") for v in store.get(n).variants)
    assert 0 < spec.adapter_bytes < spec.weights_bytes
    assert spec.footprint_bytes >= spec.weights_bytes + spec.adapter_bytes
    assert (store.get("one").kind, store.get("one").base) == ("adapter", "tiny")
    store.verify("one")
    query = Accepted(query=Query(prompt="x"), query_id="q", deadline_at=1.0)
    route = Route(query_id="q", order=["first", "plain"], candidates=[], reason="best_utility")
    work = attempts.work(Planned(accepted=query, route=route), cards, 0, 1, 0.0)
    assert (work.artifact, work.adapter) == (spec.name, "one")
    without = fleet_file.parse_fleet(text(card_adapter="one"), "f.toml")
    assert spec.name != next(iter(fleet_file.artifact_specs(without, store))) != "tiny-fp32"
    assert attempts.work(Planned(accepted=query, route=route), cards, 1, 2, 0.0).adapter == ""


def test_an_engine_loads_the_base_with_its_adapters(filled: tuple[pull.FleetFile, ModelStore], tmp_path: Path) -> None:
    """What the spec names is loaded; one that is not in the store is an error that says so."""
    fleet, store = filled
    (spec,) = fleet_file.artifact_specs(fleet, store).values()
    assert spec.name.startswith("tiny-fp32-")
    opened = open_model(store.path("tiny"), store.get("tiny"), spec, CPU)
    assert start(opened, NoMeter()).free_slots == 3  # type: ignore[arg-type]
    store.remove("two")
    with pytest.raises(ModelMissing, match="'two'"):
        open_model(store.path("tiny"), store.get("tiny"), spec, CPU)
    with pytest.raises(ModelMissing):
        fleet_file.cards(fleet, store)


@pytest.mark.parametrize(
    ("change", "message", "line"),
    [
        ({"card_adapter": "tow"}, "unknown adapter `tow`. Did you mean `two`", 44),
        ({"base": "tyni"}, "unknown model `tyni`. Did you mean `tiny`", 15),
    ],
)
def test_mistakes_are_named_with_their_line(change: dict[str, str], message: str, line: int) -> None:
    """An adapter or a model that is not there, with what was probably meant."""
    with pytest.raises(FleetFileInvalid) as raised:
        fleet_file.parse_fleet(text(**change), "f.toml")
    assert message in str(raised.value)
    assert raised.value.line == line


def test_an_adapter_serves_its_own_model_only() -> None:
    """A card may not put an adapter over another model."""
    other = text().replace('[[adapters]]\nname = "one"', """[[models]]
name = "other"
source = "x"
licence = "none"
variants = ["fp32"]

[[adapters]]
name = "one"
""", 1).replace('model = "tiny"\nsource = "x"', 'model = "other"\nsource = "x"', 1)  # fmt: skip
    with pytest.raises(FleetFileInvalid, match="is for the model `other`"):
        fleet_file.parse_fleet(other, "f.toml")
