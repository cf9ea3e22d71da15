"""An engine on a GPU, as far as a machine without one allows: everything it chooses and binds, with CPU kernels below.

Sessions are asked for CUDA and made for the CPU; the device's memory is the host's, of which the engine knows only
addresses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import MagicMock

import numpy as np
import onnxruntime as ort
import pytest
from structlog.testing import capture_logs

from services.workers import device as devices
from services.workers import engine_process, pack
from services.workers.engine import cache, runner
from services.workers.engine.batcher import Batcher, Finished, Request
from services.workers.engine.captured import GRAPH_ID, CapturedRunner
from services.workers.engine.energy import AttributedMeter
from services.workers.engine.loader import ON_DEVICE, Opened, open_model, start
from services.workers.engine.runner import SharedKvRunner
from services.workers.engine_process import _gate
from services.workers.protocol import Start
from shared.errors import DeviceUnavailable, ModelMissing
from shared.messages import ArtifactSpec, Device, Sampling
from shared.models.gguf_import import import_gguf
from shared.models.manifest import Manifest
from shared.settings import Settings
from tests.tiny import write_tiny_gguf
from tests.unit.test_gpu import FakeNvml

CUDA = "CUDAExecutionProvider"
CPU = Device(kind="cpu", name="cpu", threads=1)
GPU = Device(kind="cuda", name="gpu", index=2, provider=CUDA, threads=1)
SLOTS, CONTEXT = 2, 64
Session = ort.InferenceSession


class OnTheHost(cache.DeviceCache):
    """The device's memory, here the host's."""

    asked: ClassVar[list[Device]] = []

    def __init__(self, names: Any, rows: Any, shapes: Any, dtype: Any, device: Device) -> None:
        self.asked.append(device)
        super().__init__(names, rows, shapes, dtype, CPU)


class StandIn:
    """Makes sessions on the CPU, and says of those that were asked for CUDA that they are there."""

    def __init__(self) -> None:
        self.asked: list[list[Any]] = []
        self.refuses = False
        """To capture graphs."""
        self.graphs: list[int] = []
        """Of the runs of sessions that may capture."""

    def __call__(self, model: Any, options: Any = None, *, providers: list[Any]) -> Any:
        self.asked.append(providers)
        session = Session(model, options, providers=["CPUExecutionProvider"])
        session.get_providers = lambda: [p if isinstance(p, str) else p[0] for p in providers]
        if any("enable_cuda_graph" in p[1] for p in providers if not isinstance(p, str)):
            if self.refuses:
                raise RuntimeError("This session cannot use the graph capture feature as requested by the user")
            run = session.run_with_iobinding

            def noted(binding: Any, options: ort.RunOptions) -> None:
                self.graphs.append(int(options.get_run_config_entry(GRAPH_ID)))
                run(binding, options)

            session.run_with_iobinding = noted
        return session


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("model")
    gguf = write_tiny_gguf(folder / "tiny.gguf", context=CONTEXT)
    names = ["fp32", "fp16", "int8", "int8-fp16"]
    return folder, import_gguf(gguf, folder, name="t", licence="", source="", variants=names)


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setattr(ort, "InferenceSession", made)
    monkeypatch.setattr(runner, "DeviceCache", OnTheHost)
    monkeypatch.setattr(OnTheHost, "asked", [])
    return made


def spec(model: tuple[Path, Manifest], variant: str, sequences: int = 0) -> ArtifactSpec:
    found = model[1].variant(variant)
    assert found is not None
    return model[1].artifact(found, slots=SLOTS, context=CONTEXT, overhead_bytes=0, sequences=sequences)


def answers(opened: Opened) -> tuple[Batcher, dict[str, tuple[int, ...]]]:
    """Of three that begin alike, of which two run at a time."""
    batcher = start(opened, AttributedMeter("model", 1.0))
    for number in range(3):
        prompt = [*range(30, 50), 60 + number]
        batcher.add(Request(str(number), [], Sampling(max_tokens=6 + 3 * number), prompt=prompt))
    ended: dict[str, tuple[int, ...]] = {}
    while batcher.active:
        ended |= {e.id: e.tokens for e in batcher.step() if isinstance(e, Finished)}
    return batcher, ended


@pytest.mark.parametrize(("asked", "runs"), [("fp32", "fp16"), ("int8", "int8-fp16")])
def test_an_engine_on_a_gpu_answers_as_one_on_the_cpu(
    model: tuple[Path, Manifest], sessions: StandIn, tmp_path: Path, asked: str, runs: str
) -> None:
    """With the half-precision variant, in a cache of its own memory; no weights are packed, no graph joined."""
    _, expected = answers(open_model(*model, spec(model, runs), CPU))
    sessions.asked.clear()
    opened = open_model(*model, spec(model, asked, sequences=8), GPU, caches=[tmp_path / "packed"])
    batcher, got = answers(opened)
    assert got == expected
    asked_of_cuda = [(CUDA, {"device_id": "2", "arena_extend_strategy": "kSameAsRequested"}), "CPUExecutionProvider"]
    own = ["CPUExecutionProvider"]  # of the two that make and copy rows, of the host's memory here
    assert sessions.asked == [asked_of_cuda, own, own]
    assert (opened.provider, opened.joint, opened.piece) == (CUDA, None, ON_DEVICE)
    assert not (tmp_path / "packed").exists()
    assert OnTheHost.asked == [GPU]
    found = batcher._runner
    assert isinstance(found, SharedKvRunner)
    assert (found.compact, found.joins, found.verifies, batcher.free_slots) == (False, False, True, SLOTS)


def test_an_engine_on_a_gpu_decodes_by_graphs_when_it_is_told_to(
    model: tuple[Path, Manifest], sessions: StandIn
) -> None:
    """The same answers, and every decode step a graph of its number of rows."""
    _, expected = answers(open_model(*model, spec(model, "fp16"), CPU, cuda_graphs=True))  # nothing to the CPU
    assert not sessions.graphs
    sessions.asked.clear()
    opened = open_model(*model, spec(model, "fp16"), GPU, cuda_graphs=True)
    batcher, got = answers(opened)
    assert got == expected
    ((first, given), _), *_ = sessions.asked
    assert first == CUDA
    assert given == {"device_id": "2", "arena_extend_strategy": "kSameAsRequested", "enable_cuda_graph": "1"}
    assert isinstance(batcher._runner, CapturedRunner)
    assert len(set(sessions.graphs) - {-1}) == 2  # one sequence alone, and two
    assert sessions.graphs.count(-1) == 3  # each prompt, or what of it was not there yet


def test_an_engine_that_may_not_capture_says_so_and_serves(model: tuple[Path, Manifest], sessions: StandIn) -> None:
    _, expected = answers(open_model(*model, spec(model, "fp16"), CPU))
    sessions.refuses = True
    with capture_logs() as logs:
        batcher, got = answers(open_model(*model, spec(model, "fp16"), GPU, cuda_graphs=True))
    assert got == expected
    assert not isinstance(batcher._runner, CapturedRunner)
    assert [line["event"] for line in logs] == ["cuda_graphs_off"]
    assert "cannot use the graph capture feature" in logs[0]["reason"]


def test_the_setting_reaches_the_engine(model: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def opening(*_: Any, **more: Any) -> None:
        told.update(more)
        raise ModelMissing("enough", "")

    monkeypatch.setattr(engine_process, "open_model", opening)
    monkeypatch.setattr(engine_process, "ModelStore", lambda _path: MagicMock())
    begin = Start(worker="w", spec=spec(model, "fp16"), device=GPU, power_w=1.0)
    for on in (False, True):
        engine = engine_process.Engine(Settings(cuda_graphs=on), begin)
        with pytest.raises(ModelMissing, match="enough"):
            engine._load(begin)
        assert told["cuda_graphs"] is on


def test_what_copies_rows_on_a_gpu_is_not_silently_on_the_cpu() -> None:
    """A copy by addresses of the device would read the host's memory instead."""
    with pytest.raises(DeviceUnavailable, match="CUDA device 2 was asked for"):
        cache._copier(np.float16, GPU)


def test_engines_on_a_gpu_take_no_turns_at_the_cores(model: tuple[Path, Manifest]) -> None:
    told = Start(worker="w", spec=spec(model, "fp16"), device=GPU, power_w=1.0)
    assert _gate(told) is None


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with a driver and three GPUs."""
    monkeypatch.setattr(devices, "_gpu", lambda index, visible: devices.described(FakeNvml(), index, visible))
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])


@pytest.mark.usefixtures("machine")
def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the first that CUDA sees, or the one asked for; one that is not there, or that this ONNX Runtime
    cannot use, is refused when it was asked for, and done without when not."""
    assert devices.probe(Settings(device="auto")).uuid == "GPU-aa11"
    assert devices.probe(Settings(device="cuda:1", cuda_visible_devices="0,2")).uuid == "GPU-bb33"
    assert devices.probe(Settings(device="cpu")).kind == "cpu"
    with pytest.raises(DeviceUnavailable, match="NVML finds no such GPU within CUDA_VISIBLE_DEVICES='0,2'"):
        devices.probe(Settings(device="cuda:2", cuda_visible_devices="0,2"))
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert devices.probe(Settings(device="auto")).kind == "cpu"
    with pytest.raises(DeviceUnavailable, match="no CUDA provider"):
        devices.probe(Settings(device="cuda:0"))


@pytest.mark.usefixtures("machine")
def test_nothing_is_packed_for_the_cpu_of_a_gpu_host(tmp_path: Path) -> None:
    """Its engines would not use it."""
    pack.pack_all(["t/int8"], Settings(home=tmp_path))
    assert list(tmp_path.iterdir()) == []
