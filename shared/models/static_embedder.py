"""Static sentence embeddings distilled from an embedding model: a table by token, looked up and averaged.

After Model2Vec (Tulkens and van Dongen, 2024): every token of the vocabulary is embedded alone by the full model,
the table is centred and rotated onto its principal components, and rows are weighted by how rare their token is
(smooth inverse frequency after Arora et al., 2017, with Zipf's law in place of counts). Embedding a text then costs
its tokenizing, some microseconds, where the transformer costs milliseconds on a busy CPU.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from shared.models.manifest import Manifest

TABLE = "table.npy"
_SIF = 1e-3
_MAX_CHARS = 8192
_WORDS = 50_000
"""Words whose tokens are remembered: a few megabytes."""

_PLAIN = re.compile(r"[\t\n\r -~]*")
"""Texts whose words a BERT tokenizer tells apart by white space and punctuation alone."""
_PIECES = re.compile(r"[a-z0-9]+|[^\sa-z0-9]")

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


def write_table(
    forward: Callable[[Integers, Integers], Floats], tokenizer: Tokenizer, target: Path, batch: int = 1024
) -> None:
    """Distil a model: `forward(input_ids, attention_mask)` [batch, seq] gives embeddings [batch, hidden]."""
    tokenizer.no_padding()
    size = tokenizer.get_vocab_size()
    around = tokenizer.encode("").ids  # the special tokens at the beginning and the end
    head, tail = (around[:1], around[1:]) if around else ([], [])
    rows: list[Floats] = []
    for start in range(0, size, batch):
        tokens = np.arange(start, min(start + batch, size), dtype=np.int64)
        columns = [np.full(len(tokens), t, np.int64) for t in head]
        columns += [tokens, *(np.full(len(tokens), t, np.int64) for t in tail)]
        ids = np.stack(columns, axis=1)
        rows.append(forward(ids, np.ones_like(ids)))
    table = np.concatenate(rows).astype(np.float64)
    centred = table - table.mean(0)
    _, _, components = np.linalg.svd(centred, full_matrices=False)
    probability = 1.0 / ((np.arange(size) + 2) * np.log(max(size, 2)))  # vocabularies are ordered by frequency
    weighted = (centred @ components.T) * (_SIF / (_SIF + probability))[:, None]
    target.mkdir(parents=True, exist_ok=True)
    np.save(target / TABLE, weighted.astype(np.float16))


class StaticEmbedder:
    """A loaded table; `embed` is quick enough for an event loop."""

    def __init__(self, folder: Path, manifest: Manifest, path: str) -> None:
        self._table = np.load(folder / path / TABLE).astype(np.float32)
        self._tokenizer = Tokenizer.from_file(str(folder / manifest.tokenizer.file))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._context = manifest.architecture.context
        self._bert = _finds_words_as_bert(self._tokenizer)
        self._special = tuple(token.content for token in self._tokenizer.get_added_tokens_decoder().values())
        self._words: dict[str, list[int]] = {}
        if self._bert:
            vocabulary = self._tokenizer.get_vocab()
            self._words = {word: [i] for word, i in vocabulary.items() if _PIECES.fullmatch(word)}
        self.hidden = int(self._table.shape[1])

    def embed(self, texts: list[str]) -> Floats:
        """Embeddings of unit length: float32 [n, hidden]; zero for a text without tokens."""
        result = np.zeros((len(texts), self.hidden), np.float32)
        for row, text in enumerate(texts):
            ids = self.ids(text[:_MAX_CHARS])
            if ids:
                mean = self._table[ids].mean(0)
                result[row] = mean / max(float(np.linalg.norm(mean)), 1e-12)
        return result

    def ids(self, text: str) -> list[int]:
        """Tokens of a text. BERT's tokenizer works on each word by itself, so that what it makes of a word is
        remembered, and whole words of its vocabulary are known from the start; elsewhere, and in texts that are not
        plain, what stands between white space is taken for a word."""
        if self._bert and _PLAIN.fullmatch(text) and not any(special in text for special in self._special):
            words = _PIECES.findall(text.lower())
        else:
            words = text.split()
        ids: list[int] = []
        for word in words:
            known = self._words.get(word)
            if known is None:
                if len(self._words) >= _WORDS:
                    self._words.clear()
                known = self._words[word] = self._tokenizer.encode(word, add_special_tokens=False).ids
            ids += known
        return ids[: self._context]


def _finds_words_as_bert(tokenizer: Tokenizer) -> bool:
    """Whether words are what lies between white space and punctuation, in lower case, and one that the vocabulary has
    is one token."""
    made = json.loads(tokenizer.to_str())
    kinds = [(made.get(part) or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
    return kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and bool(made["normalizer"].get("lowercase"))
