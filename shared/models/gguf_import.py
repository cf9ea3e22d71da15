"""Imports a GGUF file: architecture, tokenizer, chat template, and graphs in several precisions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from msgspec.structs import replace

from shared.errors import UnsupportedModel
from shared.models import gguf_tokenizer
from shared.models.families import family_of
from shared.models.families.read import read
from shared.models.families.weights import Weights
from shared.models.files import sha256_of
from shared.models.gguf_file import Floats, GgufFile
from shared.models.manifest import Manifest, TokenizerInfo, Variant
from shared.models.onnx_graph import CONVERTER, DecoderBuilder

PRECISIONS = ("fp32", "fp16", "int8", "int4", "int8-fp16", "int4-fp16")


class GgufModel:
    """A GGUF file opened for import.

    Raises:
        UnsupportedModel: not a GGUF file, of no known family, or with something this importer lacks.
    """

    def __init__(self, path: Path) -> None:
        self.file = GgufFile(path)
        self.fields = self.file.fields
        self.spec = read(self.file, family_of(self.file))
        self.architecture = self.spec.architecture

    def weight(self, name: str) -> Floats | None:
        """A tensor as float32, or None when the file has none of that name."""
        return self.file.weight(name)

    def write_variant(self, precision: str, folder: Path) -> None:
        """Write `model.onnx` in `precision` into `folder`."""
        if precision not in PRECISIONS:
            raise UnsupportedModel(
                f"There is no variant {precision!r}.", f"Variants of a GGUF are {', '.join(PRECISIONS)}."
            )
        if "fp16" in precision and self.spec.family.overflows_half:
            raise UnsupportedModel(
                f"{self.spec.family.name} does not fit into half precision: sums within it pass 65,504.",
                "Use fp32, int8 or int4.",
            )
        DecoderBuilder(self.spec, Weights(self.file, self.spec), precision).save(folder)  # type: ignore[arg-type]

    def write_tokenizer(self, folder: Path) -> TokenizerInfo:
        """Write `tokenizer.json` and the chat template; returns what the manifest says of them."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "tokenizer.json"
        gguf_tokenizer.build(self.fields).save(str(file))
        template = self.fields.get("tokenizer.chat_template", "")
        if template:
            (folder / "chat_template.jinja").write_text(template)
        tokens = self.fields["tokenizer.ggml.tokens"]
        bos = self.fields.get("tokenizer.ggml.bos_token_id")
        eos = self.fields.get("tokenizer.ggml.eos_token_id")
        return TokenizerInfo(
            sha256=sha256_of(file),
            bos_token=tokens[bos] if bos is not None else "",
            eos_token=tokens[eos] if eos is not None else "",
            stop_token_ids=gguf_tokenizer.stop_token_ids(self.fields),
            add_bos=gguf_tokenizer.adds_bos(self.fields),
            chat_template="chat_template.jinja" if template else "",
        )


def import_gguf(
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
    """Write the variants of a GGUF into `folder` and return the manifest, which also lists `existing`'s."""
    return import_model(
        GgufModel(path), path, folder, name=name, licence=licence, source=source, variants=variants,
        existing=existing, on_variant=on_variant,
    )  # fmt: skip


def import_model(
    model: GgufModel,
    weights: Path,
    folder: Path,
    *,
    name: str,
    licence: str,
    source: str,
    variants: Sequence[str],
    existing: Manifest | None = None,
    on_variant: Callable[[str], None] = lambda _name: None,
) -> Manifest:
    """Write variants of an opened model, as `import_gguf` does; `weights` is the file whose checksum stands for it."""
    tokenizer = model.write_tokenizer(folder)
    made: list[Variant] = list(existing.variants) if existing else []
    for precision in variants:
        if any(v.name == precision for v in made):
            continue
        on_variant(precision)
        target = folder / precision
        model.write_variant(precision, target)
        half: Literal["float16"] | None = "float16" if "fp16" in precision else None
        made.append(replace(describe_variant(precision, target, "calm"), kv_dtype=half, converter=CONVERTER))
    licence = licence or str(model.fields.get("general.license", ""))
    return Manifest(
        name=name,
        source=source,
        source_sha256=existing.source_sha256 if existing else sha256_of(weights),
        licence=licence,
        created_at=time.time(),
        architecture=model.architecture,
        tokenizer=tokenizer,
        variants=made,
    )


def describe_variant(name: str, folder: Path, layout: Any, path: str = "") -> Variant:
    """A variant's entry in the manifest, from the files in its folder."""
    files = {file.name: sha256_of(file) for file in sorted(folder.iterdir()) if file.is_file()}
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return Variant(name=name, path=path or name, layout=layout, weights_bytes=size, files=files)
