"""`calm models export`: a checkpoint becomes an ONNX model of the store, or the error says what is missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from services.workers.engine.runner import ConcatRunner
from services.workers.engine.session import open_session
from shared.errors import ExtraMissing, UnsupportedModel
from shared.messages import Device
from shared.models import export
from shared.models.pull import Silent, Wanted, pull
from shared.models.store import ModelStore
from tests.tiny_checkpoint import write_tiny_checkpoint

INSTALLED = all(importlib.util.find_spec(name) for name in ("optimum", "torch", "transformers"))
_REFERENCE = """
import json, sys, numpy, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    numpy.save(sys.argv[2], model(torch.tensor([json.loads(sys.argv[3])])).logits[0].numpy())
"""
"""In a process of its own: what these libraries warn of is not ours."""
TOKENS = [5, 40, 7, 99, 13, 200, 41]


def _export(folder: Path, store: ModelStore) -> None:
    pull(Wanted("tiny", str(folder), "MIT", (export.VARIANT,)), store, Silent(), importer=export.import_exported)


@pytest.mark.skipif(not INSTALLED, reason="needs the extra [export] (optimum, torch): see docs/models.md")
@pytest.mark.timeout(300)
def test_a_checkpoint_becomes_an_onnx_model(tmp_path: Path) -> None:
    """Optimum's export of a tiny llama gives the logits of transformers in fp32, and the store describes it."""
    folder, store = write_tiny_checkpoint(tmp_path / "checkpoint"), ModelStore(tmp_path / "models")
    _export(folder, store)
    manifest = store.get("tiny")
    store.verify("tiny")
    assert [(v.name, v.layout) for v in manifest.variants] == [("fp32", "concat")]
    assert (manifest.architecture.family, manifest.architecture.kv_heads) == ("llama", 2)
    assert manifest.tokenizer.chat_template
    assert {p.name for p in store.root.iterdir()} == {"tiny", ".lock", ".swap"}
    subprocess.run([sys.executable, "-c", _REFERENCE, folder, tmp_path / "logits.npy", str(TOKENS)], check=True)
    expected = np.load(tmp_path / "logits.npy")
    session = open_session(store.variant_path("tiny", "fp32") / "model.onnx", Device(kind="cpu", name=""), 1)
    runner = ConcatRunner(session, 1)
    first = runner.prefill(0, TOKENS[:4], 0)
    later = [runner.decode([token], [4 + i])[0] for i, token in enumerate(TOKENS[4:])]
    assert float(np.abs(np.stack([first, *later]) - expected[3:]).max()) < 1e-4


def test_without_the_extra_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not installed is named, with the command that installs it; nothing is left in the store."""
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda _name: None)
    store = ModelStore(tmp_path / "models")
    with pytest.raises(ExtraMissing, match="optimum, torch, transformers") as raised:
        _export(write_tiny_checkpoint(tmp_path / "checkpoint"), store)
    assert "calm-fleet[export]" in raised.value.remedy
    assert not store.list()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_that_is_no_checkpoint_says_what_it_lacks(tmp_path: Path, name: str) -> None:
    """The first missing file is named before anything heavy is started."""
    folder = write_tiny_checkpoint(tmp_path / "checkpoint")
    (folder / name).unlink()
    with pytest.raises(UnsupportedModel, match=r"safetensors" if name.startswith("model") else name):
        _export(folder, ModelStore(tmp_path / "models"))


def test_what_the_exporter_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that fails is an error with the last line that it printed."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'ValueError: no such architecture' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(export.sys, "executable", str(program))
    monkeypatch.setattr(export, "check_extra", lambda: None)
    with pytest.raises(UnsupportedModel, match="no such architecture"):
        _export(write_tiny_checkpoint(tmp_path / "checkpoint"), ModelStore(tmp_path / "models"))
