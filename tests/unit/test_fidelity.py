"""What makes a simulation faithful to a live run: learned beliefs, loads beside work, the cost of taking turns, and the
history that residency has seen."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from services.monitor.decide.qos import Windows
from services.planner.decide import cost, routing
from services.planner.decide.routing import State
from services.simulator import recorded
from services.simulator.beliefs import ANSWERS, Beliefs
from services.simulator.engine import Simulation, Workload
from services.simulator.fleet import SimFleet, SimModel
from services.simulator.profile import UnitCosts, load_profile, parse_profile
from services.simulator.recorded import Answered
from services.simulator.residency import Fixed
from services.simulator.routers import Fixed as Always
from shared import messages as m
from shared.learn import offpolicy
from tests.samples import GB, analyzed, card, engine, spec, worker
from tests.unit.monitor_records import done

UNIT = UnitCosts(
    prefill_s=0.001, tpot_s=0.01, slope=0.1, load_s=2.0, prefill_j=0.02, decode_j=0.5, load_j=30.0, token_j=(0.4, 0.1)
)
SPEC = spec("small-int8", weights=GB // 3)
DEVICE = worker().device


def _host(*, turn_cost: float = 1.0, load_beside: float = 0.0) -> SimFleet:
    """One host's cores, two models, memory for both."""
    return SimFleet(
        "host", tuple(SimModel(name=f"m{i}", parameters_b=1.0, memory=100, slots=4) for i in range(2)), ("w",), (200,),
        (100, 100), ((UNIT,), (UNIT,)), np.ones((2, 1), bool), shared=True, overhead_s=0.0, turns=True,
        turn_cost=turn_cost, load_beside=load_beside,
    )  # fmt: skip


def _latencies(fleet: SimFleet, arrival_s: list[float], choices: list[int], resident: tuple[int, ...]) -> list[float]:
    n = len(arrival_s)
    work = Workload(np.array(arrival_s), np.arange(n), np.full(n, 10.0), np.full((n, 2), 100.0), np.ones((n, 2)))

    class Held(Fixed):
        def start(self, sim: Simulation) -> None:
            for model in resident:
                sim.place(model, 0)

        def need(self, sim: Simulation, model: int, now: float) -> None:
            sim.load(model, 0)

    found: list[float] = Simulation(fleet, work, Always(np.array(choices)), Held()).run().latency_s.tolist()
    return found


def test_beliefs_are_the_figures_that_the_monitor_learns() -> None:
    """The same answers and loads make the same costs by way of the monitor's windows and of the simulator's sums."""
    windows = Windows()
    device_class = DEVICE.device_class
    first = [done(f"q{i}", device_class=device_class, tokens_in=10, tokens_out=11) for i in range(5)]
    for one in first:
        windows.observe(one)
    windows.observe_load(SPEC.name, device_class, 3.0)
    beliefs = Beliefs([SPEC], [DEVICE], windows.snapshot(1, 0.0), tokens_in=10.0, tokens_out=11.0)
    for i in range(7):
        windows.observe(done(f"r{i}", device_class=device_class, tokens_in=40, tokens_out=21, batch_mean=3.0))
        beliefs.answered(0, 0, tokens_in=40.0, tokens_out=21.0, prefill_s=1.0, decode_s=2.0, batch_mean=3.0)
    windows.observe_load(SPEC.name, device_class, 1.0)
    beliefs.loaded(0, 0, 1.0)
    wanted, found = cost.unit_costs(SPEC, DEVICE, windows.snapshot(2, 0.0).artifacts[0]), beliefs.units()[0][0]
    assert found.prefill_s == pytest.approx(wanted.prefill_s)
    assert found.tpot_s == pytest.approx(wanted.tpot_s)
    assert found.load_s == pytest.approx(2.0) == wanted.load_s


def test_beliefs_of_what_was_never_seen_are_the_planners_own_and_old_ones_fade() -> None:
    """Without telemetry the prior stands; after far more answers than are remembered only the last ones count."""
    beliefs = Beliefs([SPEC], [DEVICE], m.Qos())
    prior = cost.unit_costs(SPEC, DEVICE, None)
    assert beliefs.units()[0][0].tpot_s == pytest.approx(prior.tpot_s)
    for seconds in (1.0, 5.0):
        for _ in range(8 * ANSWERS):
            beliefs.answered(0, 0, tokens_in=10.0, tokens_out=11.0, prefill_s=0.1, decode_s=seconds, batch_mean=1.0)
    assert beliefs.units()[0][0].tpot_s == pytest.approx(0.5, rel=0.01)


def test_a_load_beside_work_takes_longer_by_what_the_profile_says() -> None:
    """A load of 2 s alone, beside an engine at work all along: half as long again with 0.5, 2 s with nought."""
    # One query after the other keeps the engine at work for longer than either load.
    arrivals, choices = [0.0, 0.1, 1.0, 2.0, 3.0], [0, 1, 0, 0, 0]
    plain, slowed = (_latencies(_host(load_beside=b), arrivals, choices, (0,))[1] for b in (0.0, 0.5))
    assert slowed - plain == pytest.approx(0.5 * 2.0, rel=0.3)
    alone = [_latencies(_host(load_beside=b), [0.0], [1], (0,))[0] for b in (0.0, 0.5)]
    assert alone[0] == alone[1] == pytest.approx(2.0 + 0.01 + 1.0)


def test_turns_cost_what_the_profile_says() -> None:
    """Two engines that take turns take twice as long each, and a fifth more where turns cost a fifth."""
    plain = _latencies(_host(), [0.0, 0.0], [0, 1], (0, 1))
    dear = _latencies(_host(turn_cost=1.2), [0.0, 0.0], [0, 1], (0, 1))
    assert max(dear) == pytest.approx(1.2 * max(plain), rel=0.05)
    assert _latencies(_host(turn_cost=1.2), [0.0], [0], (0, 1)) == _latencies(_host(), [0.0], [0], (0, 1))


def test_a_replay_learns_from_what_it_sees_and_knows_what_was_before() -> None:
    """A model that is far slower than was believed is left after some answers; earlier routes reach residency."""
    specs = [spec(name, weights=GB // 3) for name in ("smollm2-135m-int4", "smollm2-135m-int8")]
    cards = {c.name: c for c in (card(s.model + s.variant, s, domains={"d": 0.5}, quality=0.5) for s in specs)}
    policy = m.Policy(fleet="f", w_latency=5.0, w_energy=0.0, latency_slo_s=1.0, min_residence_s=1.0)
    fleet = [worker(engines=[engine(s) for s in specs])]
    known = [
        m.ArtifactQos(
            artifact=s.name, device_class=fleet[0].device.device_class, count=3, prefill_s_per_token=1e-3,
            tpot_s=tpot_s, load_s=1.0, loads=1,
        )
        for s, tpot_s in zip(specs, (0.001, 0.02), strict=True)
    ]  # fmt: skip
    qos = m.Qos(artifacts=known)
    query = msgspec.structs.replace(analyzed(domains={"d": 1.0}, tokens_out=50.0))
    route = routing.decide(query, State(cards=cards, policy=policy, workers=fleet, qos=qos), 0.0)
    answered = [Answered(100.0 + 6.0 * i, route, 20, 50) for i in range(30)]
    profile = load_profile("cpu")
    built = recorded.build(
        answered, cards, fleet, qos, policy, 0.0, profile, before=[(90.0 + 0.1 * i, route) for i in range(25)]
    )
    slow = tuple((replace(row[0], tpot_s=tpot_s),) for row, tpot_s in zip(built.fleet.unit, (0.06, 0.02), strict=True))
    built = replace(built, fleet=replace(built.fleet, unit=slow))
    learned, frozen = recorded.simulate(built).model, recorded.simulate(replace(built, beliefs=None)).model
    assert built.before[0][0] == pytest.approx(-10.0)
    assert learned[0] == 0, "what is believed to be quick is asked first"
    assert (learned[10:] == 1).all(), "and left when it is not"
    assert (learned == 1).sum() > (frozen == 1).sum()
    assert recorded.simulate(built, choices=[1, 0] * 15).model.tolist() == [1, 0] * 15


def test_loads_of_a_host_run_side_by_side_and_those_of_a_drive_in_turn() -> None:
    """Weights come from memory on a host whose engines take turns at its cores: two loads ordered together take as long
    as one. Elsewhere the second waits for the first."""
    host, drive = _host(), replace(_host(), turns=False)
    side_by_side, in_turn = (_latencies(fleet, [0.0, 0.0], [0, 1], ()) for fleet in (host, drive))
    assert max(side_by_side) < 2.0 + 2.5, "a load of 2 s, and two answers of a second that take turns"
    assert max(in_turn) > 4.0


def test_queries_without_a_choice_keep_no_model_in_memory() -> None:
    """30 queries name one model and then one names the other: nothing says that the first is worth more to queries that
    can choose, so that the second is loaded as soon as the first is idle, long before patience ends."""
    specs = [spec(name, weights=GB // 3) for name in ("one", "two")]
    cards = {c.name: c for c in (card(f"card-{s.name}", s, domains={"d": 0.5}, quality=0.5) for s in specs)}
    policy = m.Policy(fleet="f", w_energy=0.0, min_residence_s=1.0, max_wait_s=60.0, idle_evict_s=0.0)
    fleet = [worker(budget=specs[0].footprint_bytes + 1, engines=[engine(specs[0])])]
    known = [
        m.ArtifactQos(
            artifact=s.name, device_class=fleet[0].device.device_class, count=3, prefill_s_per_token=1e-3,
            tpot_s=0.01, load_s=1.0, loads=1,
        )
        for s in specs
    ]  # fmt: skip
    state = State(cards=cards, policy=policy, workers=fleet, qos=m.Qos(artifacts=known))
    named = [
        routing.decide(analyzed(m.Query(prompt="hi", model=name), domains={"d": 1.0}), state, 0.0) for name in cards
    ]
    answered = [Answered(1.0 * i, named[0], 20, 20) for i in range(30)] + [Answered(40.0, named[1], 20, 20)]
    text = """
name = "made"
turns = true
[artifacts]
""" + "\n".join(
        f"{name} = {{prefill_s = 0.001, tpot_s = 0.01, slope = 0.1, load_s = 1.0, "
        "prefill_j = 0, decode_j = 0, load_j = 0}"
        for name in ("one", "two")
    )
    built = recorded.build(answered, cards, fleet, m.Qos(artifacts=known), policy, 0.0, parse_profile(text))
    result = recorded.simulate(built)
    assert result.model.tolist() == [0] * 30 + [1]
    assert result.latency_s[-1] < 3.0


def test_what_other_models_say_of_a_query_makes_an_estimate_better() -> None:
    """Rewards with a difficulty in common, a log that seldom shows what the candidate wants: nearer the truth on these
    very queries than drawing weights in, and its intervals hold."""
    errors, held = np.zeros(2), 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        hard = rng.normal(size=(1500, 1))
        score = (0.5 + 0.9 * hard + 0.4 * rng.normal(size=(1500, 3)) > 0.5).astype(float)
        kin = offpolicy.kinship(score[:700] - 0.5)
        rows, predicted = score[700:], np.full((800, 3), 0.5)
        present = np.tile([0.46, 0.46, 0.08], (800, 1))
        chosen = (present.cumsum(1) > rng.random((800, 1))).argmax(1)
        logged = offpolicy.Logged(chosen, present[np.arange(800), chosen], rows[np.arange(800), chosen])
        candidate = np.tile([0.05, 0.05, 0.9], (800, 1))
        truth = float((candidate * rows).sum(1).mean())
        found = offpolicy.shrunk(logged, candidate, predicted), offpolicy.imputed(logged, candidate, predicted, kin)
        errors += [abs(e.value - truth) for e in found]
        held += found[1].low <= truth <= found[1].high
    assert errors[1] < 0.9 * errors[0], errors / 40
    assert held >= 36


def test_kinship_is_one_with_oneself_and_needs_queries_that_all_answered() -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(size=(4000, 1))
    residual = common + rng.normal(size=(4000, 2)) * [[1.0, 2.0]]
    kin = offpolicy.kinship(residual)
    assert np.diag(kin) == pytest.approx(np.ones(2))
    assert kin[1, 0] == pytest.approx(0.5, abs=0.08)
    assert kin[0, 1] == pytest.approx(0.2, abs=0.05)
    with pytest.raises(ValueError, match="two queries"):
        offpolicy.kinship(np.array([[0.1, np.nan], [0.2, 0.1]]))
