"""The model store: one folder per model with a manifest, changed only by renaming finished folders into place."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from shared.errors import ChecksumMismatch, ModelMissing
from shared.models.files import sha256_of
from shared.models.manifest import MANIFEST_FILE, Manifest, Variant


class ModelStore:
    """Models under `root`: `<model>/manifest.json`, its tokenizer, and one folder per variant."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def list(self) -> list[Manifest]:
        """Every stored model, by name."""
        if not self.root.is_dir():
            return []
        folders = sorted(p for p in self.root.iterdir() if (p / MANIFEST_FILE).is_file() and p.name[0] != ".")
        return [self._read(folder) for folder in folders]

    def get(self, name: str) -> Manifest:
        """The manifest of a model.

        Raises:
            ModelMissing: it is not here.
        """
        if not self.has(name):
            raise ModelMissing(f"The model {name!r} is not in the store at {self.root}.", "Run `calm models pull`.")
        return self._read(self.path(name))

    def has(self, name: str) -> bool:
        return (self.path(name) / MANIFEST_FILE).is_file()

    def path(self, name: str) -> Path:
        return self.root / name

    def variant(self, name: str, variant: str) -> Variant:
        """Raises ModelMissing when the model or the variant is not here."""
        found = self.get(name).variant(variant)
        if found is None:
            raise ModelMissing(f"The model {name!r} has no variant {variant!r}.", "Run `calm models pull`.")
        return found

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store for a change; another process's pull waits."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A folder inside the store to prepare a model in; removed unless it was published."""
        self.root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".new-", dir=self.root))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, folder: Path, manifest: Manifest) -> Manifest:
        """Put a prepared folder in place of the model's, so that readers see the old or the new, never half."""
        data = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
        with (folder / MANIFEST_FILE).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        folder.chmod(0o755)
        target = self.path(manifest.name)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=".old-", dir=self.root))
            target.rename(old / "model")
            folder.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            folder.rename(target)
        return manifest

    def remove(self, name: str) -> None:
        """Delete a model. Raises ModelMissing when it is not here."""
        self.get(name)
        with self.locked():
            shutil.rmtree(self.path(name))

    def verify(self, name: str) -> None:
        """Compare every file of a model with its manifest.

        Raises:
            ChecksumMismatch: names the first file that differs or is missing.
        """
        manifest = self.get(name)
        for variant in manifest.variants:
            for file, expected in variant.files.items():
                path = self.path(name) / variant.path / file
                if not path.is_file() or sha256_of(path) != expected:
                    raise ChecksumMismatch(
                        f"{path} is not what the manifest says.", f"Run `calm models rm {name}` and pull it again."
                    )

    def _read(self, folder: Path) -> Manifest:
        try:
            return msgspec.json.decode((folder / MANIFEST_FILE).read_bytes(), type=Manifest)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise ModelMissing(
                f"{folder / MANIFEST_FILE} cannot be read ({error}).", f"Remove {folder} and pull the model again."
            ) from None
