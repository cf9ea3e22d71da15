"""How routing choices enter a simulation: fixed beforehand, or scored query by query by the planner's core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.planner.decide.scoring import Fleet, Weights

Array = NDArray[Any]


class Fixed:
    """Choices [n] made beforehand, whatever the state of the fleet."""

    cascades = False

    def __init__(self, choices: Array) -> None:
        self._choices: list[int] = np.asarray(choices).tolist()

    def route(self, i: int, now: float, fleet: Fleet) -> tuple[int, int]:
        return self._choices[i], -1

    def after(self, i: int, model: int, attempt: int, now: float, fleet: Fleet) -> int:
        return -1

    def observe(self, i: int, model: int, latency_s: float, energy_j: float, now: float) -> None:
        """Nothing is learned."""


class Scored:
    """The planner's utility over predicted quality and output length, with weights that may move while it runs."""

    def __init__(
        self,
        quality: Array,
        tokens_in: Array,
        tokens_out: Array,
        weights: Weights | Sequence[Weights],
        *,
        escalate: Callable[[int, int, int], int] | None = None,
        on_end: Callable[[int, int, float, float, float], Weights | None] | None = None,
    ) -> None:
        """
        Args:
            quality, tokens_out: [n, m], predicted; quality of minus infinity bars a model.
            tokens_in: [n].
            weights: of the utility; a sequence [n] gives each query its own.
            escalate: (query, model, attempt) -> model to ask next, or -1: the cascade.
            on_end: (query, model, latency_s, energy_j, now) -> new weights, or None: the dual controller.
        """
        self._quality = np.ascontiguousarray(quality, np.float64)[:, :, None]
        self._tokens_out = np.ascontiguousarray(tokens_out, np.float64)[:, :, None]
        self._tokens_in: list[float] = np.asarray(tokens_in, np.float64).tolist()
        self._own = weights if isinstance(weights, Sequence) else None
        self.weights: Weights = weights[0] if isinstance(weights, Sequence) else weights
        self._escalate = escalate
        self._on_end = on_end
        self.cascades = escalate is not None

    def route(self, i: int, now: float, fleet: Fleet) -> tuple[int, int]:
        weights = self.weights if self._own is None else self._own[i]
        u = fleet.utilities(self._quality[i], self._tokens_in[i], self._tokens_out[i], weights, now)
        model, worker = divmod(int(u.argmax()), int(u.shape[1]))
        return model, worker

    def after(self, i: int, model: int, attempt: int, now: float, fleet: Fleet) -> int:
        return -1 if self._escalate is None else self._escalate(i, model, attempt)

    def observe(self, i: int, model: int, latency_s: float, energy_j: float, now: float) -> None:
        if self._on_end is not None:
            new = self._on_end(i, model, latency_s, energy_j, now)
            if new is not None:
                self.weights = new


class Cascaded:
    """What to do after each attempt, by `learn.cascade.Plan.step` of the planner: for `Scored(escalate=...)`."""

    def __init__(self, step: Callable[[int, list[tuple[int, str]]], tuple[str, int]], answers: Array) -> None:
        """`answers` [n, m]: what each model would say, empty where nothing can be read."""
        self._step = step
        self._answers: list[list[str]] = answers.tolist()
        self._heard: dict[int, list[tuple[int, str]]] = {}

    def __call__(self, i: int, model: int, attempt: int) -> int:
        """The next model, -1 for this one's answer, -2 - m for the earlier one of m."""
        heard = self._heard.setdefault(i, [])
        heard.append((model, self._answers[i][model]))
        what, other = self._step(i, heard)
        if what == "ask":
            return other
        del self._heard[i]
        return -1 if other == model else -2 - other


def barred(models: int, allowed: Sequence[int]) -> Array:
    """[m] to add to quality: 0 for the allowed models, minus infinity for the others."""
    result = np.full(models, -np.inf)
    result[list(allowed)] = 0.0
    return result
