"""Choosing a token: what it says of its confidence does not depend on where the logits lie."""

from __future__ import annotations

import numpy as np
import pytest

from services.workers.engine.sampling import Chooser, Logits, generator
from shared.errors import EngineFailed
from shared.messages import Sampling

VOCAB = 20_000


def _logits(seed: int = 0) -> Logits:
    return (np.random.default_rng(seed).standard_normal(VOCAB) * 3).astype(np.float32)


def _truth(logits: Logits) -> tuple[float, float]:
    """Log-probability of the best token and the entropy, in double precision."""
    exact = logits.astype(np.float64)
    log_p = exact - exact.max() - np.log(np.exp(exact - exact.max()).sum())
    return float(log_p.max()), float(-(np.exp(log_p) * log_p).sum())


@pytest.mark.parametrize("level", [-1000.0, -45.0, -20.0, 0.0, 45.0, 80.0, 1000.0])
def test_confidence_is_that_of_double_precision_wherever_the_logits_lie(level: float) -> None:
    logits = _logits() + np.float32(level)
    choice = Chooser(VOCAB).choose(logits, Sampling(), generator(0))
    logprob, entropy = _truth(logits)
    assert choice.token == int(logits.argmax())
    assert choice.logprob == pytest.approx(logprob, abs=2e-4)  # of logits near 1000, whose digits end there
    assert choice.entropy == pytest.approx(entropy, abs=2e-4)


def test_logits_are_left_as_they_are() -> None:
    for level in (0.0, 1000.0):
        logits = _logits() + np.float32(level)
        before = logits.copy()
        Chooser(VOCAB).choose(logits, Sampling(temperature=0.7), generator(1))
        assert (logits == before).all()


def test_the_same_seed_draws_the_same_tokens_wherever_the_logits_lie() -> None:
    logits = np.round(_logits(), 2)  # sums with whole numbers lose nothing that matters
    setting = Sampling(temperature=1.3, top_k=40, top_p=0.9)

    def drawn(level: float) -> list[int]:
        chooser, source = Chooser(VOCAB), generator(5)
        return [chooser.choose(logits + np.float32(level), setting, source).token for _ in range(40)]

    assert len(set(drawn(0.0))) > 3
    assert drawn(0.0) == drawn(-16.0) == drawn(128.0)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(wrong: float) -> None:
    logits = _logits()
    logits[7] = wrong
    with pytest.raises(EngineFailed):
        Chooser(VOCAB).choose(logits, Sampling(), generator(0))
