"""What `bench.gpu` measured, as a profile that the simulator reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.simulator.profile import PROFILES
from shared.errors import DataInvalid

__all__ = ["PROFILES", "slope", "write_profiles"]

_MARK = "# Measured by `python -m bench.gpu`"


def slope(batches: Sequence[float], steps_s: Sequence[float]) -> float:
    """s in step = first step x (1 + s (batch - 1)), by least squares on relative errors; the first batch is 1."""
    first = steps_s[0]
    pairs = [((b - 1) * first / y, 1 - first / y) for b, y in zip(batches, steps_s, strict=True)]
    square = sum(x * x for x, _ in pairs)
    return sum(x * rest for x, rest in pairs) / square if square else 0.0


def write_profiles(result: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Write `name.toml` and, of what was captured, `name-graphs.toml`; nothing where nothing was measured.

    Raises:
        DataInvalid: a file of that name is there and not from here.
    """
    written = []
    for graphs in (False, True):
        path = folder / f"{name}{'-graphs' if graphs else ''}.toml"
        measured = [one for one in result["models"] if one["graphs"] == graphs and one.get("decode")]
        if graphs:
            measured = [one for one in measured if all(each["captured"] for each in one["decode"])]
        if not measured:
            continue
        if path.is_file() and not path.read_text(encoding="utf-8").startswith(_MARK):
            raise DataInvalid("This profile is not one of these.", "Give another `--name`.", path=str(path))
        path.write_text(_text(result, path.stem, measured, graphs=graphs), encoding="utf-8")
        written.append(path)
    return written


def _text(result: dict[str, Any], name: str, measured: list[dict[str, Any]], *, graphs: bool) -> str:
    versions = result["machine"]["versions"]
    runtime = next((f"{p} {v}" for p, v in versions.items() if p.startswith("onnxruntime")), "onnxruntime")
    how = "with CUDA graphs" if graphs else "without CUDA graphs"
    if result["kind"] == "cpu":
        how = "over buffers as CUDA graphs need them" if graphs else "as engines run on CPUs, but alone"
    joules = {
        "nvml": "Joules: NVML's counter of the whole device, idle power included.",
        "rapl": "Joules: RAPL's counters of the whole host, idle power included.",
    }.get(result["energy"], "Joules are ESTIMATED from stated powers.")
    driver = f", driver {result['driver']}" if result["driver"] else ""
    lines = [
        f"{_MARK}: {result['device']}{driver}, {result['date']}, {runtime}, {how}.",
        "# Random weights of real shapes, each model alone. A load is a process's start, the model's opening and its",
        "# first token, with weights in the page cache. Not measured: the way through the services (overhead_s), and",
        "# prompts that are read beside other work (beside). decode_j is that of one sequence at a time.",
        f"# {joules}",
        f'name = "{name}"', f'description = "{_plain(result["device"])}, {result["date"]}, {how}"', "shared = true",
        f"turns = {'true' if result['kind'] == 'cpu' else 'false'}", "",
    ]  # fmt: skip
    for one in measured:
        steps = one["decode"]
        figures = {
            "prefill_s": 1.0 / one["prefill"]["tokens_per_s"], "tpot_s": steps[0]["step_s"],
            "slope": max(slope([x["batch"] for x in steps], [x["step_s"] for x in steps]), 0.0),
            "load_s": one["process_s"] + one["ready_s"], "prefill_j": one["prefill"]["token_j"],
            "decode_j": steps[0]["token_j"], "load_j": one["joules"],
        }  # fmt: skip
        by_batch = ", ".join(f"{x['token_j']:.4g} at {x['batch']}" for x in steps)
        lines += [
            f"# Joules of an output token, by sequences at once: {by_batch}.", f'[artifacts."{one["artifact"]}"]',
            *(f"{key} = {value:.5g}" for key, value in figures.items()), "",
        ]  # fmt: skip
    return "\n".join(lines)


def _plain(text: str) -> str:
    """For a TOML string in double quotes."""
    return text.replace("\\", "").replace('"', "")
