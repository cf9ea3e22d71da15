"""Exports a Hugging Face checkpoint with Optimum: any family that it knows, in fp32, into an ONNX folder of the store.

Optimum needs torch, so both belong to the extra `[export]` and run in a process of their own: nothing else imports
them, and what torch takes is given back when it ends. The graph is Optimum's (layout `concat`): slower than those
that the importers build, which is why these come first where they can.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from shared.errors import ExtraMissing, UnsupportedModel
from shared.models import onnx_dir
from shared.models.manifest import Manifest
from shared.models.pull import Progress, Wanted

VARIANT = "fp32"
TIMEOUT_S = 3600.0
_NEEDED = ("optimum", "torch", "transformers")
_TASK = "text-generation-with-past"


def import_exported(
    wanted: Wanted, source: Path, folder: Path, existing: Manifest | None, progress: Progress
) -> Manifest:
    """An importer for `pull`: export the checkpoint in `source`, and take the result in as the variant `fp32`.

    Raises:
        UnsupportedModel: it is no checkpoint, or Optimum refuses it; the message has Optimum's reason.
        ExtraMissing: the extra `[export]` is not installed.
    """
    check_checkpoint(source)
    check_extra()
    progress.stage(f"{wanted.name}: exporting with Optimum", None)
    with tempfile.TemporaryDirectory(prefix="export-", dir=folder) as work:
        exported = Path(work)
        _run(source, exported)
        return onnx_dir.import_folder(
            exported, folder, name=wanted.name, licence=wanted.licence, source=wanted.source,
            variant=VARIANT, existing=existing,
        )  # fmt: skip


def check_checkpoint(source: Path) -> None:
    """Raises UnsupportedModel, which names the first thing that an export would miss."""
    if not source.is_dir():
        raise UnsupportedModel(
            f"{source} is not a folder.", "Give the folder with config.json, safetensors and tokenizer."
        )
    for pattern, what in (
        ("config.json", "config.json"),
        ("*.safetensors", "weights (*.safetensors)"),
        ("tokenizer.json", "tokenizer.json"),
    ):
        if not any(source.glob(pattern)):
            raise UnsupportedModel(f"{source} holds no {what}.", "Copy the model's whole folder, and try again.")
    try:
        json.loads((source / "config.json").read_text())
    except ValueError as error:
        raise UnsupportedModel(
            f"{source / 'config.json'} is not JSON ({error}).", "Is the download complete?"
        ) from None


def check_extra() -> None:
    """Raises ExtraMissing when Optimum or what it needs is not installed; imports none of them."""
    lacking = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if not lacking and importlib.util.find_spec("optimum.exporters.onnx") is None:
        lacking = ["optimum-onnx"]
    if lacking:
        raise ExtraMissing(
            f"Exporting needs {', '.join(lacking)}, which is not installed.",
            'Install the extra: pip install "calm-fleet[export]" (from a clone: pip install -e ".[cpu,export]").',
        )


def _run(source: Path, target: Path) -> None:
    command = [sys.executable, "-m", "shared.models.export", str(source), str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise UnsupportedModel(f"Optimum did not finish within {TIMEOUT_S:.0f} s.", "Use a smaller model.") from None
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise UnsupportedModel(
            f"Optimum could not export {source}: {said[-1] if said else f'status {done.returncode}'}",
            "A GGUF build of the model may be importable instead.",
        )


def _export(source: str, target: str) -> None:
    """In the process of its own."""
    from optimum.exporters.onnx import main_export  # noqa: PLC0415 the extra, with torch behind it

    main_export(
        source, target, task=_TASK, device="cpu", dtype="fp32", do_validation=False, trust_remote_code=False,
        local_files_only=True, library_name="transformers",
    )  # fmt: skip


if __name__ == "__main__":
    _export(*sys.argv[1:])
