"""Whether an answer can be read: what a query (or a card) expects of it, and what is found. Pure.

`read` never raises and takes time linear in the answer. It looks for no expressions of users' own: one of those may
take for ever, in the event loop of an engine. The patterns here are fixed, without nested repetition; what users give
is matched as it is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

import msgspec

from shared import messages as m

REMEDY = (
    '`expect` is one of {"kind": "choice", "of": ["A", "B"]}, {"kind": "number"}, {"kind": "json", "keys": ["name"]}'
    ' and {"kind": "contains", "any_of": ["yes"]}.'
)
"""What to change where `expect` has not the right shape."""
_WINDOW = 80
"""Characters after an announcement in which what is announced must begin."""
_LONGEST_NUMBER = 400

_ANNOUNCED = re.compile(
    r"\banswers?\b(?:[ \t]{1,4}(?:is|was|(?:would|must|should)[ \t]{1,4}be))?|\\boxed|####", re.IGNORECASE
)


def _lead(more: str) -> re.Pattern[str]:
    """Punctuation, and up to three small words, between an announcement and what is announced."""
    dress = rf"[\s:=*_`\"'\u2018-\u201f(\[{{$\\,{more}]*"
    words = "option|choice|letter|number|the|boxed|text|mathbf|about|approximately"
    return re.compile(rf"{dress}(?:(?:{words})\b{dress}){{0,3}}", re.IGNORECASE)


_BEFORE_CHOICE, _BEFORE_NUMBER = _lead(r"\-\u2013"), _lead("€£≈~")
_NUMBER = re.compile(
    r"(?<![\w.])([-\u2212+]?)((?:[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)"
)
_EDGES = " \t\r\n*_`\"'\u2018\u2019\u201c\u201d()[]{}$.!,:;"


def read(text: str, expect: m.Expect, *, cut: bool = False) -> m.Reading:
    """What an answer says of what was expected. `cut`: it ended at its limit, so that only what it had announced, or
    what is whole, counts."""
    if isinstance(expect, m.ExpectChoice):
        return _choice(text, expect.of, cut)
    if isinstance(expect, m.ExpectNumber):
        return _number(text, cut)
    if isinstance(expect, m.ExpectJson):
        return _json(text, expect.keys)
    return _contains(text, expect.any_of)


def problem(expect: m.Expect) -> tuple[str, str] | None:
    """What is wrong with an `expect` of the right shape, and what to change; None when nothing is."""
    if isinstance(expect, m.ExpectChoice):
        words, name = expect.of, "of"
    elif isinstance(expect, m.ExpectContains):
        words, name = expect.any_of, "any_of"
    else:
        return None
    for word in words:
        if not word.strip():
            return f"`expect.{name}` has an empty entry.", "Leave it out."
        if name == "of" and word != word.strip(_EDGES):
            bare = word.strip(_EDGES)
            hint = f"Write `{bare}`" if bare else "Name it with a letter or a word"
            return f"The choice `{word}` begins or ends with what answers put around choices.", f"{hint}."
    if name == "of":
        seen: dict[str, str] = {}
        for word in words:
            other = seen.setdefault(word.lower(), word)
            if other is not word:
                return f"The choices `{other}` and `{word}` cannot be told apart.", "Give each choice once."
    return None


def _found(value: str, why: str) -> m.Reading:
    return m.Reading(value=value, why=why)


def _not_found(why: str) -> m.Reading:
    return m.Reading(value=None, why=why)


def _announced(text: str, before: re.Pattern[str], longest: int) -> Iterator[tuple[str, int]]:
    """What stands behind each announcement, the last first, and where in it the lead ends."""
    for match in reversed(list(_ANNOUNCED.finditer(text))):
        behind = text[match.end() : match.end() + _WINDOW + longest + 1]
        lead = before.match(behind, 0, _WINDOW)
        yield behind, lead.end() if lead else 0


def _announcements(text: str, before: re.Pattern[str], longest: int) -> Iterator[str]:
    """What is announced, the last first."""
    for behind, begin in _announced(text, before, longest):
        yield behind[begin : begin + longest + 1]


# --- choices --------------------------------------------------------------------------------------


class _Choices:
    """The patterns of one list of choices."""

    def __init__(self, of: tuple[str, ...]) -> None:
        self.longest = max(len(word) for word in of)
        self._single = {word: word for word in of if len(word) == 1}
        self._long = {word.lower(): word for word in of if len(word) > 1}
        single = "|".join(re.escape(word) for word in self._single)
        long = "|".join(_whole(word) for word in sorted(self._long.values(), key=len, reverse=True))
        parts = ([f"(?i:{long})"] if long else []) + ([rf"(?:{single})(?!\w)"] if single else [])
        self.here = re.compile("|".join(parts))
        self._words = re.compile(long, re.IGNORECASE) if long else None
        self._marked = (
            re.compile(
                rf"(?:\(|\[|\*\*)[ ]?({single})[ ]?(?:\)|\]|\*\*)"  # (C), [C], **C**
                rf"|^[ \t]{{0,4}}({single})(?:[).:\]]|[ \t]{{0,4}}$)"  # a line that begins with C) or is C
                rf"|\b(?:[Oo]ption|[Cc]hoice|[Ll]etter)[ ]({single})(?!\w)",
                re.MULTILINE,
            )
            if single
            else None
        )

    def name(self, found: str) -> str | None:
        """The choice as the query wrote it."""
        return self._single.get(found) or self._long.get(found.lower())

    def dressed(self, text: str) -> str | None:
        """The choice within what is taken for punctuation behind an announcement: `=` or `-x` are choices too."""
        for behind, end in _announced(text, _BEFORE_CHOICE, self.longest):
            for at in range(end):
                match = self.here.match(behind, at)
                if match is not None and not behind[at - 1 : at].isalnum():
                    return self.name(match.group())
        return None

    def first(self, text: str) -> str | None:
        """The long choice that the answer begins with, when a mark or a line's end follows."""
        match = self._words.match(text) if self._words is not None else None
        if match is None or (match.end() < len(text) and text[match.end()] not in ".,:;!)]*\r\n-\u2013"):
            return None
        return self.name(match.group())

    def everywhere(self, text: str) -> set[str]:
        """All choices that occur."""
        found = [match.group() for match in self._words.finditer(text)] if self._words is not None else []
        if self._marked is not None:
            found += [next(g for g in match.groups() if g is not None) for match in self._marked.finditer(text)]
        return {name for word in found if (name := self.name(word)) is not None}


def _whole(word: str) -> str:
    """A pattern for `word` where no other letters touch it."""
    before = r"(?<!\w)" if word[0].isalnum() or word[0] == "_" else ""
    after = r"(?!\w)" if word[-1].isalnum() or word[-1] == "_" else ""
    return f"{before}{re.escape(word)}{after}"


@lru_cache(maxsize=256)
def _choices(of: tuple[str, ...]) -> _Choices:
    return _Choices(of)


def _choice(text: str, of: list[str], cut: bool) -> m.Reading:
    choices = _choices(tuple(of))
    for after in _announcements(text, _BEFORE_CHOICE, choices.longest):
        match = choices.here.match(after)
        if match is not None and (name := choices.name(match.group())) is not None:
            return _found(name, "announced")
    if (name := choices.dressed(text)) is not None:
        return _found(name, "announced")
    bare = text.strip(_EDGES)
    if len(bare) <= choices.longest and (name := choices.name(bare)) is not None:
        return _found(name, "alone")
    if (name := choices.first(bare)) is not None:
        return _found(name, "first")
    if cut:
        return _not_found("cut_off")
    found = choices.everywhere(text)
    if len(found) == 1:
        return _found(found.pop(), "only")
    return _not_found("several" if found else "nothing")


# --- numbers, JSON, pieces of text ----------------------------------------------------------------


def _number(text: str, cut: bool) -> m.Reading:
    for after in _announcements(text, _BEFORE_NUMBER, _LONGEST_NUMBER):
        if match := _NUMBER.match(after):
            return _found(_plain(match), "announced")
    if cut:
        return _not_found("cut_off")
    last = None
    for match in _NUMBER.finditer(text):
        last = match
    return _not_found("nothing") if last is None else _found(_plain(last), "last")


def _json(text: str, keys: list[str]) -> m.Reading:
    why = "no_json"
    for piece, how in _pieces(text):
        try:
            value = msgspec.json.decode(piece)
        except (ValueError, RecursionError):
            continue
        if not isinstance(value, (dict, list)):
            continue
        if keys and not (isinstance(value, dict) and all(key in value for key in keys)):
            why = "keys_missing"
            continue
        return _found(piece, how)
    return _not_found(why)


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """At most three pieces that may be JSON: all, the last fenced block, and from the first bracket to the last."""
    yield text.strip(), "whole"
    end = text.rfind("```")
    begin = text.rfind("```", 0, max(end, 0))
    if begin >= 0:
        yield text[begin + 3 : end].partition("\n")[2].strip(), "fenced"
    opened = [i for i in (text.find("{"), text.find("[")) if i >= 0]
    closed = max(text.rfind("}"), text.rfind("]"))
    if opened and min(opened) < closed:
        yield text[min(opened) : closed + 1], "within"


def _contains(text: str, any_of: list[str]) -> m.Reading:
    lower = text.lower()
    found = next((word for word in any_of if word.lower() in lower), None)
    return _not_found("nothing") if found is None else _found(found, "contained")


def _plain(number: re.Match[str]) -> str:
    """In digits, without what groups them."""
    return ("-" if number[1] in ("-", "\u2212") else "") + number[2].replace(",", "")
