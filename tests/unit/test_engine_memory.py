"""Weights that processes share, KV memory that comes back, and turns at the cores."""

from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path

import numpy as np
import pytest

from services.workers.engine import shared_weights
from services.workers.engine.batcher import Finished, Request
from services.workers.engine.cache import DeviceCache, HostCache
from services.workers.engine.energy import ModelMeter
from services.workers.engine.gate import Open, Turnstile
from services.workers.engine.loader import measured_bytes, open_model, start
from services.workers.engine.schedule import Copy, Release
from services.workers.pack import pack_all
from shared.messages import ArtifactSpec, Device, Sampling
from shared.models.gguf_import import import_gguf
from shared.models.manifest import Manifest
from shared.models.store import ModelStore
from shared.settings import PACKED, Settings
from tests.tiny import write_tiny_gguf

CPU = Device(kind="cpu", name="cpu", threads=1)
Model = tuple[Path, Manifest]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    gguf = write_tiny_gguf(folder / "tiny.gguf", context=64)
    return folder, import_gguf(gguf, folder, name="t", licence="", source="", variants=["fp32", "int8"])


@pytest.fixture(autouse=True)
def worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Share models of any size."""
    monkeypatch.setattr(shared_weights, "LEAST_BYTES", 0)


def spec_of(model: Model, variant: str) -> ArtifactSpec:
    found = model[1].variant(variant)
    assert found is not None
    return model[1].artifact(found, slots=2, context=64, overhead_bytes=0)


def answer(model: Model, variant: str, cache: Path | None) -> tuple[int, ...]:
    opened = open_model(*model, spec_of(model, variant), CPU, caches=[cache] if cache else [])
    batcher = start(opened, ModelMeter(1, 1, 1))
    batcher.add(Request("a", [], Sampling(max_tokens=12), prompt=[40, 41, 42]))
    ended: list[Finished] = []
    while batcher.active:
        ended += [e for e in batcher.step() if isinstance(e, Finished)]
    return ended[0].tokens


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_mapped_weights_give_the_same_tokens(model: Model, variant: str, tmp_path: Path) -> None:
    """Written by the first engine, mapped by it and the next, and no different from the model as stored."""
    plain = answer(model, variant, None)
    assert answer(model, variant, tmp_path / "cache") == plain
    entries = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert [p.name.startswith(f"t-{variant}-") for p in entries] == [True]
    assert answer(model, variant, tmp_path / "cache") == plain


def test_weights_written_in_large_pieces_are_the_same_weights(tmp_path: Path) -> None:
    """Byte by byte, whole pieces and what is left; nothing else stays behind."""
    file = tmp_path / "model.bin"
    content = np.random.default_rng(0).bytes(2 * shared_weights._PIECE_BYTES + 4097)
    file.write_bytes(content)
    shared_weights.in_large_pieces(file)
    assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]


def test_a_damaged_or_impossible_cache_costs_nothing_but_memory(model: Model, tmp_path: Path) -> None:
    """A broken entry is thrown away, and a cache that cannot be written is done without: the model loads either way."""
    plain = answer(model, "fp32", None)
    assert answer(model, "fp32", tmp_path / "cache") == plain
    (entry,) = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    (entry / "model.onnx").write_bytes(b"not a graph")
    assert answer(model, "fp32", tmp_path / "cache") == plain
    assert not entry.exists()
    (tmp_path / "file").write_text("in the way")
    assert answer(model, "fp32", tmp_path / "file") == plain


def test_several_that_start_at_once_write_one_entry(model: Model, tmp_path: Path) -> None:
    """One makes it, the others wait and use it; one that fails leaves nothing behind."""
    file = model[0] / "fp32" / "model.onnx"
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "model.onnx").write_text("graph")

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("full")

    cache = tmp_path / "cache"
    assert shared_weights.find_or_make([cache], "m", file, 100, fail) is None
    assert not [p for p in cache.iterdir() if p.is_dir()]
    found: list[Path | None] = []
    threads = [
        threading.Thread(target=lambda: found.append(shared_weights.find_or_make([cache], "m", file, 100, make)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(made) == 1
    assert len(set(found)) == 1
    assert found[0] is not None
    assert found[0].read_text() == "graph"


def test_another_model_does_not_wait_and_a_store_that_is_only_read_serves(model: Model, tmp_path: Path) -> None:
    """While one entry is written another is made; what lies in the first place is used, and else the next is filled."""
    writing, written = threading.Event(), threading.Event()

    def slow(folder: Path) -> None:
        writing.set()
        assert written.wait(20)
        (folder / "model.onnx").write_text("slow")

    def quick(folder: Path) -> None:
        (folder / "model.onnx").write_text("quick")

    store, home = tmp_path / "store", tmp_path / "home"
    file, other = (model[0] / variant / "model.onnx" for variant in ("fp32", "int8"))
    thread = threading.Thread(target=shared_weights.find_or_make, args=([store], "slow", file, 100, slow))
    thread.start()
    assert writing.wait(20)
    found = shared_weights.find_or_make([store], "quick", other, 100, quick, wait_s=1)
    written.set()
    thread.join(20)
    assert found is not None
    assert found.parent.parent == store
    assert shared_weights.find_or_make([store, home], "quick", other, 100, pytest.fail) == found
    assert not home.exists()
    (tmp_path / "file").write_text("a store that cannot be written")
    elsewhere = shared_weights.find_or_make([tmp_path / "file", home], "quick", other, 100, quick)
    assert elsewhere is not None
    assert elsewhere.parent.parent == home


def test_a_removed_model_takes_its_packed_weights_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed into the store for all who use it, once, and gone with the model; those of another model stay."""
    store = ModelStore(tmp_path / "models")
    for name in ("t", "t-int8"):
        with store.staging() as folder:
            gguf = write_tiny_gguf(tmp_path / "tiny.gguf", context=64)
            store.publish(folder, import_gguf(gguf, folder, name=name, licence="", source="", variants=["int8"]))
    settings = Settings(home=tmp_path / "home", models_dir=store.root, device="cpu")
    pack_all(["t/int8", "t-int8/int8", "missing/int8"], settings)
    packed = {p.name[:-17]: p for p in (store.root / PACKED).iterdir() if p.is_dir()}
    assert sorted(packed) == ["t-int8", "t-int8-int8"]
    monkeypatch.setattr("services.workers.engine.shared_weights._write", pytest.fail)
    pack_all(["t/int8"], settings)
    store.remove("t")
    assert [name for name, folder in packed.items() if folder.exists()] == ["t-int8-int8"]


def test_a_kv_cache_holds_what_was_written_and_gives_it_back() -> None:
    """Memory grows with the tokens written, and returns to the system on release; what is kept is kept."""
    shape = (4, 4096, 64)
    whole = 4 * 4096 * 64 * 4
    before = measured_bytes()
    cache = HostCache(["k", "v"], 2, [shape, shape], np.float32, CPU)
    assert measured_bytes() - before < 0.1 * whole
    for array in cache._arrays.values():
        array[0] = 7
    full = measured_bytes()
    assert full - before > 1.9 * whole
    cache.apply(Release(0, 100))
    assert full - measured_bytes() > 0.95 * 2 * whole * (1 - 100 / 4096)
    assert all((array[0, :, :100] == 7).all() for array in cache._arrays.values())


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_rows_on_a_device_are_copied_by_address(kind: type[np.generic]) -> None:
    """A row is copied whole, for every layer, and no other is touched; the device here is the CPU."""
    shape = (2, 8, 4)
    cache = DeviceCache(["k", "v"], 3, [shape, shape], kind, CPU)
    values = {name: np.arange(3 * 64).reshape(3, *shape).astype(kind) + n for n, name in enumerate("kv")}
    for name, value in values.items():
        cache._buffers[name].update_inplace(value)
    cache.apply(Copy(2, 0, 5))
    for name, value in values.items():
        found = cache._buffers[name].numpy()
        assert (found[0] == value[2]).all()
        assert (found[1:] == value[1:]).all()


def _hold(folder: Path, held: object, released: object) -> None:
    with Turnstile(folder, 1):
        held.set()  # type: ignore[attr-defined]
        released.wait(20)  # type: ignore[attr-defined]


def test_one_place_is_held_by_one_at_a_time_and_given_up_by_the_dead(tmp_path: Path) -> None:
    """Another process has the place until it leaves it, or dies with it."""
    context = multiprocessing.get_context("spawn")
    for kill in (False, True):
        held, released = context.Event(), context.Event()
        other = context.Process(target=_hold, args=(tmp_path, held, released), daemon=True)
        other.start()
        assert held.wait(20)
        mine = Turnstile(tmp_path, 1)
        entered = threading.Event()

        def enter(mine: Turnstile = mine, entered: threading.Event = entered) -> None:
            with mine:
                entered.set()

        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.1)
        if kill:
            other.kill()
        else:
            released.set()
        assert entered.wait(20)
        thread.join(20)
        other.join(20)
        assert mine.contended
        mine.close()


def test_as_many_enter_as_there_are_places(tmp_path: Path) -> None:
    """Two engines of one thread each run side by side on two cores; alone nobody waits."""
    one, other = Turnstile(tmp_path, 2), Turnstile(tmp_path, 2)
    with one, other:
        assert not one.contended
        assert not other.contended
    with Open() as gate:
        assert not gate.contended
    one.close()
    other.close()
