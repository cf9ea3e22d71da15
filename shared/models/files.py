"""Small file helpers of the model store."""

from __future__ import annotations

import hashlib
from pathlib import Path


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_file(path: Path) -> Path:
    """What a source's checksum is taken of: the file itself; of a folder its largest file, which holds the weights."""
    if not path.is_dir():
        return path
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return max(files, key=lambda file: file.stat().st_size)
