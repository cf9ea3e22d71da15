"""Counts a prompt's tokens under each model's own tokenizer, read from the model store."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from shared import messages as m


class TokenCounter:
    """Tokenizers by their sha256, so that variants and models that share one are counted once."""

    def __init__(self, models_path: Path) -> None:
        self._models_path = models_path
        self._tokenizers: dict[str, Tokenizer] = {}
        self._models: dict[str, str] = {}

    def use(self, cards: list[m.Card]) -> None:
        """Load the tokenizers these cards need; a file that is missing is left for the engine to judge."""
        self._models = {card.artifact.model: card.artifact.tokenizer or card.artifact.model for card in cards}
        for model, key in self._models.items():
            file = self._models_path / model / "tokenizer.json"
            if key not in self._tokenizers and file.is_file():
                self._tokenizers[key] = Tokenizer.from_file(str(file))

    def count(self, text: str) -> dict[str, int]:
        """Tokens by model; the chat template's own tokens are not counted."""
        counts = {
            key: len(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0])  # without offsets in the text
            for key, tokenizer in self._tokenizers.items()
            if key in self._models.values()
        }
        return {model: counts[key] for model, key in self._models.items() if key in counts}
