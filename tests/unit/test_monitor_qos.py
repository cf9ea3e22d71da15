"""QoS windows."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.monitor.decide.qos import WINDOW, Windows, percentile
from shared import messages as m
from tests.unit.monitor_records import done, failed


def _artifact(windows: Windows) -> m.ArtifactQos:
    (only,) = windows.snapshot(1, 0.0).artifacts
    return only


def _card(windows: Windows, name: str = "alpha") -> m.CardQos:
    return next(c for c in windows.snapshot(1, 0.0).cards if c.card == name)


def test_costs_are_per_token() -> None:
    """Prefill is per prompt token, decode per step after the first token, and the batch is remembered."""
    windows = Windows()
    windows.observe(done("q", tokens_in=10, tokens_out=11))
    qos = _artifact(windows)
    assert (qos.artifact, qos.device_class, qos.count) == ("small-int8", "cpu-2t", 1)
    assert qos.prefill_s_per_token == pytest.approx(0.1)
    assert qos.tpot_s == pytest.approx(0.2)
    assert qos.tpot_batch == pytest.approx(2.0)


def test_long_answers_weigh_more() -> None:
    """The time per output token is that of all steps together, not the mean of means."""
    windows = Windows()
    windows.observe(done("long", tokens_out=21))  # 20 steps in 2 s
    windows.observe(done("short", tokens_out=6))  # 5 steps in 2 s
    assert _artifact(windows).tpot_s == pytest.approx(4.0 / 25)


def test_an_answer_of_one_token_says_nothing_about_decoding() -> None:
    """A single token comes out of prefill and adds no decode step."""
    windows = Windows()
    windows.observe(done("one", tokens_out=1))
    assert _artifact(windows).tpot_s == 0.0


def test_energy_is_split_by_the_worker_or_else_by_time() -> None:
    """The worker's own split is used; without one the joules are divided as prefill and decode time are."""
    windows = Windows()
    windows.observe(done("told", energy_in_j=1.0, energy_out_j=5.5))
    assert _artifact(windows).energy_j_per_token_in == pytest.approx(0.1)
    assert _artifact(windows).energy_j_per_token_out == pytest.approx(0.5)
    untold = Windows()
    untold.observe(done("untold"))
    assert _artifact(untold).energy_j_per_token_in == pytest.approx(0.2)
    assert _artifact(untold).energy_j_per_token_out == pytest.approx(4.0 / 11)


def test_cards_count_answers_and_failures() -> None:
    """Failures count for the card that failed; a cancelled query and one without a card say nothing."""
    windows = Windows()
    windows.observe(done("a"))
    windows.observe(failed("b"))
    windows.observe(failed("c", "cancelled"))
    windows.observe(failed("d", "no_feasible_model", card=""))
    card = _card(windows)
    assert (card.answered, card.failed) == (1, 1)
    assert card.latency_p50_s == pytest.approx(3.5)
    assert card.ttft_p50_s == pytest.approx(1.5)
    assert card.energy_j_mean == pytest.approx(6.0)
    assert windows.changes == 2


def test_the_window_forgets_the_oldest() -> None:
    """Only the last ends count."""
    windows = Windows()
    for number in range(WINDOW):
        windows.observe(failed(str(number)))
    for number in range(WINDOW):
        windows.observe(done(f"d{number}"))
    assert (_card(windows).answered, _card(windows).failed) == (WINDOW, 0)


def test_feedback_counts_once_per_query() -> None:
    """A second judgement of the same query replaces the first."""
    windows = Windows()
    windows.observe_feedback("alpha", "q1", 0.0)
    windows.observe_feedback("alpha", "q1", 1.0)
    windows.observe_feedback("alpha", "q2", 0.5)
    assert _card(windows).feedback_count == 2
    assert _card(windows).feedback_mean == pytest.approx(0.75)


def test_loads_are_averaged_per_device_class() -> None:
    """Load times of different device classes do not mix."""
    windows = Windows()
    for device, seconds in (("cpu-2t", 1.0), ("cpu-2t", 3.0), ("cuda-x", 0.5)):
        windows.observe_load("small-int8", device, seconds)
    found = {a.device_class: (a.load_s, a.loads) for a in windows.snapshot(1, 0.0).artifacts}
    assert found == {"cpu-2t": (2.0, 2), "cuda-x": (0.5, 1)}


def test_nothing_observed_is_an_empty_snapshot() -> None:
    """A fresh system knows nothing and says so."""
    assert Windows().snapshot(3, 4.0) == m.Qos(version=3, at=4.0)


def test_a_snapshot_survives_the_wire() -> None:
    """A snapshot is a message like any other."""
    windows = Windows()
    windows.observe(done("a"))
    snapshot = windows.snapshot(1, 2.0)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(snapshot), type=m.Qos) == snapshot


@given(st.lists(st.floats(0, 1e6), min_size=1), st.sampled_from([0.5, 0.95]))
def test_percentiles_are_values_that_enough_do_not_exceed(values: list[float], share: float) -> None:
    """A percentile is one of the values; at least the share of all is not above it, and it is the smallest such."""
    ordered = sorted(values)
    found = percentile(ordered, share)
    assert found in ordered
    assert sum(v <= found for v in ordered) >= share * len(ordered) - 1e-9
    assert sum(v < found for v in ordered) < share * len(ordered)
