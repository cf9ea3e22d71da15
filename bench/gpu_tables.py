"""What `bench.gpu` measured, in tables; and what follows from it about processes."""

from __future__ import annotations

from typing import Any

from bench.report import print_table
from shared.settings import format_bytes

MOST_LOST, LEAST_SAVED = 0.05, 0.1
"""Several models in one process are worth it when closing one keeps no more than this share of its bytes, and when
what is saved is at least this share of the smallest model's: stated before anything has been measured."""


def show(result: dict[str, Any]) -> None:
    """Tables of it all, and what decides on processes."""
    print_table(
        "loading and evicting (most: at the most sequences at once; of these, weights and KV cache by arithmetic)",
        ("model", "graphs", "process, s", "open, s", "first answer, s", "held, MB", "most, MB", "weights and KV, MB",
         "evict, s", "given back"),
        [
            [x["artifact"], _on(x), x["process_s"], x.get("open_s", "-"), x.get("ready_s", "-"),
             _mb(x.get("held_bytes")), _mb(x.get("most_bytes")), _mb(x.get("counted_bytes")), x["evict_s"],
             x["given_back"]]
            for x in result["models"]
        ],
    )  # fmt: skip
    counted = {
        "nvml": "joules by NVML's counter of the whole device", "rapl": "joules by RAPL's counters of the whole host",
    }.get(result["energy"], "joules ESTIMATED from stated powers")  # fmt: skip
    print_table(
        f"reading and writing ({counted})",
        ("model", "graphs", "at once", "tokens/s", "step, ms", "runner, ms", "J/token"),
        [
            row
            for x in result["models"] if "prefill" in x
            for row in (
                [x["artifact"], _on(x), "prompt", x["prefill"]["tokens_per_s"], "", "", x["prefill"]["token_j"]],
                *(
                    [x["artifact"], _on(x) if not x["graphs"] or one["captured"] else "failed", one["batch"],
                     one["tokens_per_s"], 1e3 * one["step_s"], 1e3 * one["runner_s"], one["token_j"]]
                    for one in x["decode"]
                ),
            )
        ],
    )  # fmt: skip
    if result["together"]:
        print(decision(result["together"], result["kind"]))


def decision(t: dict[str, Any], kind: str) -> str:
    """What was found about processes, and what follows by the rule of docs/gpu.md for a GPU."""
    share = t["saved_bytes"] / max(t["model_bytes"], 1)
    worth = share >= LEAST_SAVED and t["close_gives_back"] >= 1.0 - MOST_LOST
    follows = "several models in one process are worth building" if worth else "one process a model stays"
    follows = f"By that, {follows}." if kind == "cuda" else "It decides nothing on a CPU, where engines are forked."
    return (
        f"\nOne process a model, or several models in one ({t['count']} x {t['shape']} {t['precision']}):\n"
        f"  a process that only touched the device holds {format_bytes(t['context_bytes'])};\n"
        f"  apart {format_bytes(t['apart_bytes'])}, in one {format_bytes(t['one_bytes'])}: one saves"
        f" {format_bytes(t['saved_bytes'])} a further model, {share:.0%} of its own {format_bytes(t['model_bytes'])}"
        f" (wanted: {LEAST_SAVED:.0%});\n"
        f"  a load takes {t['apart_load_s']:.2f} s apart and {t['one_load_s']:.2f} s in a process that runs;\n"
        f"  closing a model in a process gives {t['close_gives_back']:.0%} of its bytes back"
        f" (wanted: {1.0 - MOST_LOST:.0%}); ending a process, all.\n"
        f"{follows}"
    )


def _on(found: dict[str, Any]) -> str:
    return "refused" if "refused" in found else "on" if found["graphs"] else "off"


def _mb(count: float | None) -> Any:
    return "-" if count is None else count / 1e6
