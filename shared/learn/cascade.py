"""When one answer is not enough: which model is asked first, and whom to ask next given what has been heard.

What can be seen once a model has answered says more about its answer than the query does: whether an answer could be
read at all, and whether a second model says the same. `Cascade.fit` learns, from recorded outcomes, the chance of being
right after each such sight (a line in the predicted quality, drawn to the identity where there is little data), and
`Cascade.plan` maximises, query by query, expected score less the price of what is spent, by backward induction over

    ask a -> nothing readable -> ask t, or give up
          -> answer           -> take it, or ask b -> nothing readable -> take a's
                                                   -> the same         -> take it, or ask t
                                                   -> another          -> take a's, take b's, or ask t,
                                                       who has the last word, or a vote (`votes`)

Energy and latency enter as prices on expected joules and seconds: the Lagrangian of "best quality within a budget",
whose multiplier the dual controller moves; so escalations are ranked by gain per joule, and not by gain. Sources:
FrugalGPT (Chen et al. 2023) for cascades, model multiplexing by agreement (Yue et al. 2024, "mixture of thoughts"),
optimal stopping with a recall of earlier offers (Weitzman 1979).

A second opinion is sought among the models given, k of them: k^3 lines are kept, so give a dozen candidates and not two
hundred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.learn import lines
from shared.learn.votes import Votes

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

KEEP, SECOND, THIRD, LAST = -1, -2, -3, -4
"""Actions beside the index of a model to ask: take the first model's answer, the second's, the third's; the third has
the last word."""


@dataclass(frozen=True)
class Plan:
    """What to do about each of n queries, for each of the k models that may be asked first; every array [n, k]."""

    worth: Array
    """Expected score less the price of what will be spent."""
    none_then: Integers
    """After no readable answer: a model, or KEEP (give up)."""
    second: Integers
    """After an answer: a model, or KEEP."""
    same_then: Integers
    """After the second agreed: a model, or KEEP."""
    other_then: Integers
    """After the second differed: a model, KEEP or SECOND."""
    torn: Integers
    """LAST, where a third model that is asked then has the last word. Else it has a vote, and where all three differ
    the answer is taken of the first (KEEP), SECOND or THIRD."""

    @property
    def first(self) -> Integers:
        """[n]: the model to ask first. A router that knows queues and loads may choose another by `worth`."""
        return np.asarray(self.worth.argmax(1))

    def step(self, i: int, heard: Sequence[tuple[int, str]]) -> tuple[str, int]:
        """The next step for query i: ("ask", model) or ("take", model).

        Args:
            i: which query.
            heard: (model, answer) in the order asked; an empty answer is one that could not be read.
        """
        if not heard:
            return "ask", int(self.worth[i].argmax())
        first, said = heard[0]
        if len(heard) == 1:
            then = int((self.second if said else self.none_then)[i, first])
        elif len(heard) == 2 and said:
            second, answer = heard[1]
            then = KEEP if not answer else int((self.same_then if answer == said else self.other_then)[i, first])
            if then == SECOND:
                return "take", second
        elif said and heard[1][1] and said != heard[1][1] and (torn := int(self.torn[i, first])) != LAST:
            return "take", self._elected(torn, [model for model, _ in heard], [answer for _, answer in heard])
        else:  # the last word, or the last that could be read
            return "take", next((model for model, answer in reversed(heard) if answer), first)
        return ("take", first) if then == KEEP else ("ask", then)

    @staticmethod
    def _elected(torn: int, models: list[int], answers: list[str]) -> int:
        """Of three models, the first two of which differ."""
        a, b, t = models
        if not answers[2] or answers[2] == answers[0]:
            return a
        return b if answers[2] == answers[1] else {KEEP: a, SECOND: b, THIRD: t}[torn]


@dataclass(frozen=True)
class Played:
    """What a plan led to on recorded answers; [n] each but `asked`."""

    final: Integers
    asked: NDArray[np.bool_]
    """[n, k]"""
    attempts: Integers


class Cascade:
    """Chances of being right after what has been heard, and the plan that they make best."""

    def __init__(
        self, none: Array, alone: Array, agree: Array, same: Array, other: Array, votes: Votes | None = None
    ) -> None:
        """Lines (level, slope) in predicted quality. `none` [k, k, 2]: t after a gave nothing readable; `alone` [k, 2]:
        a has answered; `agree` [k, k, 2]: a and b say the same, in the mean of their qualities; `same` and `other`
        [k, k, k, 2]: t after a and b agreed or differed."""
        self.none, self.alone, self.agree, self.same, self.other = none, alone, agree, same, other
        self.votes = votes

    @classmethod
    def fit(
        cls,
        quality: NDArray[Any],
        score: NDArray[Any],
        answered: NDArray[np.bool_] | None = None,
        answer: NDArray[Any] | None = None,
        *,
        vote: bool = False,
    ) -> Cascade:
        """All [n, k]: quality as predicted without these queries, recorded scores (NaN: not asked), whether an answer
        could be read, and what it was (None where answers cannot be compared). `vote`: a third opinion is a vote."""
        k = quality.shape[1]

        def line(x: NDArray[Any], y: NDArray[Any], rows: NDArray[np.bool_]) -> Array:
            return lines.fit(x[rows], y[rows])

        known = ~np.isnan(score)
        heard = known if answered is None else answered & known
        none, alone = np.zeros((k, k, 2)), np.zeros((k, 2))
        agree, same, other = np.zeros((k, k, 2)), np.zeros((k, k, k, 2)), np.zeros((k, k, k, 2))
        for a in range(k):
            alone[a] = line(quality[:, a], score[:, a], heard[:, a])
            for b in range(k):
                none[a, b] = line(quality[:, b], score[:, b], known[:, a] & ~heard[:, a] & known[:, b])
                both = heard[:, a] & heard[:, b] if answer is not None else np.zeros(len(score), bool)
                alike = both & (answer[:, a] == answer[:, b]) if answer is not None else both
                agree[a, b] = line((quality[:, a] + quality[:, b]) / 2.0, alike.astype(np.float64), both)
                for t in range(k):
                    last = score[:, t]
                    if t not in {a, b}:  # where t gives nothing readable, the better of the two stands
                        better = a if np.nanmean(score[:, a]) >= np.nanmean(score[:, b]) else b
                        last = np.where(heard[:, t], score[:, t], score[:, better])
                    same[a, b, t] = line(quality[:, t], last, alike & known[:, t])
                    other[a, b, t] = line(quality[:, t], last, both & ~alike & known[:, t])
        votes = Votes.fit(quality, score, heard, answer) if vote and answer is not None else None
        return cls(none, alone, agree, same, other, votes)

    def plan(
        self,
        quality: NDArray[Any],
        answers: NDArray[Any],
        cost: NDArray[Any],
        *,
        compare: bool = True,
        retry: bool = True,
    ) -> Plan:
        """The best plan for each query.

        Args:
            quality: [n, k] predicted.
            answers: [n, k] predicted chance that an answer can be read.
            cost: [n, k] price of asking: expected joules and seconds, in units of score.
            compare: whether second opinions may be sought.
            retry: whether another model may be asked after an answer that could not be read.
        """
        n, k = quality.shape
        worths = np.zeros((n, k))
        actions = [*(np.full((n, k), KEEP) for _ in range(4)), np.full((n, k), LAST)]
        for a in range(k):
            taken = lines.at(self.alone[a], quality[:, a])
            none_worth, none_then = np.zeros(n), np.full(n, KEEP)
            after_worth, second = taken.copy(), np.full(n, KEEP)
            same_then, other_then, torn = np.full(n, KEEP), np.full(n, KEEP), np.full(n, LAST)
            for b in range(k):
                if b == a:
                    continue
                if retry:
                    worth = lines.at(self.none[a, b], quality[:, b]) - cost[:, b]
                    none_then = np.where(worth > none_worth, b, none_then)
                    none_worth = np.maximum(worth, none_worth)
                if compare:
                    same_worth, same_do = self._after(self.same[a, b], a, b, quality, cost)
                    if self.votes is None:
                        other_worth, other_do = self._after(self.other[a, b], a, b, quality, cost)
                        torn_do = torn
                    else:
                        other_worth, other_do, torn_do = self._vote(self.votes, a, b, quality, answers, cost)
                    rate = lines.at(self.agree[a, b], (quality[:, a] + quality[:, b]) / 2.0)
                    said = rate * same_worth + (1.0 - rate) * other_worth
                    worth = answers[:, b] * said + (1.0 - answers[:, b]) * taken - cost[:, b]
                    better = worth > after_worth
                    after_worth = np.where(better, worth, after_worth)
                    second = np.where(better, b, second)
                    same_then, other_then = np.where(better, same_do, same_then), np.where(better, other_do, other_then)
                    torn = np.where(better, torn_do, torn)
            worths[:, a] = answers[:, a] * after_worth + (1.0 - answers[:, a]) * none_worth - cost[:, a]
            for action, chosen in zip(actions, (none_then, second, same_then, other_then, torn), strict=True):
                action[:, a] = chosen
        return Plan(worths, *actions)

    def _after(self, after: Array, a: int, b: int, quality: NDArray[Any], cost: NDArray[Any]) -> tuple[Array, Integers]:
        """Worth of the best end after a and b have answered, and the action."""
        first, second = lines.at(after[a], quality[:, a]), lines.at(after[b], quality[:, b])
        worth, action = np.maximum(first, second), np.where(second > first, SECOND, KEEP)
        for t in range(quality.shape[1]):
            if t not in {a, b}:
                further = lines.at(after[t], quality[:, t]) - cost[:, t]
                action = np.where(further > worth, t, action)
                worth = np.maximum(further, worth)
        return worth, action

    def _vote(
        self, votes: Votes, a: int, b: int, quality: NDArray[Any], answers: NDArray[Any], cost: NDArray[Any]
    ) -> tuple[Array, Integers, Integers]:
        """Worth of the best end after a and b have differed where a third has a vote, the action, and what to do if
        all three differ."""
        first, second = (lines.at(self.other[a, b, m], quality[:, m]) for m in (a, b))
        worth, action = np.maximum(first, second), np.where(second > first, SECOND, KEEP)
        torn = np.full(len(worth), KEEP)
        for t in range(quality.shape[1]):
            if t not in {a, b}:
                counted, taken = votes.worth(a, b, t, quality)
                asked = answers[:, t] * counted + (1.0 - answers[:, t]) * first - cost[:, t]
                better = asked > worth
                worth, action = np.where(better, asked, worth), np.where(better, t, action)
                torn = np.where(better, np.array([KEEP, SECOND, THIRD])[taken], torn)
        return worth, action, torn


def play(
    plan: Plan, answered: NDArray[np.bool_], answer: NDArray[Any] | None, first: NDArray[Any] | None = None
) -> Played:
    """Carry a plan out on recorded answers [n, k]: the steps of `Plan.step`, for all queries at once. `first` [n] are
    the models asked first, the plan's own when left out."""
    first = plan.first if first is None else first
    rows = np.arange(len(first))
    asked = np.zeros(answered.shape, bool)
    asked[rows, first] = True
    said = answered[rows, first]
    then = np.where(said, plan.second[rows, first], plan.none_then[rows, first])
    more = then >= 0
    asked[rows[more], then[more]] = True
    heard = answered[rows, np.maximum(then, 0)] & more
    alike = np.ones(len(rows), bool) if answer is None else answer[rows, np.maximum(then, 0)] == answer[rows, first]
    both = said & heard
    last = np.where(both, np.where(alike, plan.same_then[rows, first], plan.other_then[rows, first]), KEEP)
    further = last >= 0
    asked[rows[further], last[further]] = True
    got = answered[rows, np.maximum(last, 0)] & further
    final = np.where(~said & heard, then, first)
    final = np.where(both & (last == SECOND), then, final)
    final = np.where(both & further & ~got, then, final)  # as `Plan.step`: the last that could be read
    final = np.where(got, last, final)
    torn = plan.torn[rows, first]
    vote = both & ~alike & further & (torn != LAST)
    if answer is not None and vote.any():
        third = np.maximum(last, 0)
        with_second = got & (answer[rows, third] == answer[rows, np.maximum(then, 0)])
        lone = got & ~with_second & (answer[rows, third] != answer[rows, first])
        elected = np.where(with_second | (lone & (torn == SECOND)), then, first)
        final = np.where(vote, np.where(lone & (torn == THIRD), last, elected), final)
    return Played(final, asked, asked.sum(1))
