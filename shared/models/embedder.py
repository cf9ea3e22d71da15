"""Embeds texts with a stored embedding model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tokenizers import Tokenizer

from shared.errors import ModelMissing, UnsupportedModel
from shared.models.manifest import Manifest
from shared.models.static_embedder import StaticEmbedder

MAX_TOKENS = 256
"""What the sentence-transformers MiniLM models were trained with; longer texts are cut."""


def open_embedder(
    folder: Path, manifest: Manifest, variant: str, threads: int = 1
) -> Callable[[list[str]], NDArray[np.float32]]:
    """The embedding function of a stored model's variant: texts [n] to float32 [n, hidden] of unit length.

    Raises:
        ModelMissing: the variant is not in the store.
        UnsupportedModel: it is no embedding model.
    """
    found = manifest.variant(variant)
    if found is not None and found.layout == "static":
        return StaticEmbedder(folder, manifest, found.path).embed
    return Embedder(folder, manifest, variant, threads).embed


class Embedder:
    """A loaded embedding model; `embed` may be called from one thread at a time."""

    def __init__(
        self, folder: Path, manifest: Manifest, variant: str, threads: int = 1, max_tokens: int = MAX_TOKENS
    ) -> None:
        found = manifest.variant(variant)
        if found is None:
            raise ModelMissing(f"{manifest.name} has no variant {variant!r}.", "Pull it with `calm models pull`.")
        if found.layout != "encoder":
            raise UnsupportedModel(f"{manifest.name} is not an embedding model.", "Name an embedder in the fleet file.")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(
            str(folder / found.path / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._tokenizer = Tokenizer.from_file(str(folder / manifest.tokenizer.file))
        self._tokenizer.enable_truncation(min(max_tokens, manifest.architecture.context))
        self._tokenizer.enable_padding()
        self.hidden = manifest.architecture.hidden

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        """Embeddings of unit length: float32 [n, hidden]."""
        if not texts:
            return np.zeros((0, self.hidden), np.float32)
        encoded = self._tokenizer.encode_batch([text[:8192] for text in texts])
        ids = np.array([e.ids for e in encoded], np.int64)
        mask = np.array([e.attention_mask for e in encoded], np.int64)
        result = self._session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        return np.asarray(result, dtype=np.float32)
