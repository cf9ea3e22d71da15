"""Guessing tokens out of an answer's own text: how many are worth it, and that the answer is the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.workers.engine.batcher import Batcher, Finished, Request
from services.workers.engine.drafting import MOST, Drafter, Widths, worthwhile
from services.workers.engine.energy import ModelMeter
from services.workers.engine.runner import SharedKvRunner
from services.workers.engine.session import open_session
from services.workers.engine.text import Text
from shared.messages import Device, Sampling
from shared.models.manifest import Manifest
from tests.tiny import tiny_fp32

CPU = Device(kind="cpu", name="cpu", threads=1)
SLOTS, CONTEXT = 3, 160
Model = tuple[Path, Manifest, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    manifest = tiny_fp32(folder, CONTEXT)
    return folder, manifest, open_session(folder / "fp32" / "model.onnx", CPU, 1)


def make(model: Model, *, on_device: bool = False, seed: int = 0) -> Batcher:
    runner = SharedKvRunner(model[2], SLOTS, CONTEXT, CPU, on_device=on_device)
    source, time_s = random.Random(seed), 0.0

    def timer() -> float:
        nonlocal time_s
        time_s += source.choice([0.0001, 0.0002, 0.001])
        return time_s

    text = Text(model[0], model[1].tokenizer)
    return Batcher(runner, text, slots=SLOTS, context=CONTEXT, meter=ModelMeter(1, 1, 1), timer=timer)


def run(batcher: Batcher, requests: list[Request]) -> tuple[dict[str, Finished], int]:
    """How each ended, and the number of steps."""
    for request in requests:
        batcher.add(request)
    ended: dict[str, Finished] = {}
    steps = 0
    while batcher.active:
        ended |= {e.id: e for e in batcher.step() if isinstance(e, Finished)}
        steps += 1
    return ended, steps


def request(name: str, prompt: list[int], sampling: Sampling, *, lookup: bool) -> Request:
    return Request(name, [], sampling, prompt=prompt, prompt_lookup=lookup)


def test_a_repeated_piece_is_guessed_from_where_it_stood() -> None:
    """What followed the last three tokens the last time; nothing when they are new."""
    drafter = Drafter([1, 2, 3, 4, 5, 6, 9, 1, 2])
    assert drafter.draft(4, 0.0) == []
    drafter.add(3)
    assert drafter.draft(3, 0.0) == [4, 5, 6]
    for token in (4, 5):
        drafter.add(token)
    assert drafter.draft(2, 0.0) == [6, 9]
    drafter.add(8)  # leaves the copy
    assert drafter.draft(4, 0.0) == []


def test_guesses_stop_where_they_do_not_pay_and_begin_again_when_they_would() -> None:
    """Right guesses raise the share, wrong ones lower it, verified or not."""
    drafter = Drafter([])
    source = random.Random(0)
    for _ in range(60):  # the same three tokens, followed by another one each time
        for token in (1, 2, 3, source.randrange(10, 10**6)):
            drafter.add(token)
            drafter.draft(MOST, 0.15)
    for token in (1, 2, 3):
        drafter.add(token)
    assert drafter.share < 0.15
    assert drafter.draft(MOST, 0.15) == []
    for token in list(range(20, 60)) * 2:
        drafter.add(token)
        drafter.draft(MOST, 0.15)
    assert drafter.share > 0.8


@given(st.floats(0, 1), st.floats(0, 2), st.integers(0, 12))
def test_the_number_of_guesses_is_the_best_of_all(share: float, slope: float, most: int) -> None:
    """By expected tokens over time, no other number does better."""

    def gain(count: int) -> float:
        return sum(share**i for i in range(count + 1)) / (1 + slope * count)

    chosen = worthwhile(share, slope, most)
    assert 0 <= chosen <= most
    assert gain(chosen) >= max(gain(count) for count in range(most + 1)) / 1.0501


def test_the_cost_of_a_guess_is_measured() -> None:
    """The slope follows what steps took."""
    widths = Widths()
    for _ in range(40):
        widths.took(0, 0.010)
        widths.took(4, 0.014)
    assert widths.slope == pytest.approx(0.1, abs=0.01)


PIECE = [30, 31, 32, 33, 34, 35, 36, 37]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_fewer_steps_give_the_same_answer(model: Model, on_device: bool, temperature: float) -> None:
    """Greedy and seeded: token by token what plain decoding gives, with its log-probabilities."""
    sampling = Sampling(max_tokens=100, temperature=temperature, top_k=2, seed=5)
    plain, _ = run(make(model, on_device=on_device), [request("a", PIECE * 3, sampling, lookup=False)])
    guessed, steps = run(make(model, on_device=on_device), [request("a", PIECE * 3, sampling, lookup=True)])
    one, other = plain["a"], guessed["a"]
    assert one.tokens == other.tokens
    assert one.mean_logprob == pytest.approx(other.mean_logprob, abs=1e-4)
    assert one.tokens_drafted == 0
    assert 0 < other.tokens_accepted <= other.tokens_drafted
    assert steps <= len(other.tokens) - other.tokens_accepted + 1


turns = st.tuples(
    st.lists(st.integers(20, 26), min_size=1, max_size=40),
    st.integers(1, 50),
    st.sampled_from([0.0, 0.0, 0.8]),
    st.integers(0, 6),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(turns, min_size=1, max_size=4), st.booleans(), st.integers(0, 999))
def test_any_answer_is_that_of_plain_decoding(
    model: Model, plan: list[tuple[list[int], int, float, int]], on_device: bool, seed: int
) -> None:
    """Whoever joins or leaves meanwhile, greedy or seeded, however many tokens are guessed."""
    requests = [
        request(f"r{i}", prompt, Sampling(max_tokens=tokens, temperature=warm, seed=i), lookup=True)
        for i, (prompt, tokens, warm, _) in enumerate(plan)
    ]
    batcher = make(model, on_device=on_device, seed=seed)
    waiting = list(zip(requests, (turn[3] for turn in plan), strict=True))
    ended: dict[str, Finished] = {}
    step = 0
    while waiting or batcher.active:
        for item in [w for w in waiting if w[1] <= step and batcher.free_slots > 0]:
            batcher.add(item[0])
            waiting.remove(item)
        ended |= {e.id: e for e in batcher.step() if isinstance(e, Finished)}
        step += 1
    for one in requests:
        plain, _ = run(make(model), [request("x", one.prompt or [], one.sampling, lookup=False)])
        assert ended[one.id].tokens == plain["x"].tokens
        assert ended[one.id].text == plain["x"].text
