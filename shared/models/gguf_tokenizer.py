"""Tokenizer, special tokens and chat template out of a GGUF file's metadata, with the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from shared.errors import UnsupportedModel

_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6

_END_OF_GENERATION = frozenset({
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "</s>", "<|end|>",
    "<end_of_turn>",
})  # fmt: skip
"""Control tokens at which generation ends besides the declared one, as llama.cpp treats them."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build(fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer described by `tokenizer.ggml.*`.

    Raises:
        UnsupportedModel: for a kind of tokenizer or pre-tokenizer that is not known, by its name.
    """
    kind = fields.get("tokenizer.ggml.model")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if kind == "gpt2":
        tokenizer = _byte_level(fields, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(fields, tokens, types)
    else:
        raise UnsupportedModel(
            f"The GGUF's tokenizer is of kind {kind!r}.",
            "Kinds `gpt2` (BPE) and `llama` (SentencePiece) are read.",
        )
    # User-defined tokens are found whole in the text as well, but they are part of what is said.
    tokenizer.add_tokens(
        [
            AddedToken(t, special=False, normalized=False)
            for t, n in zip(tokens, types, strict=True)
            if n == _USER_DEFINED
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, n in zip(tokens, types, strict=True) if n == _CONTROL]
    )
    return tokenizer


def stop_token_ids(fields: Mapping[str, Any]) -> list[int]:
    """Tokens that end generation: the file's end-of-sequence and end-of-turn, and known control tokens."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    declared = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    known = [i for i, t in enumerate(tokens) if types[i] == _CONTROL and t in _END_OF_GENERATION]
    return sorted({int(i) for i in [*declared, *known] if i is not None})


def _byte_level(fields: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    name = fields.get("tokenizer.ggml.pre", "default")
    llama3 = name in ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx")
    whole = name in ("llama-bpe", "llama3", "llama-v3")  # takes a word that is in the vocabulary without merging
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=whole))
    if name in ("smollm", "starcoder", "refact", "command-r"):
        before: list[Any] = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    elif name in ("gpt-2", "default", "olmo", "jais"):
        before = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    elif llama3:
        before = [
            pre_tokenizers.Split(Regex(_LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        raise UnsupportedModel(
            f"The GGUF's pre-tokenizer {name!r} is not known.",
            "Known are smollm, gpt-2 and llama-bpe; convert the model from its original files instead.",
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(before)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece BPE: merges follow from the scores, since a piece is merged the earlier the higher it scores."""
    scores: list[float] = fields["tokenizer.ggml.scores"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, index in vocab.items():
        if types[index] in (_CONTROL, _BYTE):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                merges.append((scores[index], len(left), len(right), left, right))
    merges.sort(key=lambda m: m[:3], reverse=True)
    unknown = int(fields.get("tokenizer.ggml.unknown_token_id", 0))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab, merges=[(m[3], m[4]) for m in merges], unk_token=tokens[unknown],
            fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    after: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        after.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(after)
    return tokenizer
