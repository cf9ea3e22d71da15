"""Between tokens and text: the chat template, and text that grows token by token."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from shared.messages import ChatMessage
from shared.models.chat import render
from shared.models.manifest import TokenizerInfo

_UNREADABLE = "\ufffd"
_LONGEST = 4
"""Bytes of a character, each of which may be a token."""
_Key = tuple[str, int, int]
_kept: dict[_Key, Tokenizer] = {}


def keep(file: Path) -> _Key:
    """Read a tokenizer before it is needed: a process that forks keeps it for its children, who then share it (14 MB of
    49,000 tokens). Its key, for `drop`."""
    key = _key(file)
    if key not in _kept:
        _kept[key] = Tokenizer.from_file(str(file))
    return key


def drop(key: _Key) -> None:
    """Keep a tokenizer no longer."""
    _kept.pop(key, None)


def _key(file: Path) -> _Key:
    facts = file.stat()
    return str(file.resolve()), facts.st_size, facts.st_mtime_ns


class Text:
    """A model's tokenizer and chat template."""

    def __init__(self, folder: Path, info: TokenizerInfo) -> None:
        file = folder / info.file
        self.tokenizer = (_kept.get(_key(file)) if _kept else None) or Tokenizer.from_file(str(file))
        self.stop_ids = frozenset(info.stop_token_ids)
        self._info = info
        self._template = (folder / info.chat_template).read_text() if info.chat_template else ""

    def prompt(self, messages: list[ChatMessage]) -> list[int]:
        """Token ids of the conversation, ready for the model's turn."""
        text = render(self._template, messages, self._info.bos_token, self._info.eos_token)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        bos = self.tokenizer.token_to_id(self._info.bos_token) if self._info.bos_token else None
        if self._info.add_bos and bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids


class Growing:
    """The text of one answer. `push` gives what may be shown; half characters and half stop strings wait."""

    def __init__(self, tokenizer: Tokenizer, stop: list[str], *, late: bool = False) -> None:
        """`late`: nobody reads it before its end. Without stop strings all of it is then made by `finish`, which saves
        25 us a token: its tables have left the caches whenever a step has read the weights."""
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = [s for s in stop if s]
        self._late = late and not self._stop
        self._ids: list[int] = []
        self._decoded: list[str] = []
        self._held = ""
        self._whole = False
        self._shown: list[str] = []
        self.stopped = False
        """A stop string was met; the text ends before it."""

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return "".join(self._shown)

    def push(self, token: int) -> str:
        """Text that became certain with this token."""
        self._ids.append(token)
        if self._late:
            return ""
        try:
            piece = self._stream.step(self._tokenizer, token) or ""
        except Exception:  # noqa: BLE001 it raises no kind of its own: bytes of which no character can become
            piece = self._begin_anew()
        self._whole = bool(piece)
        self._decoded.append(piece)
        return self._show(piece, final=False)

    def _begin_anew(self) -> str:
        """What is certain where bytes turn out to be no character: a byte that was shown as one by itself and is now
        part of what cannot be read has changed the text, of which the stream wants to show the continuation
        (vllm-project/vllm#19449). Shown text stays; the stream goes on behind the last token that can be read."""
        recent = next((self._ids[-n:] for n in range(1, _LONGEST + 1) if self._readable(self._ids[-n:])), [])
        self._stream = DecodeStream(ids=recent, skip_special_tokens=True)
        return self._rest()

    def _readable(self, ids: list[int]) -> bool:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return bool(text) and not text.endswith(_UNREADABLE)

    def _rest(self) -> str:
        """Of all tokens' text, as long as it now is, what lies behind the part that was decoded before."""
        whole: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return whole[sum(map(len, self._decoded)) :]

    def finish(self) -> str:
        """Whatever was held back, at the end of the answer."""
        if self.stopped:
            return ""
        if self._whole:  # the last token brought text, so no part of a character waits
            return self._show("", final=True)
        return self._show(self._rest(), final=True)

    def _show(self, piece: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        if not self._stop:
            self._shown.append(piece)
            return piece
        held = self._held + piece
        cuts = [at for at in (held.find(stop) for stop in self._stop) if at >= 0]
        if cuts:
            self.stopped = True
            held, self._held = held[: min(cuts)], ""
        else:
            keep = 0 if final else max((_overlap(held, stop) for stop in self._stop), default=0)
            held, self._held = (held[:-keep], held[-keep:]) if keep else (held, "")
        self._shown.append(held)
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that could be the beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
