"""Text that grows token by token, with the tokenizers of the families."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from services.workers.engine.text import Growing
from shared.models import gguf_tokenizer
from tests.unit.test_family_tokenizers import KINDS, recorded

BY_BYTES = ("llama", "phi3", "gemma")
"""Tokenizers (SentencePiece) that spell characters they do not know in bytes, each a token beside ordinary text."""


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return gguf_tokenizer.build(recorded(kind)[0])


def grown(tokenizer: Tokenizer, ids: list[int]) -> str:
    growing = Growing(tokenizer, [])
    pieces = [growing.push(token) for token in ids] + [growing.finish()]
    assert "".join(pieces) == growing.text
    return growing.text


def late(tokenizer: Tokenizer, ids: list[int]) -> str:
    growing = Growing(tokenizer, [], late=True)
    assert not any(growing.push(token) for token in ids)
    return growing.finish()


@pytest.mark.parametrize("kind", KINDS)
def test_text_made_at_the_end_is_the_text_that_grew(kind: str) -> None:
    """Several scripts, emoji, code, white space, control tokens."""
    tokenizer = tokenizer_of(kind)
    for case in recorded(kind)[1]:
        assert late(tokenizer, case["ids"]) == grown(tokenizer, case["ids"]), case["text"]


@given(kind=st.sampled_from([kind for kind in KINDS if kind not in BY_BYTES]), ids=st.lists(st.integers(0, 2**16)))
def test_so_it_is_of_any_tokens(kind: str, ids: list[int]) -> None:
    """Halves of characters among them."""
    tokenizer = tokenizer_of(kind)
    ids = [token % tokenizer.get_vocab_size() for token in ids]
    assert late(tokenizer, ids) == grown(tokenizer, ids)


@given(kind=st.sampled_from(BY_BYTES), ids=st.lists(st.integers(0, 2**16), max_size=60))
def test_bytes_that_are_no_characters_end_nothing(kind: str, ids: list[int]) -> None:
    """They come as a replacement character each, and what can be read before and behind them comes as it is. (Left to
    itself, the library's stream raises, and the step of all sequences fails with it.)"""
    tokenizer = tokenizer_of(kind)
    ids = [token % tokenizer.get_vocab_size() for token in ids]
    text, whole = grown(tokenizer, ids), tokenizer.decode(ids, skip_special_tokens=True)
    assert len(text) >= len(whole)


@pytest.mark.parametrize("kind", BY_BYTES)
def test_text_behind_a_broken_character_keeps_its_words(kind: str) -> None:
    """A readable byte, one that no character begins with, then words: no space between them is lost."""
    tokenizer = tokenizer_of(kind)
    tokens = [tokenizer.token_to_id(name) for name in ("<0x63>", "<0xFF>")]
    assert None not in tokens
    words = tokenizer.encode("the words are here", add_special_tokens=False).ids
    text = grown(tokenizer, [*words, *tokens, *words])
    assert text.count("words are here") == 2
    assert "\ufffd" in text
