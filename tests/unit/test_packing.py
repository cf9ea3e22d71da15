"""What is packed for this processor with a pull, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from services.cli import packing
from shared.models.fleet_file import load_fleet
from shared.models.gguf_import import import_gguf
from shared.models.store import ModelStore
from tests.tiny import write_tiny_gguf


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    """A tiny model under the name that the embedded fleet uses."""
    store = ModelStore(tmp_path / "models")
    with store.staging() as folder:
        gguf = write_tiny_gguf(tmp_path / "tiny.gguf", context=64)
        made = import_gguf(gguf, folder, name="smollm2-135m", licence="", source="", variants=["fp32", "int8"])
        store.publish(folder, made)
    return store


def test_what_cards_generate_with_is_packed(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those variants that are in the store and large enough; neither embedding models nor bases of adapters."""
    fleet = load_fleet("embedded")
    assert packing.of_fleet(fleet, store) == []
    monkeypatch.setattr(packing, "WORTH_PACKING_BYTES", 0)
    assert packing.of_fleet(fleet, store) == ["smollm2-135m/fp32", "smollm2-135m/int8"]
    cards = [replace(card, adapter="a") if card.variant == "fp32" else card for card in fleet.cards]
    assert packing.of_fleet(replace(fleet, cards=cards), store) == ["smollm2-135m/int8"]
    manifest = store.get("smollm2-135m")
    encoder = replace(manifest, variants=[replace(manifest.variants[0], layout="encoder")])
    assert packing.of_model(encoder) == []
