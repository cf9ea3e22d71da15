"""`python -m bench.plots`: each benchmark's results become a picture, and others are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import plots

POINTS = [{"accuracy": 0.4, "energy": 0.1}, {"accuracy": 0.5, "energy": 0.4}]
CURVE = {
    "queries": [100, 200],
    "accuracy": [0.3, 0.4],
    "accuracy_band": [0.1, 0.0],
    "regret": [5, 9],
    "regret_band": [1, 2],
}
RESULTS = {
    "frontier": {"reference": "big", "singles": {"big": {"accuracy": 0.6, "energy": 1.0}}, "curves": {"knn": POINTS}},
    "online": {
        "feedback": 0.2, "offline_accuracy": 0.45, "best_single": 0.4, "policies": {"calm": CURVE, "LinUCB": CURVE},
    },
    "residency": {
        "runs": {
            "blind + lru": {"queries_per_swap": 9.0, "latency_s_mean": 40.0},
            "joint + lru": {"queries_per_swap": float("inf"), "latency_s_mean": 0.7},
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RESULTS)
def test_results_become_a_picture(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"benchmark": name, **RESULTS[name]}))
    assert plots.main([str(file), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_other_results_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "result.json"
    file.write_text('{"benchmark": "memory"}')
    assert plots.main([str(file), "--out", str(tmp_path)]) == 2
    assert "frontier, online, residency" in capsys.readouterr().err
