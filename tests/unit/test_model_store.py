"""The model store and pulling into it: readers see a whole model or none, and nothing is changed in place."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import threading
from pathlib import Path

import pytest

from shared.errors import ChecksumMismatch, ModelMissing, NotReady, SourceUnavailable, UnsupportedModel
from shared.models import gguf_import
from shared.models import pull as pulling
from shared.models.manifest import Architecture, Manifest, Variant
from shared.models.onnx_graph import CONVERTER
from shared.models.pull import Silent, Wanted, missing, pull
from shared.models.store import ModelStore
from tests import tiny


def manifest(name: str = "tiny", source: str = "here") -> Manifest:
    numbers = Architecture(family="x", layers=1, hidden=1, heads=1, kv_heads=1, head_size=1, vocab=1, context=1)
    sha256 = hashlib.sha256(b"weights").hexdigest()
    variant = Variant(name="fp32", path="fp32", layout="calm", weights_bytes=7, files={"model.onnx": sha256})
    return Manifest(name=name, source=source, architecture=numbers, variants=[variant])


def publish(store: ModelStore, name: str = "tiny", source: str = "here") -> None:
    with store.locked(), store.staging() as folder:
        (folder / "fp32").mkdir()
        (folder / "fp32/model.onnx").write_bytes(b"weights")
        store.publish(folder, manifest(name, source))


def wanted(source: Path, *variants: str, sha256: str = "", name: str = "tiny") -> Wanted:
    return Wanted(name=name, source=str(source), licence="", variants=variants, sha256=sha256)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "models")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.write_tiny_gguf(tmp_path / "tiny.gguf", layers=1)


def test_published_models_are_found(store: ModelStore) -> None:
    """What is published is listed, read and located; what is not is missing, with a remedy."""
    assert store.list() == []
    publish(store, "b")
    publish(store, "a")
    assert [m.name for m in store.list()] == ["a", "b"]
    assert store.get("a") == manifest("a")
    assert (store.variant_path("a", "fp32") / "model.onnx").read_bytes() == b"weights"
    for lookup in (
        lambda: store.get("c"),
        lambda: store.variant_path("a", "int8"),
        lambda: store.variant_path("c", "x"),
    ):
        with pytest.raises(ModelMissing) as raised:
            lookup()
        assert "calm models pull" in raised.value.remedy


@pytest.mark.parametrize("name", ["../a", ".", "", "a/b", ".lock"])
def test_names_stay_inside_the_store(store: ModelStore, name: str) -> None:
    """A name that would lead out of the store is no model's name, also for removal."""
    publish(store, "a")
    with pytest.raises(ModelMissing):
        store.remove(name)
    assert [m.name for m in store.list()] == ["a"]


def test_removed_models_are_gone(store: ModelStore) -> None:
    """Removing deletes the model's folder and leaves nothing behind."""
    publish(store)
    store.remove("tiny")
    assert not store.has("tiny")
    assert [p.name for p in store.root.iterdir() if p.is_dir()] == []


def test_verify_finds_damage(store: ModelStore) -> None:
    """A file that differs from the manifest, or is missing, is named."""
    publish(store)
    store.verify("tiny")
    file = store.path("tiny") / "fp32/model.onnx"
    file.write_bytes(b"weighed")
    with pytest.raises(ChecksumMismatch, match=r"fp32/model\.onnx"):
        store.verify("tiny")
    file.unlink()
    with pytest.raises(ChecksumMismatch):
        store.verify("tiny")


def test_a_failed_preparation_leaves_nothing(store: ModelStore) -> None:
    """A folder that is not published is removed, and what was there stays."""
    publish(store, source="first")
    with pytest.raises(RuntimeError), store.locked(), store.staging() as folder:
        (folder / "model.onnx").write_bytes(b"half")
        raise RuntimeError
    assert store.get("tiny").source == "first"
    assert [p.name for p in store.root.iterdir() if p.is_dir()] == ["tiny"]


def test_a_killed_replacement_is_undone(store: ModelStore) -> None:
    """After a process was killed between the two renames, the next change puts the old model back."""
    publish(store)
    left = store.root / ".old-x"
    left.mkdir()
    store.path("tiny").rename(left / "model")
    (store.root / ".new-y").mkdir()
    with store.locked():
        assert store.get("tiny") == manifest()
    assert [p.name for p in store.root.iterdir() if p.is_dir()] == ["tiny"]


def test_one_change_at_a_time(store: ModelStore) -> None:
    """While one holder changes the store, another waits, and gives up when it has waited long enough."""
    store.root.mkdir()
    with (store.root / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(NotReady), store.locked(timeout_s=0.0):
            pass
    with store.locked(timeout_s=0.0):
        pass


def test_readers_never_find_the_name_free(store: ModelStore) -> None:
    """While a model is replaced again and again, every read finds it."""
    publish(store)
    done, seen, lost = threading.Event(), set[str](), list[Exception]()

    def read() -> None:
        while not done.is_set():
            try:
                seen.add(store.get("tiny").source)
            except ModelMissing as error:
                lost.append(error)
                return

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(60):
        publish(store, source=f"s{turn}")
    done.set()
    reader.join(10)
    assert not lost
    assert seen


def test_pull_makes_what_is_missing_and_keeps_the_rest(store: ModelStore, source: Path) -> None:
    """A second pull adds the new variant; the first keeps its very file, and the same pull again does nothing."""
    first = pull(wanted(source, "int8"), store, Silent())
    inode = (store.variant_path("tiny", "int8") / "model.onnx.data").stat().st_ino
    assert missing([wanted(source, "int8", "int4")], store)
    second = pull(wanted(source, "int8", "int4"), store, Silent())
    assert [v.name for v in second.variants] == ["int8", "int4"]
    assert second.variant("int8") == first.variant("int8")
    assert (store.variant_path("tiny", "int8") / "model.onnx.data").stat().st_ino == inode
    store.verify("tiny")
    source.unlink()
    assert pull(wanted(source, "int4"), store, Silent()) == second
    assert {p.name for p in store.root.iterdir()} == {"tiny", ".lock", ".swap"}


def test_variants_of_another_converter_are_made_anew(
    store: ModelStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an update of the importer a pull makes its variants again; without their source they stay in use."""
    with monkeypatch.context() as older:
        older.setattr(gguf_import, "CONVERTER", 1)
        first = pull(wanted(source, "int8"), store, Silent())
    assert missing([wanted(source, "int8")], store)
    second = pull(wanted(source, "int8"), store, Silent())
    assert [(v.name, v.converter) for v in first.variants + second.variants] == [("int8", 1), ("int8", CONVERTER)]
    assert not missing([wanted(source, "int8")], store)
    store.verify("tiny")
    with monkeypatch.context() as newer:
        newer.setattr(pulling, "CONVERTER", CONVERTER + 1)
        assert missing([wanted(source, "int8")], store)
        source.unlink()
        assert not missing([wanted(source, "int8")], store)


def test_pull_never_writes_into_the_present_model(store: ModelStore, tmp_path: Path) -> None:
    """A reader that has the old files open keeps reading the old bytes while a pull adds a variant, for generators
    and embedders alike."""
    gguf = tiny.write_tiny_gguf(tmp_path / "tiny.gguf", layers=1)
    bert = tiny.write_tiny_embedder(tmp_path / "bert", layers=1)
    for one, other in (
        (wanted(gguf, "int8"), wanted(gguf, "int8", "fp32")),
        (
            Wanted("bert", str(bert), "", ("fp32",), embedder=True),
            Wanted("bert", str(bert), "", ("int8",), embedder=True),
        ),
    ):
        pull(one, store, Silent())
        held = tmp_path / f"held-{one.name}"
        shutil.copytree(store.path(one.name), held, copy_function=lambda a, b: Path(b).hardlink_to(a))
        before = bytes_of(held)
        made = pull(other, store, Silent())
        assert bytes_of(held) == before
        assert len(made.variants) == 2
        store.verify(one.name)


def test_another_source_or_pin_replaces_the_model(store: ModelStore, source: Path, tmp_path: Path) -> None:
    """When the fleet names other bytes for a name, the model is made anew from them; equal bytes elsewhere are not
    fetched again."""
    pull(wanted(source, "int8", "int4"), store, Silent())
    other = tiny.write_tiny_gguf(tmp_path / "other.gguf", layers=2)
    made = pull(wanted(other, "int8"), store, Silent())
    assert (made.architecture.layers, [v.name for v in made.variants]) == (2, ["int8"])
    sha256 = hashlib.sha256(other.read_bytes()).hexdigest()
    assert not missing([wanted(tmp_path / "elsewhere.gguf", "int8", sha256=sha256)], store)
    assert missing([wanted(other, "int8", sha256="0" * 64)], store)


def test_a_wrong_checksum_changes_nothing(store: ModelStore, source: Path) -> None:
    """Bytes other than the pinned ones are refused, and the store stays as it was."""
    with pytest.raises(ChecksumMismatch):
        pull(wanted(source, "int8", sha256="0" * 64), store, Silent())
    assert store.list() == []
    assert [p.name for p in store.root.iterdir() if p.is_dir()] == []


def test_what_is_no_model_is_refused(store: ModelStore, tmp_path: Path) -> None:
    """A missing path and a file of another kind are answered with what is expected."""
    with pytest.raises(SourceUnavailable, match=r"gone\.gguf"):
        pull(wanted(tmp_path / "gone.gguf", "int8"), store, Silent())
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedModel, match="neither"):
        pull(wanted(tmp_path / "model.bin", "int8"), store, Silent())


def test_an_onnx_folder_is_one_variant(store: ModelStore, source: Path, tmp_path: Path) -> None:
    """A ready folder goes in as the variant that is named, keeps its layout, and cannot be several."""
    pull(wanted(source, "int8"), store, Silent())
    ready = tmp_path / "ready"
    shutil.copytree(store.variant_path("tiny", "int8"), ready)
    shutil.copy(store.path("tiny") / "tokenizer.json", ready)
    (ready / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    made = pull(wanted(ready, "mine", name="ready"), store, Silent())
    assert [(v.name, v.layout) for v in made.variants] == [("mine", "calm")]
    assert made.tokenizer.stop_token_ids == [0, 2]
    store.verify("ready")
    assert not missing([wanted(ready, "mine", name="ready")], store)
    with pytest.raises(UnsupportedModel, match="one variant"):
        pull(wanted(ready, "a", "b", name="other"), store, Silent())


def test_progress_names_each_part(store: ModelStore, source: Path) -> None:
    """The stages of a pull are told in order, by model and variant."""
    told: list[str] = []

    class Listener(Silent):
        def stage(self, name: str, total: int | None) -> None:
            told.append(name)

    progress: pulling.Progress = Listener()
    pull(wanted(source, "int8", "fp32"), store, progress)
    assert told == ["tiny: fetching", "tiny: making int8", "tiny: making fp32"]
