"""Draws the figures of docs/decision-model.md from what benches wrote with `--json` (needs the extra `plot`).

    python -m bench.plots --out docs/plots FILE.json ...

Which figure a file becomes is said by its `benchmark`: `frontier`, `online` or `residency`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENERGIES = (0.05, 0.1, 0.2, 0.5, 1.0)
OURS, OTHERS = "tab:red", "tab:grey"
BOUND_QUERIES_PER_SWAP = 20
SWAPS = (10, 20, 50, 100, 200)
SECONDS = (0.5, 1, 2, 5, 10, 20, 50)
LABEL_PX, LABEL_WIDTH_PX = 12, 170
"""Room that a label takes, in pixels."""


def frontier(plt: Any, result: dict[str, Any]) -> Any:
    """Accuracy against energy: curves of those that escalate, points of single models."""
    figure, axis = plt.subplots(figsize=(8, 5))
    styles = {
        "knn": ("tab:blue", "--", "kNN"),
        "ridge": ("tab:green", "--", "ridge"),
        "win-rate": ("tab:grey", ":", "win rate"),
        "calm, one answer": ("tab:orange", "-", "calm, one answer"),
        "calm, retry": ("tab:pink", "-", "calm, retries"),
        "calm-escalate": (OURS, "-", "calm-escalate"),
    }
    for name, (color, line, label) in styles.items():
        points = result["curves"].get(name, [])
        axis.plot(
            [p["energy"] for p in points], [p["accuracy"] for p in points], line, color=color, label=label,
            linewidth=2.2 if name == "calm-escalate" else 1.4, marker="." if name.startswith("calm") else None,
        )  # fmt: skip
    for name, p in result["singles"].items():
        axis.plot(p["energy"], p["accuracy"], "s", color=OTHERS, markersize=4)
        axis.annotate(name, (p["energy"], p["accuracy"]), fontsize=7, xytext=(4, -9), textcoords="offset points")
    axis.set_xscale("log")
    axis.set_xlim(0.04, 2.0)
    axis.set_xticks(ENERGIES, [f"{e:g}" for e in ENERGIES])
    axis.minorticks_off()
    axis.set_xlabel(f"energy of a query, relative to {result['reference']} alone")
    axis.set_ylabel("accuracy")
    axis.legend(fontsize=8, loc="upper left")
    return figure


def online(plt: Any, result: dict[str, Any]) -> Any:
    """Accuracy of the best guess, and regret, as queries come in, with bands of two standard errors."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    colors = {"calm": OURS, "calm, cards": "tab:orange", "calm, judged only": "tab:pink", "linucb": "tab:blue"}
    for axis, what, label in ((axes[0], "accuracy", "accuracy of the best guess"), (axes[1], "regret", "regret")):
        for name, p in result["policies"].items():
            color = colors.get(name)
            (line,) = axis.plot(p["queries"], p[what], "-" if color else "--", color=color or None, label=name)
            low = [v - b for v, b in zip(p[what], p[f"{what}_band"], strict=True)]
            high = [v + b for v, b in zip(p[what], p[f"{what}_band"], strict=True)]
            axis.fill_between(p["queries"], low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set_xlabel(f"queries, {result['feedback']:.0%} of them judged")
        axis.set_ylabel(label)
    axes[0].axhline(result["offline_accuracy"], color="black", linewidth=1)
    axes[0].annotate(
        "learned offline", (0, result["offline_accuracy"]), fontsize=8, xytext=(4, 3), textcoords="offset points"
    )
    axes[0].axhline(result["best_single"], color=OTHERS, linewidth=1, linestyle=":")
    axes[0].annotate("best single", (0, result["best_single"]), fontsize=8, xytext=(4, 3), textcoords="offset points")
    axes[1].legend(fontsize=8)
    return figure


def residency(plt: Any, result: dict[str, Any]) -> Any:
    """Mean latency against queries per swap: to the right and down is better. Ablations are left out."""
    figure, axis = plt.subplots(figsize=(9, 5.5))
    runs = {n: r for n, r in result["runs"].items() if not any(word in n for word in ("no ", "noise"))}
    most = max(r["queries_per_swap"] for r in runs.values() if math.isfinite(r["queries_per_swap"]))
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(5, 12 * most)
    axis.set_ylim(0.5, 1.5 * max(r["latency_s_mean"] for r in runs.values()))
    taken: list[tuple[float, float]] = []
    for name, r in sorted(runs.items(), key=lambda item: -item[1]["latency_s_mean"]):
        spot = min(r["queries_per_swap"], 3 * most), r["latency_s_mean"]
        planned = "planned" in name
        axis.plot(*spot, "o" if planned else "s", color=OURS if planned else OTHERS, markersize=5)
        x, y = axis.transData.transform(spot)
        while any(abs(y - other) < LABEL_PX and abs(x - beside) < LABEL_WIDTH_PX for beside, other in taken):
            y -= LABEL_PX / 4
        taken.append((x, y))
        at = axis.transData.inverted().transform((x + 8, y - 3))
        axis.annotate(name, spot, xytext=at, fontsize=7, arrowprops={"arrowstyle": "-", "linewidth": 0.3})
    axis.axvline(BOUND_QUERIES_PER_SWAP, color="black", linewidth=0.8, linestyle=":")
    axis.set_xticks(SWAPS, [f"{n}" for n in SWAPS])
    axis.set_yticks(SECONDS, [f"{s:g}" for s in SECONDS])
    axis.minorticks_off()
    axis.set_xlabel("queries per swap (at the far right: no swap at all)")
    axis.set_ylabel("mean latency (s)")
    return figure


FIGURES: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "frontier": frontier,
    "online": online,
    "residency": residency,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE.json")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    import matplotlib as mpl  # noqa: PLC0415 an extra

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in arguments.results:
        result = json.loads(path.read_text())
        name = result.get("benchmark")
        if name not in FIGURES:
            print(f"error: {path}: no figure for {name!r}; there are {', '.join(FIGURES)}", file=sys.stderr)
            return 2
        figure = FIGURES[name](plt, result)
        for axis in figure.axes:
            axis.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(arguments.out / f"{name}.png", dpi=110)
        plt.close(figure)
        print(f"written: {arguments.out / f'{name}.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
