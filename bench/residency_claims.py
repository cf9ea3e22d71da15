"""What `bench.residency` is to show, from its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Runs = Mapping[str, Mapping[str, Any]]
PER_SWAP = 20.0
"""Queries for each swap at least: no thrashing."""
AT_EQUAL = ("latency_s_mean", "latency_s_p95", "queries_per_swap")


def claims(runs: Runs, lighter: Sequence[float]) -> list[tuple[str, float, str]]:
    """(claim, figure, bound). `lighter`: shares of the weight of latency that the joint router was run with besides."""

    def less(a: str, b: str, key: str = "latency_s_mean") -> float:
        return 1.0 - float(runs[a][key]) / float(runs[b][key])

    optimum = best(runs, "blind + ", 0.0) or "blind + planned"
    calm = best(runs, "blind + ", PER_SWAP)
    found: list[tuple[str, float, str]] = []
    for ours in ("blind + planned", "blind + planned, patient", "joint + planned"):
        for other in ("lru", "gdsf"):
            found.append((f"{ours}: mean latency below blind + {other}", less(ours, f"blind + {other}"), ">= 0.25"))
        found.append((f"{ours}: queries per swap", float(runs[ours]["queries_per_swap"]), "> 20"))
        found.append((f"{ours}: mean latency above {optimum}", -less(ours, optimum), "<= 0.15"))
        if calm is not None:
            found.append((f"{ours}: the same, at most a swap in 20 queries ({calm})", -less(ours, calm), "<= 0.15"))
    found.append(("joint + planned: mean latency above joint + foresight",
                  -less("joint + planned", "joint + foresight"), "<= 0.15"))  # fmt: skip
    separate = "blind + planned"
    gain = less("joint + planned", separate, "latency_s_p95")
    gap = float(runs["joint + planned"]["accuracy"]) - float(runs[separate]["accuracy"])
    found.append(("joint against separate, same weights: p95 latency below", gain, ">= 0.15"))
    found.append(("the same: difference of accuracy", gap, ""))
    equal = at_equal_quality(runs, lighter, float(runs[separate]["accuracy"]))
    if equal is None:
        found.append(("joint is less accurate than separate at every weight", gap, "equal quality"))
        return found
    share, figures = equal
    found.append(("joint at equal quality: share of the weight of latency", share, ""))
    found.append(("the same: p95 latency below separate",
                  1.0 - figures["latency_s_p95"] / float(runs[separate]["latency_s_p95"]), ">= 0.15"))  # fmt: skip
    found.append(("the same: mean latency below separate",
                  1.0 - figures["latency_s_mean"] / float(runs[separate]["latency_s_mean"]), ""))  # fmt: skip
    found.append(("the same: p95 latency, s", figures["latency_s_p95"], ""))
    found.append(("the same: queries per swap", figures["queries_per_swap"], "> 20"))
    return found


def best(runs: Runs, prefix: str, per_swap: float) -> str | None:
    """The residency policy with the least mean latency that swaps no more often than this; None if none does."""
    allowed = [n for n, f in runs.items() if n.startswith(prefix) and float(f["queries_per_swap"]) >= per_swap]
    return min(allowed, key=lambda n: float(runs[n]["latency_s_mean"]), default=None)


def at_equal_quality(runs: Runs, lighter: Sequence[float], accuracy: float) -> tuple[float, dict[str, float]] | None:
    """(share of the weight of latency, figures) where the joint router is as accurate as this, drawn straight between
    the two runs around it; None if no weight reaches it."""
    points = [(1.0, runs["joint + planned"])]
    points += [(share, runs[f"joint + planned, latency x {share:g}"]) for share in sorted(lighter, reverse=True)]
    before: tuple[float, Mapping[str, Any]] | None = None
    for share, run in points:
        if float(run["accuracy"]) >= accuracy:
            if before is None:
                return share, {key: float(run[key]) for key in AT_EQUAL}
            was_share, was = before
            part = (accuracy - float(was["accuracy"])) / (float(run["accuracy"]) - float(was["accuracy"]))
            mixed = {key: float(was[key]) + part * (float(run[key]) - float(was[key])) for key in AT_EQUAL}
            return was_share + part * (share - was_share), mixed
        before = (share, run)
    return None
