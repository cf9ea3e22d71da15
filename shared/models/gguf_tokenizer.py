"""Tokenizer, special tokens and chat template out of a GGUF file's metadata, with the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from shared.errors import UnsupportedModel
from shared.models import pretokenizers

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

_END_OF_GENERATION = frozenset({
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "</s>", "<|end|>",
    "<end_of_turn>",
})  # fmt: skip
"""Tokens at which generation ends besides the declared one, as llama.cpp treats them."""


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
    special = set(stop_token_ids(fields)) | {index for index, kind in enumerate(types) if kind == _CONTROL}
    said = [index for index, kind in enumerate(types) if kind == _USER_DEFINED and index not in special]
    eats = _phi3_eats_blanks(fields)
    tokenizer.add_tokens([AddedToken(tokens[index], special=False, normalized=False) for index in said])
    tokenizer.add_special_tokens(
        [
            AddedToken(tokens[index], special=True, normalized=False, rstrip=eats and tokens[index] not in _PLAIN_PHI3)
            for index in sorted(special)
        ]
    )
    return tokenizer


_PLAIN_PHI3 = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def _phi3_eats_blanks(fields: Mapping[str, Any]) -> bool:
    """Phi-3's control tokens swallow white space behind them; no field says so, llama.cpp too goes by the name."""
    return fields.get("general.architecture") == "phi3" and fields.get("tokenizer.ggml.model") == "llama"


def adds_bos(fields: Mapping[str, Any]) -> bool:
    """Whether a text begins with the beginning-of-sequence token: as the file says, else as its kind does."""
    kind = fields.get("tokenizer.ggml.model")
    default = kind == "llama" or (
        kind == "gpt2" and pretokenizers.named(fields.get("tokenizer.ggml.pre", "default")).adds_bos
    )
    return bool(fields.get("tokenizer.ggml.add_bos_token", default))


def stop_token_ids(fields: Mapping[str, Any]) -> list[int]:
    """Tokens that end generation: the file's end-of-sequence and end-of-turn, and known control tokens."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    declared = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    kinds = {"</s>": (_CONTROL,)}  # a Gemma has this one as text, among other tags of HTML
    known = [
        index
        for index, token in enumerate(tokens)
        if token in _END_OF_GENERATION and types[index] in kinds.get(token, (_CONTROL, _USER_DEFINED))
    ]
    return sorted({int(i) for i in [*declared, *known] if i is not None})


def _byte_level(fields: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    listed = fields.get("tokenizer.ggml.merges")
    if not listed:
        raise UnsupportedModel("The GGUF's BPE tokenizer has no merges.", "Re-convert it with a newer converter.")
    merges = [tuple(merge.split(" ", 1)) for merge in listed]
    vocab = {token: index for index, token in enumerate(tokens)}
    way = pretokenizers.named(fields.get("tokenizer.ggml.pre", "default"))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=way.whole_words))
    normalizer = way.normalizer()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = way.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece BPE: merges follow from the scores, since a piece is merged the earlier the higher it scores."""
    scores: list[float] = fields["tokenizer.ggml.scores"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, index in vocab.items():
        if types[index] != _NORMAL:
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
