"""What libraries do by themselves in our processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
@pytest.mark.parametrize(
    "module", ["services.workers.engine_process", "shared.models.embedder", "services.workers.device"]
)
def test_onnx_runtime_reports_to_nobody(module: str) -> None:
    """Its telemetry, a thread that starts with the import, is off in whatever process of ours imports it."""
    told = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {"OPENBLAS_NUM_THREADS": "1"}
    code = f"import {module}, os, onnxruntime; print(len(os.listdir('/proc/self/task')))"
    found = subprocess.run(
        [sys.executable, "-c", code], env=told, capture_output=True, text=True, timeout=60, check=False
    )
    assert found.stdout.strip() == "1", found.stderr
