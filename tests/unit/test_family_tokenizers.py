"""Tokenizers and chat templates of the families give what transformers' give."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shared.errors import InvalidQuery, UnsupportedModel
from shared.messages import ChatMessage
from shared.models import gguf_tokenizer, pretokenizers
from shared.models.chat import render
from tests.families.logits import GOLDEN
from tests.families.templates import TEMPLATES

KINDS = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o", "llama", "phi3", "gemma")


def recorded(kind: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """GGUF fields of a small tokenizer, and texts with what transformers makes of them."""
    data = json.loads((GOLDEN / f"tokenizer-{kind}.json").read_text())
    return {**data["fields"], "general.architecture": kind}, data["cases"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(kind: str) -> None:
    """Several scripts, emoji, code, white space, control tokens: the same ids."""
    fields, cases = recorded(kind)
    tokenizer = gguf_tokenizer.build(fields)
    for case in cases:
        assert tokenizer.encode(case["text"], add_special_tokens=False).ids == case["ids"], case["text"]


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back(kind: str) -> None:
    """Decoding gives what transformers gives, which is the text but for what the tokenizer itself changes."""
    fields, cases = recorded(kind)
    tokenizer = gguf_tokenizer.build(fields)
    for case in cases:
        assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["decoded"], case["text"]


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_ways_of_cutting_can_be_told_apart(kind: str) -> None:
    """The recorded ids of each kind are not those of any other: the texts show every difference."""
    fields, cases = recorded(kind)
    for other in {"gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o"} - {kind}:
        tokenizer = gguf_tokenizer.build({**fields, "tokenizer.ggml.pre": other})
        assert any(tokenizer.encode(c["text"], add_special_tokens=False).ids != c["ids"] for c in cases), other


def test_beginning_of_sequence_goes_by_kind_unless_the_file_says() -> None:
    """SentencePiece, Llama 3 and Tekken begin texts with it; a field in the file decides first."""
    begun = {kind for kind in KINDS if gguf_tokenizer.adds_bos(recorded(kind)[0])}
    assert begun == {"llama-bpe", "tekken", "llama", "phi3", "gemma"}
    for said in (True, False):
        fields = {**recorded("llama")[0], "tokenizer.ggml.add_bos_token": said}
        assert gguf_tokenizer.adds_bos(fields) is said


def test_generation_ends_at_turns_whatever_their_type() -> None:
    """A turn's end that a file calls user-defined ends generation too, and is not shown; Gemma's HTML tag does not."""
    fields, _ = recorded("gemma")
    tokens = [*fields["tokenizer.ggml.tokens"], "</s>"]
    end = tokens.index("<end_of_turn>")
    kinds = [
        4 if i in (end, len(tokens) - 1) else kind for i, kind in enumerate([*fields["tokenizer.ggml.token_type"], 4])
    ]
    fields = {
        **fields, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [*fields["tokenizer.ggml.scores"], -1000.0],
    }  # fmt: skip
    assert set(gguf_tokenizer.stop_token_ids(fields)) == {end, fields["tokenizer.ggml.eos_token_id"]}
    tokenizer = gguf_tokenizer.build(fields)
    ids = tokenizer.encode("a</s>b<end_of_turn>", add_special_tokens=False).ids
    assert end in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a</s>b"


def test_unknown_ways_of_cutting_are_named() -> None:
    """A pre-tokenizer that is not known is refused by its name, with those that are."""
    with pytest.raises(UnsupportedModel, match="kimi-k2") as raised:
        pretokenizers.named("kimi-k2")
    assert "qwen2" in raised.value.remedy


def test_bpe_without_merges_is_refused() -> None:
    """A file that lost its merges would cut every text into bytes."""
    fields, _ = recorded("gpt-2")
    with pytest.raises(UnsupportedModel, match="no merges"):
        gguf_tokenizer.build({**fields, "tokenizer.ggml.merges": []})


CHATS = json.loads((GOLDEN / "chats.json").read_text())


@pytest.mark.parametrize("chat", CHATS, ids=lambda chat: f"{chat['template']}-{len(chat['messages'])}")
def test_conversations_render_as_in_transformers(chat: dict[str, Any]) -> None:
    """The same text, character by character, or the template's own refusal."""
    template = next(t for t in TEMPLATES if t.name == chat["template"])
    messages = [ChatMessage(role=m["role"], content=m["content"]) for m in chat["messages"]]
    if "refused" in chat:
        with pytest.raises(InvalidQuery, match=chat["refused"][:30]):
            render(template.text, messages, template.bos, template.eos)
    else:
        assert render(template.text, messages, template.bos, template.eos) == chat["rendered"]
