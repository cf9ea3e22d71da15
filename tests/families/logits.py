"""Our logits of a tiny model, and the recorded ones of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shared.models.gguf_import import import_gguf
from shared.models.manifest import Manifest
from tests.decoder import Decoder
from tests.families import gguf
from tests.families.cases import VOCAB, Case, Floats, fingerprint, weights

GOLDEN = Path(__file__).parent.parent / "golden" / "families"


class Imported:
    """A tiny model, written as GGUF and imported into `folder`."""

    def __init__(self, case: Case, folder: Path, *variants: str) -> None:
        self.case = case
        self._folder = folder
        source = gguf.write(folder / f"{case.name}.gguf", case, weights(case))
        self.manifest: Manifest = import_gguf(
            source, folder, name=case.name, licence="", source="", variants=variants or ("fp32",)
        )

    def decoder(self, variant: str = "fp32", *, rows: int = 1) -> Decoder:
        file = self._folder / variant / "model.onnx"
        return Decoder(file, self.manifest, rows=rows, length=self.case.capacity)

    def token_by_token(self, variant: str = "fp32") -> Floats:
        """Logits [tokens, vocab], each token read alone with those before it in the cache."""
        decoder = self.decoder(variant)
        return np.concatenate([decoder.step([[token]], [place]) for place, token in enumerate(self.case.ids)])

    def at_once(self, upto: int) -> Floats:
        """Logits [vocab] after the first `upto` tokens, read in one step."""
        return np.asarray(self.decoder().step([self.case.ids[:upto]], [0])[0])

    def in_chunks(self, sizes: list[int]) -> Floats:
        """Logits [chunks, vocab] after each chunk."""
        decoder, read, found = self.decoder(), 0, []
        for size in sizes:
            found.append(decoder.step([self.case.ids[read : read + size]], [read])[0])
            read += size
        return np.stack(found)


def recorded(case: Case) -> Floats:
    """transformers' logits [tokens, vocab]. Fails when the weights are not those that were recorded with."""
    with np.load(GOLDEN / f"{case.name}.npz") as data:
        assert str(data["weights_sha256"]) == fingerprint(weights(case)), (
            "the weights that the seed gives have changed: run `python -m tests.families.make`"
        )
        assert data["logits"].shape == (case.tokens, VOCAB)
        return np.asarray(data["logits"])
