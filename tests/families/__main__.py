"""Prints how far the logits of each tiny model are from those that transformers gave: `python -m tests.families`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from tests.families.cases import CASES
from tests.families.logits import Imported, recorded


def main() -> None:
    print(f"{'model':20} {'tokens':>6} {'largest logit':>13} {'cached decode':>13} {'prefill':>9} {'same top':>8}")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            imported = Imported(case, Path(folder))
            expected, decoded = recorded(case), imported.token_by_token()
            read = np.stack([imported.at_once(upto) for upto in (case.tokens // 2, case.tokens)])
        prefill = np.abs(read - expected[[case.tokens // 2 - 1, -1]]).max()
        same = (decoded.argmax(-1) == expected.argmax(-1)).mean()
        print(
            f"{case.name:20} {case.tokens:6} {np.abs(expected).max():13.2f} {np.abs(decoded - expected).max():13.1e} "
            f"{prefill:9.1e} {same:8.0%}"
        )


if __name__ == "__main__":
    main()
