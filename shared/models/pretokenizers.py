"""How each kind of byte-level BPE cuts a text into words before it merges, by the name that GGUF files give it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers

from shared.errors import UnsupportedModel


@dataclass(frozen=True)
class Cut:
    """One way of cutting."""

    pattern: str = ""
    """Regular expression of a word; empty for GPT-2's."""
    digits: bool = False
    """Each digit stands alone, cut off before the pattern is applied."""
    whole_words: bool = False
    """A word that is in the vocabulary is taken as it is, without merging."""
    adds_bos: bool = False
    """Texts begin with the beginning-of-sequence token unless the file says otherwise."""
    composes: bool = False
    """Characters are composed first (Unicode NFC)."""

    def normalizer(self) -> Any | None:
        return normalizers.NFC() if self.composes else None

    def pre_tokenizer(self) -> Any:
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        if self.pattern:
            steps.append(pre_tokenizers.Split(Regex(self.pattern), "isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.pattern))
        return pre_tokenizers.Sequence(steps)


_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BLANKS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(numbers: str) -> str:
    """Letters with one other character before them, numbers, runs of signs, white space."""
    return rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_BLANKS}"


def _cased_words(numbers: str, ending: str) -> str:
    """As `_words`, but a word ends where lower case turns to upper case."""
    before = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{before}{_UPPER}*{_LOWER}+{ending}|{before}{_UPPER}+{_LOWER}*{ending}"
    return rf"{words}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_BLANKS}"


_GPT2 = Cut()
_DIGITS = Cut(digits=True)
_LLAMA3 = Cut(_words(r"\p{N}{1,3}"), whole_words=True, adds_bos=True)
_CL100K = Cut(_words(r"\p{N}{1,3}"))
_QWEN2 = Cut(_words(r"\p{N}"), composes=True)

_CUTS: dict[str, Cut] = {
    **dict.fromkeys(("gpt-2", "default", "olmo", "jais", "mpt", "phi-2", "exaone4"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _CL100K),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": Cut(_QWEN2.pattern),
    "tekken": Cut(_cased_words(r"\p{N}", ""), whole_words=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), Cut(_cased_words(r"\p{N}{1,3}", f"{_ENDINGS}?"))),
}


def named(name: str) -> Cut:
    """The way of cutting that GGUF files call `name`.

    Raises:
        UnsupportedModel: it is not known; the message names it.
    """
    found = _CUTS.get(name)
    if found is None:
        raise UnsupportedModel(
            f"The GGUF's pre-tokenizer {name!r} is not known.",
            f"Known are {', '.join(_CUTS)}; export the model from its original files instead (`calm models export`).",
        )
    return found
