"""Guesses the next tokens of an answer out of its own prompt and text, and how many of them to have verified. Pure.

An answer that quotes, edits or sums up its prompt repeats long pieces of it: what followed the last `GRAM` tokens the
last time they occurred is likely to follow now (prompt lookup decoding, Saxena 2023). A step over 1+k tokens costs less
than 1+k steps, so that guesses pay where enough of them hold; answers are what they would have been without
(Leviathan, Kalman and Matias 2023; a guess is certain of itself, so that their acceptance test is to draw the token
as ever, and to compare).
"""

from __future__ import annotations

from collections.abc import Iterable

GRAM = 3
"""Tokens that must have occurred before: with 2, guesses of ordinary text mostly fail."""
MOST = 10
"""Guesses verified in one step."""
LEAST_GAIN = 1.05
"""Expected tokens over expected time, against a step of one token; below that nothing is guessed."""
SLOPE = 0.2
"""Time of each further token of a step relative to a step of one, until it has been measured: 0.08 to 0.11 (fp32), 0.16
to 0.19 (int8), 0.21 to 0.24 (int4) for SmolLM2-135M with two threads (`python -m bench.drafting`)."""
_SHARE_WEIGHT = 0.1
_TIME_WEIGHT = 0.2


class Drafter:
    """Of one sequence: what it holds, where it seems to be copying from, and how often that has been right."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        """By the last `GRAM` tokens, the place behind their last occurrence but the one at the end."""
        self._source: int | None = None
        self.share = 0.5
        """Of guesses behind right ones, those that lately were right. Kept up whether or not they were verified."""
        for token in prompt:
            self._append(token)

    def add(self, token: int) -> None:
        """The answer has gone on by a token."""
        if self._source is not None:
            right = self._tokens[self._source] == token
            self.share += _SHARE_WEIGHT * (right - self.share)
            self._source = self._source + 1 if right else None
        self._append(token)

    def draft(self, most: int, slope: float) -> list[int]:
        """At most `most` tokens that may come next, as many as are worth their time; `slope` as `Widths` has it."""
        if self._source is None:
            self._source = self._ends.get(tuple(self._tokens[-GRAM:]))
        if self._source is None:
            return []
        count = worthwhile(self.share, slope, min(most, MOST, len(self._tokens) - self._source))
        return self._tokens[self._source : self._source + count]

    def _append(self, token: int) -> None:
        if len(self._tokens) >= GRAM:  # known from now on, when the last of them are no longer the end
            self._ends[tuple(self._tokens[-GRAM:])] = len(self._tokens)
        self._tokens.append(token)


def worthwhile(share: float, slope: float, most: int) -> int:
    """The number of guesses, `most` at most, with the most tokens for the time, each right with probability `share`
    once those before it are; 0 when a step of one token does as well."""
    best, count, tokens = LEAST_GAIN, 0, 1.0
    for guesses in range(1, most + 1):
        tokens += share**guesses
        gain = tokens / (1.0 + slope * guesses)
        if gain > best:
            best, count = gain, guesses
    return count


class Widths:
    """What steps over several tokens of one sequence take, as measured."""

    def __init__(self) -> None:
        self.slope = SLOPE
        """Time of each further token, relative to a step of one."""
        self._one_s = 0.0

    def took(self, guesses: int, seconds: float) -> None:
        """A step over 1+`guesses` tokens of one sequence has taken so long."""
        if not guesses:
            self._one_s += (_TIME_WEIGHT if self._one_s else 1.0) * (seconds - self._one_s)
        elif self._one_s:
            seen = max(seconds / self._one_s - 1.0, 0.0) / guesses
            self.slope += _TIME_WEIGHT * (seen - self.slope)
