"""Splits an outcomes folder into two, query by query, by a hash of the id.

`python -m bench.sim.split DIR OUT1 OUT2 [--salt TEXT] [--share 0.5]`
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
import sys
from pathlib import Path

from bench.sim.data import load_outcomes
from shared.errors import CalmError, DataInvalid


def half_of(query_id: str, salt: str = "", share: float = 0.5) -> int:
    """0 with chance `share`, else 1; the same for an id wherever it is asked."""
    first, second = hashlib.sha256(f"{salt}{query_id}".encode()).digest()[:2]
    return int((first & 1) / 2 + second / 512 >= share)


def split(source: Path, targets: tuple[Path, Path], salt: str = "", share: float = 0.5) -> tuple[int, int]:
    """Write both folders, `share` of the queries to the first; returns how many each got.

    Raises:
        DataInvalid: `source` cannot be used, or the share is not between 0 and 1.
    """
    if not 0.0 < share < 1.0:
        raise DataInvalid(f"{share:g} is no share of the queries.", "Write a number above 0 and below 1, such as 0.8.")
    outcomes = load_outcomes(source)
    halves = [half_of(i, salt, share) for i in outcomes.ids]
    for half, target in enumerate(targets):
        target.mkdir(parents=True, exist_ok=True)
        rows = [row for row, h in enumerate(halves) if h == half]
        with gzip.open(target / "queries.jsonl.gz", "wt", encoding="utf-8") as file:
            for row in rows:
                query = {"id": outcomes.ids[row], "category": outcomes.categories[row], "prompt": outcomes.prompts[row]}
                file.write(json.dumps(query) + "\n")
        with gzip.open(target / "outcomes.csv.gz", "wt", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            answers = ["answer"] if outcomes.answer is not None else []
            writer.writerow(["query_id", "model", *answers, "correct", "output_chars"])
            for row in rows:
                for column, name in enumerate(outcomes.models):
                    score = float(outcomes.score[row, column])
                    if score == score:  # not NaN: this model was asked
                        answer = [] if outcomes.answer is None else [str(outcomes.answer[row, column])]
                        chars = round(float(outcomes.tokens_out[row, column]) * 4)
                        writer.writerow([outcomes.ids[row], name, *answer, f"{score:g}", chars])
    return halves.count(0), halves.count(1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sim.split", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("targets", type=Path, nargs=2)
    parser.add_argument("--salt", default="", help="another text gives another split")
    parser.add_argument("--share", type=float, default=0.5, help="of the queries that the first folder gets")
    arguments = parser.parse_args(argv)
    try:
        counts = split(arguments.source, tuple(arguments.targets), arguments.salt, arguments.share)
    except CalmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{counts[0]} queries in {arguments.targets[0]}, {counts[1]} in {arguments.targets[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
