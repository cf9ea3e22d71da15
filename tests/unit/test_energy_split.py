"""The energy ledger: every joule of the meter stands in exactly one account."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.workers.energy_split import EnergyLedger, Follower, Interval, learn_idle, split

amounts = st.dictionaries(st.sampled_from("abcd"), st.floats(0, 1e3), max_size=4)
intervals = st.builds(
    Interval,
    elapsed_s=st.floats(0, 1e3),
    total_j=st.floats(0, 1e6),
    work=amounts,
    loads=amounts,
    other=st.floats(0, 1e3),
    busy_s=st.floats(0, 2e3),
)


@given(intervals, st.floats(0, 500))
def test_shares_add_up_to_the_meter(interval: Interval, idle_w: float) -> None:
    """Whatever ran, the shares are not negative and together the meter's joules, to one part in 10^9."""
    shares = split(interval, idle_w)
    assert abs(shares.total_j - interval.total_j) <= 1e-9 * max(interval.total_j, 1.0)
    assert all(j >= 0 for j in (*shares.active.values(), *shares.load.values(), shares.other_j, shares.idle_j))


@given(st.lists(intervals, max_size=30), st.floats(0, 500))
def test_the_ledger_adds_up_over_all_intervals(seen: list[Interval], idle_w: float) -> None:
    """The residual is rounding."""
    ledger = EnergyLedger()
    for interval in seen:
        ledger.add(interval, split(interval, idle_w))
    assert abs(ledger.residual_j) <= 1e-9 * max(ledger.total_j, 1.0)


def test_work_idling_and_loading_are_told_apart() -> None:
    """A second at 100 W, of which 0.6 s were busy, on a device that idles at 50 W."""
    interval = Interval(1.0, 100.0, work={"a": 0.3, "b": 0.1}, loads={"c": 0.2}, busy_s=0.6)
    shares = split(interval, 50.0)
    assert abs(shares.idle_j - 20.0) < 1e-9
    assert abs(shares.active["a"] - 40.0) < 1e-9
    assert abs(shares.active["b"] * 2 - shares.load["c"]) < 1e-9
    assert split(Interval(1.0, 70.0), 50.0).idle_j == 70.0


def test_other_processes_pay_for_themselves() -> None:
    """On a CPU that others use as well, the package's joules follow the core seconds."""
    shares = split(Interval(1.0, 30.0, work={"a": 1.0}, other=2.0, busy_s=1.0), 0.0)
    assert abs(shares.active["a"] - 10.0) < 1e-9
    assert abs(shares.other_j - 20.0) < 1e-9


def test_idle_power_is_learned_when_nothing_runs() -> None:
    """The first idle interval sets it, later ones move it, busy ones leave it."""
    first = learn_idle(None, Interval(2.0, 100.0))
    assert first == 50.0
    assert learn_idle(first, Interval(1.0, 300.0, work={"a": 1.0}, busy_s=1.0)) == 50.0
    later = learn_idle(first, Interval(1.0, 60.0))
    assert later is not None
    assert 50.0 < later < 60.0


@given(st.lists(st.tuples(st.floats(0.0, 0.3), st.floats(0.0, 400.0)), min_size=1, max_size=60), st.floats(0, 300))
def test_an_engine_s_own_counter_never_goes_back(steps: list[tuple[float, float]], first_w: float) -> None:
    """Whatever the settlements say, what queries are charged is not negative."""
    follower, actual_j, shown = Follower(first_w), 0.0, 0.0
    for seconds, power_w in steps:
        now = follower.advance(seconds)
        assert now >= shown
        shown = now
        actual_j += seconds * power_w
        follower.settle(actual_j, follower.busy_s)


@given(st.floats(10, 400), st.floats(0, 1000))
def test_an_engine_s_own_counter_finds_the_ledger_s(power_w: float, first_w: float) -> None:
    """From a wrong beginning, and told of it late, it comes to within a hundredth of what it was charged."""
    follower = Follower(first_w)
    for step in range(600):
        late_s = follower.busy_s
        follower.advance(0.1)
        if step % 2:
            follower.settle(late_s * power_w, late_s)
    actual_j = follower.busy_s * power_w
    assert abs(follower.shown_j - actual_j) <= 0.01 * actual_j
