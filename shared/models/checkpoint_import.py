"""Imports a Hugging Face checkpoint of a known family into the same graphs as the GGUF importer; no torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from msgspec import structs
from tokenizers import Tokenizer

from shared.errors import NeedsExport, UnsupportedModel
from shared.models import onnx_dir
from shared.models.checkpoint import CheckpointFile
from shared.models.families import family_of
from shared.models.families.read import read
from shared.models.files import weights_file
from shared.models.gguf_import import GgufModel, import_model
from shared.models.manifest import Manifest, TokenizerInfo


class CheckpointModel(GgufModel):
    """A checkpoint opened for import.

    Raises:
        NeedsExport: of no family that a graph is built for, or with a setting that none is built for.
        UnsupportedModel: files are missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        if not (path / "tokenizer.json").is_file():
            raise UnsupportedModel(
                f"{path} holds no tokenizer.json.", "Save the model with its fast tokenizer, or use a GGUF of it."
            )
        try:
            self.file = CheckpointFile(path)
            family = family_of(self.file)
            # llama.cpp's converter reorders the rows of q and k; a checkpoint has them for rotating halves.
            self.spec = read(self.file, replace(family, paired_rotation=False))
        except UnsupportedModel as error:
            raise NeedsExport(error.message, error.remedy) from None
        self.fields = self.file.fields
        self.architecture = self.spec.architecture
        self._path = path

    def write_tokenizer(self, folder: Path) -> TokenizerInfo:
        """Copy `tokenizer.json` and the chat template; returns what the manifest says of them."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").unlink(missing_ok=True)
        shutil.copyfile(self._path / "tokenizer.json", folder / "tokenizer.json")
        info = onnx_dir.tokenizer_info(self._path, folder)
        if "add_bos_token" not in onnx_dir.read_json(self._path / "tokenizer_config.json"):
            info = structs.replace(info, add_bos=_adds_bos(folder / "tokenizer.json", info.bos_token))
        return info


def import_checkpoint(
    path: Path,
    folder: Path,
    *,
    name: str,
    licence: str,
    source: str,
    variants: Sequence[str],
    existing: Manifest | None = None,
    on_variant: Callable[[str], None] = lambda _name: None,
) -> Manifest:
    """Write the variants of the checkpoint at `path` into `folder`; the manifest also lists `existing`'s.

    Raises:
        NeedsExport, UnsupportedModel: see `CheckpointModel`.
    """
    return import_model(
        CheckpointModel(path), weights_file(path), folder, name=name, licence=licence, source=source,
        variants=variants, existing=existing, on_variant=on_variant,
    )  # fmt: skip


def _adds_bos(file: Path, bos: str) -> bool:
    """Whether the tokenizer itself puts its beginning-of-text token first, as Llama 3's does by its post-processor."""
    tokenizer = Tokenizer.from_file(str(file))
    number = tokenizer.token_to_id(bos) if bos else None
    return number is not None and tokenizer.encode("a").ids[:1] == [number]
