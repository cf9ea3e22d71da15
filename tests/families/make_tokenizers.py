"""Records what transformers' and SentencePiece's tokenizers make of the texts; called by `tests.families.make`.

Each is a small vocabulary in the shape of its family: byte-level BPE trained here without cutting words, so that
merges reach over every boundary and a wrong cut shows in the ids; SentencePiece BPE with byte fallback. Stored are
the `tokenizer.ggml.*` fields that llama.cpp's converter would write, and the ids of every text.
"""

from __future__ import annotations

import base64
import json
import tempfile
from pathlib import Path
from typing import Any

from tests.families.logits import GOLDEN
from tests.families.templates import CONVERSATIONS, TEMPLATES, Template
from tests.families.texts import TEXTS

VOCAB = 900
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


def make() -> None:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        bpe = _byte_level(folder)
        for name, tokenizer in bpe.items():
            _record(name, _bpe_fields(name, tokenizer), tokenizer)
        for name, (fields, tokenizer) in _sentencepiece(folder).items():
            _record(name, fields, tokenizer)
    (GOLDEN / "chats.json").write_text(json.dumps(_chats(bpe["qwen2"]), ensure_ascii=False, indent=1))


def _record(name: str, fields: dict[str, Any], tokenizer: Any) -> None:
    special = [t for t, kind in zip(fields["tokens"], fields["token_type"], strict=True) if kind == _CONTROL][-2:]
    texts = [*TEXTS, f"{special[0]}user\nHello{special[1]}\n  there {special[0]}", "".join(special) + " a  b"]
    cases = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        cases.append({"text": text, "ids": ids, "decoded": back})
    data = {"fields": {f"tokenizer.ggml.{key}": value for key, value in fields.items()}, "cases": cases}
    (GOLDEN / f"tokenizer-{name}.json").write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")))
    print(f"tokenizer {name}: {len(fields['tokens'])} tokens")


def _byte_level(folder: Path) -> dict[str, Any]:
    """transformers' tokenizers of the byte-level families, over one trained vocabulary."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast, Qwen2TokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.integrations.mistral import MistralConverter

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, max_token_length=12
    )
    trained.train_from_iterator(TEXTS * 2, trainer)
    trained.save(str(folder / "trained.json"))
    model = json.loads((folder / "trained.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in model["merges"]) + "\n")
    files = {"vocab_file": str(folder / "vocab.json"), "merges_file": str(folder / "merges.txt")}
    tiktoken = folder / "tokenizer.tiktoken"
    letters = {letter: byte for byte, letter in _byte_letters().items()}
    ranks = {bytes(letters[c] for c in token): rank for token, rank in model["vocab"].items()}
    tiktoken.write_text("".join(f"{base64.b64encode(t).decode()} {rank}\n" for t, rank in ranks.items()))

    made: dict[str, Any] = {
        "gpt-2": GPT2TokenizerFast(**files, unk_token=None, bos_token=None, eos_token=None),
        "qwen2": Qwen2TokenizerFast(**files, unk_token=None, eos_token=None, pad_token=None),
        "smollm": GPT2TokenizerFast(**files, unk_token=None, bos_token=None, eos_token=None),
        # whose default pattern is Llama 3's
        "llama-bpe": PreTrainedTokenizerFast(
            tokenizer_object=TikTokenConverter(vocab_file=str(tiktoken), additional_special_tokens=[]).converted()
        ),
        "gpt-4o": PreTrainedTokenizerFast(
            tokenizer_object=TikTokenConverter(
                vocab_file=str(tiktoken), pattern=_O200K, additional_special_tokens=[]
            ).converted()
        ),
        "tekken": PreTrainedTokenizerFast(
            tokenizer_object=MistralConverter(vocab=ranks, pattern=_TEKKEN, additional_special_tokens=[]).converted()
        ),
    }
    made["gpt-4o"].backend_tokenizer.model.ignore_merges = False  # as the published tokenizer has it
    # transformers has no class for SmolLM's: its tokenizer.json puts this before GPT-2's
    made["smollm"].backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for tokenizer in made.values():
        tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""As published with tiktoken's o200k_base."""
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""As published in tekken.json."""


def _byte_letters() -> dict[int, str]:
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    return dict(bytes_to_unicode())


def _bpe_fields(name: str, tokenizer: Any) -> dict[str, Any]:
    """What the converter's `_set_vocab_gpt2` writes."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {token["id"]: token["special"] for token in state["added_tokens"]}
    kinds = [
        _NORMAL if index not in added else _CONTROL if added[index] else _USER_DEFINED for index in range(len(by_id))
    ]
    return {
        "model": "gpt2",
        "pre": name,
        "tokens": [by_id[index] for index in range(len(by_id))],
        "token_type": kinds,
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]],
    }


def _sentencepiece(folder: Path) -> dict[str, tuple[dict[str, Any], Any]]:
    """Fields and transformers' tokenizer of the SentencePiece families."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
    from tokenizers import AddedToken
    from transformers import GemmaTokenizerFast, LlamaTokenizerFast

    (folder / "texts.txt").write_text("\n".join(line for text in TEXTS for line in text.splitlines() if line) * 3)
    common = {
        "input": str(folder / "texts.txt"), "model_type": "bpe", "byte_fallback": True, "character_coverage": 0.98,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True,
        "allow_whitespace_only_pieces": True, "minloglevel": 2,
    }  # fmt: skip
    SentencePieceTrainer.train(model_prefix=str(folder / "llama"), vocab_size=VOCAB, **common)
    SentencePieceTrainer.train(
        model_prefix=str(folder / "gemma"), vocab_size=VOCAB, add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2,
        unk_id=3, eos_piece="<eos>", bos_piece="<bos>",
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁"],
        **common,
    )  # fmt: skip
    llama = LlamaTokenizerFast(vocab_file=str(folder / "llama.model"), legacy=True, add_prefix_space=True)
    gemma = GemmaTokenizerFast(vocab_file=str(folder / "gemma.model"), from_slow=True)
    phi3 = LlamaTokenizerFast(vocab_file=str(folder / "llama.model"), legacy=True, add_prefix_space=True)
    phi3.add_special_tokens(
        {"additional_special_tokens": [AddedToken(t, rstrip=True, special=True) for t in ("<|user|>", "<|end|>")]}
    )
    made = {}
    for name, tokenizer, model in (("llama", llama, "llama"), ("phi3", phi3, "llama"), ("gemma", gemma, "gemma")):
        pieces = SentencePieceProcessor(model_file=str(folder / f"{model}.model"))
        for text in TEXTS:
            assert pieces.encode(text) == tokenizer.encode(text, add_special_tokens=False), text
        made[name] = (_pieces_fields(name, pieces, tokenizer), tokenizer)
    return made


def _pieces_fields(name: str, pieces: Any, tokenizer: Any) -> dict[str, Any]:
    """What the converter's `_create_vocab_sentencepiece` writes."""
    tokens, scores, kinds = [], [], []
    for index in range(pieces.vocab_size()):
        tokens.append(pieces.id_to_piece(index))
        scores.append(pieces.get_score(index))
        kind = _UNKNOWN if pieces.is_unknown(index) else _CONTROL if pieces.is_control(index) else _NORMAL
        kinds.append(_BYTE if pieces.is_byte(index) else kind)
    for token, index in tokenizer.get_added_vocab().items():
        special = tokenizer.added_tokens_decoder[index].special or token in ("<start_of_turn>", "<end_of_turn>")
        if index == len(tokens):
            tokens.append(token)
            scores.append(-1000.0)
            kinds.append(_CONTROL)
        elif kinds[index] not in (_UNKNOWN, _CONTROL):
            kinds[index] = _CONTROL if special else _USER_DEFINED
    if name == "gemma":  # its published tokenizer_config.json lists them as added tokens that are not special
        for index, token in enumerate(tokens):
            if (token and set(token) <= {"\n"}) or (len(token) > 1 and set(token) == {"▁"}):
                tokens[index], scores[index], kinds[index] = token.replace("▁", " "), -1000.0, _USER_DEFINED
    fields = {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "token_type": kinds}
    fields |= {"unknown_token_id": pieces.unk_id(), "bos_token_id": pieces.bos_id(), "eos_token_id": pieces.eos_id()}
    return fields | ({"add_space_prefix": False} if name == "gemma" else {})


def _chats(tokenizer: Any) -> list[dict[str, Any]]:
    made = []
    for template in TEMPLATES:
        for conversation in CONVERSATIONS:
            made.append(_chat(tokenizer, template, conversation))
    return made


def _chat(tokenizer: Any, template: Template, conversation: list[dict[str, str]]) -> dict[str, Any]:
    tokenizer.bos_token, tokenizer.eos_token = template.bos, template.eos
    try:
        text = tokenizer.apply_chat_template(
            conversation, chat_template=template.text, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # noqa: BLE001 what the template itself raises is part of the record
        return {"template": template.name, "messages": conversation, "refused": str(error)}
    return {"template": template.name, "messages": conversation, "rendered": text}
