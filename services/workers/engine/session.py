"""Opens ONNX Runtime sessions, and refuses one that is not on the device that was asked for."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

import onnxruntime as ort

from shared.errors import DeviceUnavailable, UnsupportedModel
from shared.messages import Device

_SAVE = {
    "optimized_model_external_initializers_file_name": "model.bin",
    "optimized_model_external_initializers_min_size_in_bytes": "1024",
    "save_external_prepacked_constant_initializers": "1",
}


def open_session(
    model: Path,
    device: Device,
    threads: int,
    *,
    spinning: bool = True,
    graph: bytes | None = None,
    optimised: bool = False,
    save_to: Path | None = None,
    cuda_graphs: bool = False,
) -> ort.InferenceSession:
    """A session for `model` on `device` with `threads` intra-op threads; `graph` is run instead of what the file holds,
    with the weights that lie beside it. `save_to` also writes the optimised graph and its packed weights to a folder;
    `optimised` says that the graph is such a one. `cuda_graphs`: its runs may be captured (`engine.captured`).

    Raises:
        DeviceUnavailable: CUDA was asked for and ONNX Runtime fell back to the CPU, which it does silently.
        UnsupportedModel: ONNX Runtime cannot load the graph, or not for capturing.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = max(threads, 1)
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    if optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save_to is not None:
        options.optimized_model_filepath = str(save_to / "model.onnx")
        for key, value in _SAVE.items():
            options.add_session_config_entry(f"session.{key}", value)
    options.log_severity_level = 3
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    # Between two runs the threads sleep. Two engines in turns on two cores (3 prompts of 300 tokens and 48 tokens out
    # each, int8 beside fp32) took 13.7 s while one's threads kept spinning in the other's turn, and 5.6 s since; one
    # alone takes as long as before.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if graph is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.parent))
    providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
    if device.kind == "cuda":
        with contextlib.suppress(AttributeError):  # finds CUDA and cuDNN among installed packages
            ort.preload_dlls()
        providers = [("CUDAExecutionProvider", cuda_options(device, cuda_graphs=cuda_graphs)), "CPUExecutionProvider"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a missing provider: told as an error below
            session = ort.InferenceSession(graph or str(model), options, providers=providers)
    except Exception as error:
        raise UnsupportedModel(f"ONNX Runtime cannot load {model}: {error}", "Pull or add the model again.") from error
    got = session.get_providers()
    if device.kind == "cuda" and got[0] != "CUDAExecutionProvider":
        raise DeviceUnavailable(
            f"CUDA device {device.index} was asked for, and ONNX Runtime gave {got[0]}.",
            "Install the [gpu] extra with matching CUDA libraries, or set CALM_DEVICE=cpu.",
        )
    return session


def cuda_options(device: Device, *, cuda_graphs: bool = False) -> dict[str, str]:
    """The CUDA provider's options. Its arena grows by what is asked for: by default it doubles, and what it then takes
    beyond the need has been counted nowhere."""
    options = {"device_id": str(device.index), "arena_extend_strategy": "kSameAsRequested"}
    return options | {"enable_cuda_graph": "1"} if cuda_graphs else options
