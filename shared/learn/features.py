"""Features of a query for the learned models: its sentence embedding beside plain facts about its text.

An embedding says what a text is about and little about its form (does it want a calculation, how many options does it
give, how long are they); the form separates models that an embedding does not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

FORM = (
    "question_chars", "prompt_chars", "options", "option_chars", "option_spread", "digits", "prompt_digits",
    "numeric_options", "formula", "operators", "questions", "blank", "lines", "capitals", "word_chars", "negation",
    "non_ascii", "commas", "sentences",
)  # fmt: skip
"""Names of the entries of `form`."""
FORM_WEIGHT = 0.035
"""Scale of a standardised form feature against an embedding of unit length (whose 384 entries deviate by 0.05)."""

_OPTION = re.compile(r"^\s*\(?[A-Za-z0-9]{1,2}[.):] ")
_NEGATION = re.compile(r"\b(not|except|false|incorrect|least)\b", re.IGNORECASE)
_DIGIT = re.compile(r"\d")
_OPERATOR = re.compile(r"[=+*/^<>]")


def form(prompt: str) -> Floats:
    """Facts about the text of a prompt: float32 [len(FORM)]; counts as logarithms or shares, so none is large."""
    lines = prompt.split("\n")
    options = [line for line in lines if _OPTION.match(line)]
    question = "\n".join(line for line in lines if not _OPTION.match(line)) if options else prompt
    lengths = [len(option) for option in options] or [0]
    mean = sum(lengths) / len(lengths)
    spread = math.sqrt(sum((n - mean) ** 2 for n in lengths) / len(lengths))
    chars, own = max(len(prompt), 1), max(len(question), 1)
    words = question.split()
    return np.array(
        [
            math.log1p(len(question)),
            math.log1p(len(prompt)),
            math.log1p(len(options)),
            math.log1p(mean),
            math.log1p(spread),
            len(_DIGIT.findall(question)) / own,
            len(_DIGIT.findall(prompt)) / chars,
            sum(bool(_DIGIT.search(option[3:])) for option in options) / len(lengths),
            float("$" in prompt or "\\" in prompt),
            len(_OPERATOR.findall(prompt)) / chars,
            math.log1p(question.count("?")),
            float("___" in question),
            math.log1p(question.count("\n")),
            sum(c.isupper() for c in question) / own,
            math.log1p(sum(map(len, words)) / max(len(words), 1)),
            float(bool(_NEGATION.search(question))),
            float(not prompt.isascii()),
            question.count(",") / own,
            question.count(".") / own,
        ],
        np.float32,
    )


def forms(prompts: Sequence[str]) -> Floats:
    """`form` of each prompt: [n, len(FORM)]."""
    return np.stack([form(prompt) for prompt in prompts]) if prompts else np.zeros((0, len(FORM)), np.float32)


def packed(prompt: str) -> bytes:
    """`form` as messages carry it: little-endian float16."""
    return form(prompt).astype("<f2").tobytes()


def joined(embedding: NDArray[Any], facts: bytes) -> NDArray[np.float64]:
    """[d + len(FORM)]: an embedding [d] with the facts that `packed` gave beside it; alone where there are none."""
    return np.concatenate([embedding, np.frombuffer(facts, "<f2")]).astype(np.float64)
