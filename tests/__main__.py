"""`python -m tests`: every check of the project, in order; stops at the first that fails. pytest comes last."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sysconfig.get_path("scripts"))

CHECKS = (
    ("ruff check", [str(SCRIPTS / "ruff"), "check", "."]),
    ("ruff format", [str(SCRIPTS / "ruff"), "format", "--check", "."]),
    ("mypy", [str(SCRIPTS / "mypy")]),
    ("import boundaries", [str(SCRIPTS / "lint-imports")]),
    ("pytest", [sys.executable, "-m", "pytest", *sys.argv[1:]]),
)


def main() -> int:
    """Run the checks; the exit status of the first that fails, else 0."""
    for name, command in CHECKS:
        began = time.monotonic()
        print(f"== {name}: {' '.join(command)}", flush=True)
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if status:
            print(f"== {name} failed with status {status}", file=sys.stderr, flush=True)
            return status
        if name != "pytest":  # pytest's own summary is the last line
            print(f"== {name} passed in {time.monotonic() - began:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
