"""`python -m bench.gpu`, whole, on the CPU; no GPU has been measured by it."""

from __future__ import annotations

import json
import os
import signal
import tomllib
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

import bench.gpu as command
from bench.gpu_process import Process
from bench.gpu_profile import slope, write_profiles
from bench.gpu_tables import decision, show
from bench.shapes import RandomModel, make
from services.simulator.profile import load_profile
from services.workers import device as devices
from services.workers.engine.energy import ModelMeter, RaplMeter
from shared.errors import DataInvalid, DeviceUnavailable, EngineLost, ModelMissing, NoMemory
from shared.messages import Device

CPU = Device(kind="cpu", name="cpu", threads=1)
QUICK = [
    "--shape", "tiny", "--seconds", "0.02", "--context", "96", "--decode-prompt", "16", "--prompt-tokens", "40",
    "--batch", "1", "2", "3",
]  # fmt: skip
SIZES = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "llama-3.2-3b": 3_212_749_824 + 64,  # with the factors of its rotation
    "qwen2.5-7b": 7_615_616_512,
    "mistral-7b": 7_248_023_552,
}
"""Parameters, as their publishers count them."""


def test_the_whole_of_it_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loads, rates, joules and bytes of a model with and without the buffers that graphs need, in processes of their
    own and in one; and what it wrote is a profile that the simulator reads."""
    kept = tmp_path / "found.json"
    command.main([
        "--device", "cpu", *QUICK, "--precision", "int4-fp16", "--together", "2", "--profiles", str(tmp_path),
        "--name", "here", "--json", str(kept),
    ])  # fmt: skip
    result = json.loads(kept.read_text())
    printed = capsys.readouterr().out
    assert (result["kind"], [one["graphs"] for one in result["models"]]) == ("cpu", [False, True])
    for one in result["models"]:
        assert not {"error", "refused", "stopped_at"} & set(one)
        assert [step["batch"] for step in one["decode"]] == [1, 2, 3]
        assert all(step["captured"] == one["graphs"] for step in one["decode"])
        for figures in (one["prefill"], *one["decode"]):
            assert figures["tokens_per_s"] > 0
            assert figures["token_j"] > 0
        assert all(0 < step["runner_s"] < step["step_s"] for step in one["decode"])
        assert min(one["held_bytes"], one["most_bytes"], *(step["bytes"] for step in one["decode"])) > 0
        assert one["counted_bytes"] == one["weights_bytes"] + 3 * 96 * 2 * 2 * 2 * 16 * 2
        assert min(one["process_s"], one["open_s"], one["evict_s"], one["joules"]) > 0
        assert one["given_back"] > 0.9
    together = result["together"]
    assert together["count"] == 2
    assert together["apart_bytes"] > together["one_bytes"] > 0
    assert together["context_bytes"] > 0
    assert "One process a model, or several models in one (2 x tiny int4-fp16)" in printed
    assert ("ESTIMATED" in printed) == (result["energy"] == "model")

    for name, at in (("here", 0), ("here-graphs", 1)):
        file, measured = tmp_path / f"{name}.toml", result["models"][at]
        assert result["device"] in file.read_text().splitlines()[0]
        assert result["date"] in file.read_text().splitlines()[0]
        assert ("ESTIMATED" in file.read_text()) == (result["energy"] == "model")
        profile = load_profile(file)
        assert (profile.name, profile.turns) == (name, True)
        costs = profile.costs("tiny-int4-fp16", parameters_b=1, active_b=1, memory_bytes=1, gpus=1, sequences=0)
        assert costs.tpot_s == pytest.approx(measured["decode"][0]["step_s"], rel=1e-4)
        assert costs.step_s(1) == costs.tpot_s
        assert costs.prefill_s == pytest.approx(1 / measured["prefill"]["tokens_per_s"], rel=1e-4)
        assert costs.load_s == pytest.approx(measured["process_s"] + measured["ready_s"], rel=1e-4)
        assert costs.decode_j == pytest.approx(measured["decode"][0]["token_j"], rel=1e-4)
        assert min(costs.prefill_j, costs.load_j) > 0


def test_without_a_cuda_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is made or started."""
    monkeypatch.setattr(devices, "_gpu", lambda _index, _visible: None)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(DeviceUnavailable, match="NVML finds no such GPU"):
        command.run(command.arguments_of(QUICK))
    with pytest.raises(SystemExit, match=r"device_unavailable: CUDA device 0 was asked for.*--device cpu --shape tiny"):
        command.main(QUICK)


@pytest.mark.parametrize("shape", SIZES)
def test_shapes_have_the_parameters_of_what_they_are_named_after(shape: str) -> None:
    assert RandomModel(shape).architecture.parameters == SIZES[shape]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    make("tiny", folder, ["fp16"])
    return folder


def test_a_variant_that_is_there_is_not_made_again(store: Path) -> None:
    before = (store / "tiny" / "fp16" / "model.onnx").stat().st_mtime_ns
    made: list[str] = []
    manifest = make("tiny", store, ["fp16", "int8-fp16"], made.append)
    assert made == ["int8-fp16"]
    assert [variant.name for variant in manifest.variants] == ["fp16", "int8-fp16"]
    assert (store / "tiny" / "fp16" / "model.onnx").stat().st_mtime_ns == before


def test_errors_of_the_measuring_process_are_raised_as_what_they_are(store: Path) -> None:
    """And one that ends by itself is told, not waited for."""
    process = Process(CPU)
    try:
        with pytest.raises(ModelMissing, match="no variant 'int2'"):
            process.ask("open", key="x", store=str(store), model="tiny", variant="int2", context=32, graphs=False)
        process.ask("context")  # it goes on
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineLost, match="exit code -9"):
            process.ask("context")
    finally:
        process.end()


class Full:
    """A process whose memory holds two sequences, or, with 0, not even the model."""

    energy, start_s, pid = "nvml", 1.0, os.getpid()

    def __init__(self, most: int, *, captures: bool = True, captured: bool = True) -> None:
        self.most = most
        self.captures = captures
        self.captured = captured
        self.asked: list[int] = []

    def ask(self, name: str, **more: Any) -> dict[str, Any]:
        if name == "open":
            if not self.most:
                raise NoMemory("The model does not fit.", "")
            return {
                "open_s": 1.0, "ready_s": 2.0, "joules": 5.0, "captures": self.captures, "weights_bytes": 100,
                "kv_bytes_per_token": 2,
            }  # fmt: skip
        if name == "decode":
            self.asked.append(more["batch"])
            if more["batch"] > self.most:
                raise NoMemory("No memory.", "")
            return {
                "batch": more["batch"], "captured": self.captured, "step_s": 0.01, "tokens_per_s": 100.0,
                "runner_s": 0.009, "token_j": 1.0,
            }  # fmt: skip
        return {"tokens": 8, "tokens_per_s": 1000.0, "token_j": 0.1}

    def end(self) -> float:
        return 0.1


def measured(monkeypatch: pytest.MonkeyPatch, process: Full, *, graphs: bool = False) -> dict[str, Any]:
    arguments = command.arguments_of(["--device", "cpu", *QUICK, "--batch", "1", "2", "4", "8"])
    bench = command.Bench(arguments, CPU, None)
    monkeypatch.setattr(bench, "process", lambda: process)
    monkeypatch.setattr(bench, "used", lambda _processes: 1000)
    return bench.model(Path(), "tiny", "fp16", graphs=graphs)


def test_as_many_at_once_as_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before stays, and no greater number is tried."""
    process = Full(2)
    found = measured(monkeypatch, process)
    assert [one["batch"] for one in found["decode"]] == [1, 2]
    assert process.asked == [1, 2, 4]
    assert found["stopped_at"]["batch"] == 4
    assert found["counted_bytes"] == 100 + 2 * 96 * 2  # of the two rows that there were
    assert "error" not in found


def test_a_model_that_does_not_fit_is_an_entry_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, Full(0))
    assert found["error"] == "The model does not fit."
    assert "decode" not in found
    show({"models": [found], "energy": "nvml", "together": {}})


def result_of(*models: dict[str, Any]) -> dict[str, Any]:
    return {
        "machine": {"versions": {"onnxruntime-gpu": "1.24.0"}}, "device": 'NVIDIA "X"', "kind": "cuda",
        "driver": "570", "date": "2026-01-01", "energy": "nvml", "models": list(models), "together": {},
    }  # fmt: skip


def test_a_profile_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Engines divide it instead of taking turns. What was not captured is in no profile of graphs, and told as what it
    is."""
    ordinary = measured(monkeypatch, Full(8))
    failed = measured(monkeypatch, Full(8, captured=False), graphs=True)
    refused = measured(monkeypatch, Full(8, captures=False), graphs=True)
    result = result_of(ordinary, failed, refused)
    assert write_profiles(result, tmp_path, "x") == [tmp_path / "x.toml"]
    text = (tmp_path / "x.toml").read_text()
    assert text.startswith('# Measured by `python -m bench.gpu`: NVIDIA "X", driver 570, 2026-01-01, onnxruntime-gpu 1')
    assert "NVML's counter of the whole device" in text
    assert tomllib.loads(text)["description"] == "NVIDIA X, 2026-01-01, without CUDA graphs"
    profile = load_profile(tmp_path / "x.toml")
    assert (profile.shared, profile.turns) == (True, False)
    show(result)
    printed = capsys.readouterr().out
    assert "refused" in printed
    assert "failed" in printed


def test_a_profile_of_another_kind_is_not_overwritten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = measured(monkeypatch, Full(8))
    (tmp_path / "h100.toml").write_text("# by hand\n")
    with pytest.raises(DataInvalid, match="--name"):
        write_profiles(result_of(found), tmp_path, "h100")
    assert (tmp_path / "h100.toml").read_text() == "# by hand\n"
    for _ in range(2):  # its own is
        assert write_profiles(result_of(found), tmp_path, "other")


def test_the_slope_is_that_of_the_steps() -> None:
    batches = [1, 2, 4, 8]
    assert slope(batches, [0.01 * (1 + 0.2 * (b - 1)) for b in batches]) == pytest.approx(0.2)
    assert slope([1], [0.01]) == 0.0


@pytest.mark.parametrize(("saved", "given_back", "worth"), [(0.2, 1.0, True), (0.2, 0.9, False), (0.05, 1.0, False)])
def test_what_decides_on_processes_is_printed(saved: float, given_back: float, worth: bool) -> None:
    found = {
        "shape": "s", "precision": "fp16", "count": 3, "context_bytes": 4e8, "apart_bytes": 6e9, "one_bytes": 5e9,
        "model_bytes": 2e9, "saved_bytes": saved * 2e9, "apart_load_s": 3.0, "one_load_s": 1.0, "close_s": 0.1,
        "close_gives_back": given_back,
    }  # fmt: skip
    text = decision(found, "cuda")
    assert ("worth building" in text) == worth
    assert ("one process a model stays" in text) != worth
    assert "decides nothing on a CPU" in decision(found, "cpu")


def test_too_short_a_context_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.arguments_of(["--context", "200", "--batch", "64"])
    assert "--context is too short" in capsys.readouterr().err


def test_the_energy_of_a_cpu_is_read_or_estimated() -> None:
    """As the profile of it says."""
    with_rapl = True
    try:
        RaplMeter()
    except OSError:
        with_rapl = False
    process = Process(CPU)
    try:
        assert process.energy == (RaplMeter.source if with_rapl else ModelMeter.source)
    finally:
        process.end()
