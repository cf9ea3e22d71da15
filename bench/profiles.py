"""Fits a hardware profile to published measurements, and shows how well.

`python -m bench.profiles fit CSV [--write profiles/h100.toml]`

The CSV has `model`, `params_billions`, `active_params_billions`, `num_gpus`, `max_num_seqs` (b), `median_itl_ms` and
`energy_per_output_token_j`. With P parameters per GPU (billions), P_all active ones and g GPUs, by least squares on
relative errors over the dense models and b up to 256:

    step_ms = c0 + c1 P + (c2 + c3 P) b            weights are read once a step, and each sequence adds its share
    token_j = (d0 P_all + d2 g) / b + d1 P_all + d3
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.report import print_table
from shared.errors import DataInvalid

LARGEST_BATCH = 256
ANCHORS = ("Llama-3.1-8B-Instruct", "Llama-3.1-70B-Instruct")
ANCHOR_SEQUENCES = 32
COLUMNS = ("params_billions", "active_params_billions", "num_gpus", "max_num_seqs", "median_itl_ms",
           "energy_per_output_token_j")  # fmt: skip
Floats = NDArray[np.float64]


def read(path: Path) -> tuple[list[str], Floats]:
    """Model names and [rows, 6] figures, in the order of `COLUMNS`."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return [r["model"] for r in rows], np.array([[float(r[c]) for c in COLUMNS] for r in rows])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataInvalid(
            f"It cannot be used ({error}).", f"Give a CSV with the columns model, {', '.join(COLUMNS)}.", path=str(path)
        ) from None


def fit(figures: Floats) -> tuple[Floats, Floats]:
    """Coefficients (c0..c3) and (d0..d3)."""
    total, active, gpus, batch, step, joules = figures[
        (figures[:, 0] == figures[:, 1]) & (figures[:, 3] <= LARGEST_BATCH)
    ].T
    c, *_ = np.linalg.lstsq(_time(total / gpus, batch) / step[:, None], np.ones_like(step), rcond=None)
    d, *_ = np.linalg.lstsq(_energy(active, gpus, batch) / joules[:, None], np.ones_like(step), rcond=None)
    return c, d


def _time(per_gpu: Floats, batch: Floats) -> Floats:
    return np.stack([np.ones_like(per_gpu), per_gpu, batch, per_gpu * batch], axis=1)


def _energy(active: Floats, gpus: Floats, batch: Floats) -> Floats:
    return np.stack([active / batch, active, gpus / batch, np.ones_like(active)], axis=1)


def anchors(names: list[str], figures: Floats) -> list[tuple[float, float]]:
    """(billions of parameters, joules a token) of the anchor models at 32 sequences."""
    return [
        (float(row[1]), float(row[5]))
        for name, row in zip(names, figures, strict=True)
        if name.split("/")[-1] in ANCHORS and row[3] == ANCHOR_SEQUENCES
    ]


def show(names: list[str], figures: Floats, c: Floats, d: Floats) -> None:
    """Print the fit and its errors, by model and number of GPUs."""
    print(f"step_ms = {c[0]:.3f} + {c[1]:.4f} P + ({c[2]:.4f} + {c[3]:.5f} P) b")
    print(f"token_j = ({d[0]:.4f} P_all + {d[2]:.4f} g) / b + {d[1]:.5f} P_all + {d[3]:.4f}")
    rows = []
    for name, gpus in dict.fromkeys(zip(names, figures[:, 2], strict=True)):
        mine = figures[
            [
                n == name and g == gpus and b <= LARGEST_BATCH
                for n, g, b in zip(names, figures[:, 2], figures[:, 3], strict=True)
            ]
        ]
        total, active, g, batch, step, joules = mine.T
        idle = 1.0 - active / total
        read = np.where(idle > 0.0, total * (1.0 - idle**batch), total) / g
        time_error = np.abs((c[0] + c[1] * read + (c[2] + c[3] * active / g) * batch) / step - 1.0)
        energy_error = np.abs(_energy(active, g, batch) @ d / joules - 1.0)
        rows.append([name.split("/")[-1], int(gpus), len(mine), time_error.mean(), time_error.max(),
                     energy_error.mean(), energy_error.max()])  # fmt: skip
    print_table(
        f"relative errors up to {LARGEST_BATCH} sequences (mixtures of experts were not fitted)",
        ("model", "GPUs", "rows", "time mean", "time max", "energy mean", "energy max"), rows,
    )  # fmt: skip


def write(path: Path, c: Floats, d: Floats, marks: list[tuple[float, float]]) -> None:
    """Replace the `[fit]` section of a profile, and keep the rest."""
    text = path.read_text(encoding="utf-8")
    section = "\n".join(
        [
            "[fit]",
            f"step_ms = [{', '.join(f'{x:.6g}' for x in c)}]",
            f"token_j = [{', '.join(f'{x:.6g}' for x in d)}]",
            f"anchors = [{', '.join(f'[{size:g}, {joules:.4g}]' for size, joules in marks)}]",
            f"anchor_sequences = {ANCHOR_SEQUENCES}",
            "",
        ]
    )
    head, _, _ = text.partition("[fit]")
    path.write_text(head + section, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("fit", help="fit to a CSV of measurements")
    one.add_argument("csv", type=Path)
    one.add_argument("--write", type=Path, help="profile whose [fit] section is replaced")
    arguments = parser.parse_args()
    names, figures = read(arguments.csv)
    c, d = fit(figures)
    show(names, figures, c, d)
    if arguments.write:
        write(arguments.write, c, d, anchors(names, figures))


if __name__ == "__main__":
    main()
