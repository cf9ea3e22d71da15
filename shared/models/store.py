"""The model store: one folder per model with a manifest, changed only by renaming finished folders into place."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from shared.errors import ChecksumMismatch, ModelMissing, NotReady
from shared.models.files import sha256_of
from shared.models.manifest import MANIFEST_FILE, Manifest, Variant, artifact_name
from shared.settings import PACKED

_NEW, _OLD, _LOCK, _SWAP = ".new-", ".old-", ".lock", ".swap"
_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class ModelStore:
    """Models under `root`: `<model>/manifest.json`, its tokenizer, and one folder per variant.

    Whoever changes it holds `locked()`; readers need no lock. Two renames put a new folder in an old one's place:
    the file `.swap` is locked for these only, so that readers never find the name free in between.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def list(self) -> list[Manifest]:
        """Every stored model, by name."""
        if not self.root.is_dir():
            return []
        with self._swap(fcntl.LOCK_SH):
            folders = sorted(
                p for p in self.root.iterdir() if _SLUG.fullmatch(p.name) and (p / MANIFEST_FILE).is_file()
            )
            return [self._read(folder) for folder in folders]

    def get(self, name: str) -> Manifest:
        """The manifest of a model.

        Raises:
            ModelMissing: it is not here.
        """
        with self._swap(fcntl.LOCK_SH):
            if not (self.path(name) / MANIFEST_FILE).is_file():
                raise ModelMissing(f"The model {name!r} is not in the store at {self.root}.", "Run `calm models pull`.")
            return self._read(self.path(name))

    def has(self, name: str) -> bool:
        with self._swap(fcntl.LOCK_SH):
            return (self.path(name) / MANIFEST_FILE).is_file()

    def path(self, name: str) -> Path:
        """Folder of a model, whether or not it exists. Raises ModelMissing when `name` cannot be a model's."""
        if not _SLUG.fullmatch(name):
            raise ModelMissing(f"{name!r} is not a model's name.", "Use letters, digits, `-` and `_`.")
        return self.root / name

    def variant_path(self, name: str, variant: str) -> Path:
        """Folder of a variant's `model.onnx`. Raises ModelMissing when the model or the variant is not here."""
        return self.path(name) / self.variant(name, variant).path

    def variant(self, name: str, variant: str) -> Variant:
        """Raises ModelMissing when the model or the variant is not here."""
        found = self.get(name).variant(variant)
        if found is None:
            raise ModelMissing(f"The model {name!r} has no variant {variant!r}.", "Run `calm models pull`.")
        return found

    @contextlib.contextmanager
    def locked(self, timeout_s: float = 3600.0) -> Iterator[None]:
        """Hold the store for a change; another process's pull waits. Leftovers of a killed one are cleared first.

        Raises:
            NotReady: another process kept the store for `timeout_s`.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / _LOCK).open("a") as file:
            ends_at = time.monotonic() + timeout_s
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= ends_at:
                        raise NotReady(
                            f"Another process has been changing the store at {self.root} for {timeout_s:.0f} s.",
                            "Let it finish, or stop it, and run this again.",
                        ) from None
                time.sleep(0.1)  # flock tells nobody when it becomes free, and blocking in it cannot be bounded
            self._recover()
            yield

    def _recover(self) -> None:
        """After a process was killed: put back a model that was being replaced, and clear what was unfinished."""
        for folder in self.root.glob(f"{_OLD}*"):
            kept = folder / "model"
            if (kept / MANIFEST_FILE).is_file():
                target = self.path(self._read(kept).name)
                if not target.exists():
                    kept.rename(target)
            shutil.rmtree(folder, ignore_errors=True)
        for folder in self.root.glob(f"{_NEW}*"):
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _swap(self, mode: int) -> Iterator[None]:
        """Held exclusively for the instant of the renames, shared by readers. A store that has never been changed,
        or that is mounted read-only without the file, needs none."""
        try:
            file = (self.root / _SWAP).open("a" if mode == fcntl.LOCK_EX else "r")
        except OSError:
            if mode == fcntl.LOCK_EX:
                raise
            yield
            return
        with file:
            fcntl.flock(file, mode)
            yield

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A folder inside the store to prepare a model in; removed unless it was published."""
        self.root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=_NEW, dir=self.root))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, folder: Path, manifest: Manifest) -> Manifest:
        """Put a prepared folder in place of the model's, so that readers see the old or the new, never half."""
        data = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
        target = self.path(manifest.name)
        (folder / MANIFEST_FILE).unlink(missing_ok=True)  # never through a hard link into the present model
        (folder / MANIFEST_FILE).write_bytes(data)
        folder.chmod(0o755)
        for path in [*folder.rglob("*"), folder]:
            _sync(path)
        old = Path(tempfile.mkdtemp(prefix=_OLD, dir=self.root))
        with self._swap(fcntl.LOCK_EX):
            if target.exists():
                target.rename(old / "model")
            folder.rename(target)
        _sync(self.root)
        shutil.rmtree(old, ignore_errors=True)
        return manifest

    def remove(self, name: str) -> None:
        """Delete a model. Raises ModelMissing when it is not here."""
        with self.locked():
            variants = "|".join(re.escape(artifact_name(name, v.name)) for v in self.get(name).variants)
            for packed in (self.root / PACKED).glob("*"):
                if re.fullmatch(f"(?:{variants})-[0-9a-f]{{16}}", packed.name):
                    shutil.rmtree(packed, ignore_errors=True)
            old = Path(tempfile.mkdtemp(prefix=_NEW, dir=self.root))
            with self._swap(fcntl.LOCK_EX):
                self.path(name).rename(old / "model")
            shutil.rmtree(old, ignore_errors=True)

    def verify(self, name: str) -> None:
        """Compare every file of a model with its manifest.

        Raises:
            ChecksumMismatch: names the first file that differs or is missing.
        """
        manifest, folder = self.get(name), self.path(name)
        files = {folder / v.path / file: sha256 for v in manifest.variants for file, sha256 in v.files.items()}
        if manifest.tokenizer.sha256:
            files[folder / manifest.tokenizer.file] = manifest.tokenizer.sha256
        for path, expected in files.items():
            if not path.is_file() or sha256_of(path) != expected:
                raise ChecksumMismatch(
                    f"{path} is not what the manifest says.", f"Run `calm models rm {name}` and pull it again."
                )

    def _read(self, folder: Path) -> Manifest:
        try:
            return msgspec.json.decode((folder / MANIFEST_FILE).read_bytes(), type=Manifest)
        except (msgspec.ValidationError, msgspec.DecodeError, OSError) as error:
            raise ModelMissing(
                f"{folder / MANIFEST_FILE} cannot be read ({error}).", f"Remove {folder} and pull the model again."
            ) from None


def _sync(path: Path) -> None:
    """Have a file or folder on disk before the rename that makes it count."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
