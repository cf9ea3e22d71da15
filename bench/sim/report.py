"""Figures of a simulated run, over seeds with confidence intervals; tables, JSON and plots."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.report import print_table
from services.simulator.engine import Result

T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
"""Student's t, two-sided 95 %, by degrees of freedom."""
COLD_S = 60.0
"""Queries of the first minute count as cold."""


def figures(result: Result, oracle: NDArray[Any], slo_s: float) -> dict[str, float]:
    """Figures of one run. `oracle` [n]: the best score that any allowed model gets."""
    n = len(result.score)
    latency, first = result.latency_s, result.arrival_s < result.arrival_s[0] + COLD_S
    span = float(result.arrival_s[-1] - result.arrival_s[0]) or 1.0
    in_time = latency <= slo_s
    decision = np.array(result.decision_s) if result.decision_s else np.array([math.nan])
    return {
        "accuracy": float(result.score.mean()),
        "energy_j_mean": float((result.energy_j.sum() + result.load_j) / n),
        "latency_s_mean": float(latency.mean()),
        "latency_s_p50": float(np.quantile(latency, 0.5)),
        "latency_s_p95": float(np.quantile(latency, 0.95)),
        "latency_s_p99": float(np.quantile(latency, 0.99)),
        "ttft_s_mean": float(result.ttft_s.mean()),
        "ttft_s_p95": float(np.quantile(result.ttft_s, 0.95)),
        "slo_attainment": float(in_time.mean()),
        "goodput_per_s": float(in_time.sum() / span),
        "residency_hit_rate": float(result.hit.mean()),
        "swaps": float(result.loads),
        "queries_per_swap": n / result.loads if result.loads else math.inf,
        "regret": float(oracle.mean() - result.score.mean()),
        "attempts_mean": float(result.attempts.mean()),
        "latency_s_mean_cold": float(latency[first].mean()),
        "latency_s_mean_warm": float(latency[~first].mean()) if (~first).any() else math.nan,
        "decision_s_p50": float(np.quantile(decision, 0.5)),
        "decision_s_p99": float(np.quantile(decision, 0.99)),
    }


def over_seeds(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Means, and under `ci95` the half-widths of their 95 % confidence intervals."""
    result: dict[str, Any] = {}
    half: dict[str, float] = {}
    for name in runs[0]:
        values = np.array([run[name] for run in runs])
        result[name] = float(values.mean())
        if len(values) > 1 and np.isfinite(values).all():
            half[name] = float(T95.get(len(values) - 1, 1.96) * values.std(ddof=1) / math.sqrt(len(values)))
    result["ci95"] = half
    return result


def show(policies: dict[str, dict[str, Any]], title: str) -> None:
    """The main table."""
    columns = (
        ("accuracy", "accuracy"), ("J", "energy_j_mean"), ("energy ratio", "energy_ratio"),
        ("mean s", "latency_s_mean"), ("p95 s", "latency_s_p95"), ("ratio", "latency_ratio"),
        ("TTFT s", "ttft_s_mean"), ("in SLO", "slo_attainment"),
        ("hits", "residency_hit_rate"), ("swaps", "swaps"), ("regret", "regret"),
    )  # fmt: skip
    rows = []
    for name, f in policies.items():
        cells: list[Any] = [name]
        for _, key in columns:
            value, half = f.get(key), f.get("ci95", {}).get(key)
            cells.append(
                "" if value is None else f"{value:.3f}" + (f" ±{half:.3f}" if half and key == "accuracy" else "")
            )
        rows.append(cells)
    print_table(title, ("policy", *(c for c, _ in columns)), rows)


def plot(path: Path, policies: dict[str, dict[str, Any]], title: str) -> None:
    """Accuracy against energy and against latency, as PNG (needs the extra `plot`)."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axis, key, label in (
        (axes[0], "energy_j_mean", "energy of a query (J)"), (axes[1], "latency_s_mean", "mean latency (s)")
    ):  # fmt: skip
        for name, f in policies.items():
            ours = name.startswith("calm") and name != "calm-as-described"
            axis.plot(f[key], f["accuracy"], "o" if ours else "s", color="tab:red" if ours else "tab:grey")
            axis.annotate(name, (f[key], f["accuracy"]), fontsize=7, xytext=(3, 3), textcoords="offset points")
        frontier = sorted((f[key], f["accuracy"]) for name, f in policies.items() if name.startswith("calm-escalate"))
        if len(frontier) > 1:
            axis.plot(*zip(*frontier, strict=True), "-", color="tab:red", alpha=0.5)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
