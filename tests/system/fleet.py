"""A tiny random model behind several cards, in a store of its own: the whole system in seconds."""

from __future__ import annotations

from pathlib import Path

from shared.models import pull
from shared.models.fleet_file import load_fleet
from shared.models.store import ModelStore
from tests.tiny import write_tiny_embedder, write_tiny_gguf

CONTEXT = 4096


def stored(file: Path) -> Path:
    """Pull what a fleet file names into a store beside it (`models`); the fleet file's path."""
    store = ModelStore(file.parent / "models")
    for wanted in pull.wanted_by(load_fleet(str(file))):
        pull.pull(wanted, store, pull.Silent())
    return file


def write(folder: Path) -> Path:
    """Write a fleet file, its sources and its store (`folder/models`); the fleet file's path."""
    gguf = write_tiny_gguf(folder / "tiny.gguf", context=CONTEXT)
    embedder = write_tiny_embedder(folder / "embedder")
    file = folder / "tiny.toml"
    file.write_text(f"""
[fleet]
name = "tiny"

[residency]
worker_memory = "100 MB"
engine_overhead = "20 MB"
min_residence_s = 0.2
max_wait_s = 1.0

[embedder]
name = "embedder"
source = "{embedder}"
licence = "none"
variant = "fp32"

[[models]]
name = "tiny"
source = "{gguf}"
licence = "none"
variants = ["fp32", "int8", "int4"]
context = {CONTEXT}
slots = 4

[[cards]]
name = "plain"
model = "tiny"
variant = "fp32"
description = "answers everything"
quality = 0.6
max_tokens = 16

[[cards]]
name = "other"
model = "tiny"
variant = "int8"
description = "answers everything as well"
quality = 0.2
tags = ["other"]
max_tokens = 16

[[cards]]
name = "third"
model = "tiny"
variant = "int4"
description = "answers too"
quality = 0.1
max_tokens = 16
""")
    return stored(file)
