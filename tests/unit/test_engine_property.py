"""Whatever runs beside it, and wherever its prompt's beginning came from: the tokens are those of a solo run."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.workers.engine.batcher import Batcher, Failed, Finished, Request
from services.workers.engine.captured import CapturedRunner
from services.workers.engine.energy import ModelMeter
from services.workers.engine.joint import joined
from services.workers.engine.runner import SharedKvRunner
from services.workers.engine.schedule import Schedule
from services.workers.engine.session import open_session
from services.workers.engine.text import Text
from shared.messages import Device, Sampling
from shared.models.manifest import Manifest
from tests.tiny import tiny_fp32

CPU = Device(kind="cpu", name="cpu", threads=1)
SLOTS, EXTRA, CONTEXT = 3, 1, 96
Model = tuple[Path, Manifest, Any, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    manifest = tiny_fp32(folder, CONTEXT)
    graph = folder / "fp32" / "model.onnx"
    joint = joined(onnx.load(str(graph), load_external_data=False))
    assert joint is not None
    together = open_session(graph, CPU, 1, graph=joint.SerializeToString())
    return folder, manifest, open_session(graph, CPU, 1), together


def make(
    model: Model,
    *,
    on_device: bool = False,
    capacity: int | None = None,
    timer: Callable[[], float] | None = None,
    min_shared: int = 4,
    joint: bool = False,
    captured: bool = False,
) -> Batcher:
    runner = SharedKvRunner(
        model[2], SLOTS + EXTRA, CONTEXT, CPU, on_device=on_device, joint=model[3] if joint else None
    )
    if captured:
        runner = CapturedRunner(model[2], SLOTS + EXTRA, CONTEXT, CPU)
    schedule = Schedule(
        SLOTS, compact=runner.compact, extra_rows=EXTRA, capacity_tokens=capacity, min_shared=min_shared
    )
    more: dict[str, Any] = {"timer": timer} if timer else {}
    if joint:
        more |= {"prefill_chunk": 8, "long": 8}  # more is read in several steps, and so with what decodes
    text = Text(model[0], model[1].tokenizer)
    return Batcher(
        runner, text, slots=SLOTS, context=CONTEXT, meter=ModelMeter(1, 1, 1), schedule=schedule, **more
    )  # fmt: skip


def request(name: str, prompt: list[int], tokens: int, **more: object) -> Request:
    return Request(name, [], Sampling(max_tokens=tokens), prompt=prompt, **more)  # type: ignore[arg-type]


_solo: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}


def solo(model: Model, prompt: list[int], tokens: int) -> tuple[int, ...]:
    key = (tuple(prompt), tokens)
    if key not in _solo:
        batcher = make(model)
        batcher.add(request("x", prompt, tokens))
        while batcher.active:
            for event in batcher.step():
                if isinstance(event, Finished):
                    _solo[key] = event.tokens
    return _solo[key]


SYSTEM = [[20 + i for i in range(24)], [60 + i * 3 % 40 for i in range(40)]]
turns = st.fixed_dictionaries({
    "system": st.sampled_from([None, 0, 1]),
    "own": st.lists(st.integers(5, 250), min_size=1, max_size=30),
    "tokens": st.integers(1, 12),
    "at": st.integers(0, 12),
    "follows": st.booleans(),
    "urgent": st.booleans(),
    "cancel_at": st.sampled_from([None, None, None, 1, 3, 6, 9]),
})  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(turns, min_size=1, max_size=8),
    st.sampled_from(["apart", "joint", "on a device", "captured"]),
    st.sampled_from([None, CONTEXT, 2 * CONTEXT]),
    st.integers(0, 2**16),
)
def test_any_schedule_gives_the_tokens_of_a_solo_run(
    model: Model, plan: list[dict[str, object]], way: str, capacity: int | None, seed: int
) -> None:
    """Ragged lengths, late joins, prompts read in pieces of any size, in passes of their own or in one with decoding,
    shared and continued beginnings taken from the cache, priorities, cancellations, memory for one or for all, rows
    moved on the host or on a device, decoding over buffers that stay where they are."""
    source = random.Random(seed)
    time_s = 0.0

    def timer() -> float:
        nonlocal time_s
        time_s += source.choice([0.0001, 0.001, 0.01])
        return time_s

    batcher = make(
        model, on_device=way == "on a device", capacity=capacity, timer=timer, joint=way == "joint",
        captured=way == "captured",
    )  # fmt: skip
    prompts: dict[str, list[int]] = {}
    ended: dict[str, Finished] = {}
    waiting, cancelled, step, cached = list(enumerate(plan)), set(), 0, 0
    while waiting or batcher.active:
        for item in list(waiting):
            number, turn = item
            if turn["at"] > step or batcher.free_slots <= 0:  # type: ignore[operator]
                continue
            system, own, tokens = turn["system"], turn["own"], turn["tokens"]
            assert isinstance(own, list)
            assert isinstance(tokens, int)
            prompt = [*(SYSTEM[system] if isinstance(system, int) else []), *own]
            if turn["follows"] and ended:  # the next turn of a conversation
                last = list(ended.values())[-1]
                longer = [*prompts[last.id], *last.tokens, *own]
                prompt = longer if len(longer) < CONTEXT - 1 else prompt
            name = f"s{number}"
            prompts[name] = prompt
            batcher.add(request(name, prompt, tokens, urgent=turn["urgent"]))
            waiting.remove(item)
        for number, turn in enumerate(plan):
            if turn["cancel_at"] == step and batcher.cancel(f"s{number}"):
                cancelled.add(f"s{number}")
        for event in batcher.step():
            assert not isinstance(event, Failed)
            assert event.id not in cancelled
            if isinstance(event, Finished):
                ended[event.id] = event
                cached += event.tokens_cached
        step += 1
    assert set(ended) | cancelled == set(prompts)
    for name, end in ended.items():
        tokens = plan[int(name[1:])]["tokens"]
        assert isinstance(tokens, int)
        assert end.tokens == solo(model, prompts[name], tokens), (name, end.tokens_cached)
        assert end.tokens_cached < end.tokens_in


@pytest.mark.parametrize("on_device", [False, True])
def test_what_was_read_once_is_not_read_again(model: Model, on_device: bool) -> None:
    """A shared system prompt and the turns before are taken from the cache, and the answer says how many tokens."""
    batcher = make(model, on_device=on_device)

    def ask(name: str, prompt: list[int]) -> Finished:
        batcher.add(request(name, prompt, 5))
        ended = [e for _ in range(20) for e in batcher.step() if isinstance(e, Finished)]
        return ended[0]

    first = ask("a", [*SYSTEM[1], 9, 8, 7])
    assert first.tokens_cached == 0
    other = ask("b", [*SYSTEM[1], 200])
    assert other.tokens_cached == len(SYSTEM[1])
    again = ask("c", [*SYSTEM[1], 9, 8, 7, *first.tokens, 5, 6])
    assert again.tokens_cached == len(SYSTEM[1]) + 3 + len(first.tokens) - 1  # the last token was never fed back
    assert ask("d", [*SYSTEM[1], 9, 8, 7, *first.tokens, 5, 6]).tokens == again.tokens


def test_a_prompt_is_read_with_the_decoding_beside_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a joint graph, a long prompt among running streams takes no passes of its own, and all tokens are
    those of solo runs."""
    batcher = make(model, joint=True)
    runner = batcher._runner
    passes: list[tuple[str, int]] = []

    def counted(name: str) -> None:
        run = getattr(runner, name)

        def wrapper(*arguments: object, **more: object) -> object:
            passes.append((name, len(arguments[1]) if name != "decode" else 0))  # type: ignore[arg-type]
            return run(*arguments, **more)

        monkeypatch.setattr(runner, name, wrapper)

    prompts = {"a": [5, 6, 7], "b": [9, 8], "long": [20 + i for i in range(70)]}
    for name in ("a", "b"):
        batcher.add(request(name, prompts[name], 80))
    ends: dict[str, Finished] = {}
    for _ in range(4):
        batcher.step()
    for name in ("prefill", "join", "decode"):
        counted(name)
    batcher.add(request("long", prompts["long"], 10))
    while batcher.active:
        ends |= {e.id: e for e in batcher.step() if isinstance(e, Finished)}
    assert sum(size for name, size in passes if name == "join") == len(prompts["long"])
    assert not [name for name, _ in passes if name == "prefill"]
    for name, end in ends.items():
        assert end.tokens == solo(model, prompts[name], len(end.tokens))
    assert ends["long"].energy_in_j > 0
