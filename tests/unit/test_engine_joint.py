"""One pass that reads a prompt and decodes: its logits are those of two, and its size follows what was measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from services.workers.engine import joint
from services.workers.engine.batcher import Batcher, Finished, Request
from services.workers.engine.energy import AttributedMeter
from services.workers.engine.pace import JOINED, LEAST_JOINED, STALL, Pace
from services.workers.engine.runner import SharedKvRunner
from services.workers.engine.session import open_session
from services.workers.engine.text import Text
from shared.messages import Device, Sampling
from shared.models.gguf_import import import_gguf
from tests.families.cases import CASES, Case
from tests.families.logits import Imported
from tests.tiny import write_tiny_gguf

CPU = Device(kind="cpu", name="cpu", threads=1)
APART = {"llama-far", "qwen3", "qwen3-tied", "phi4-partial-long", "gemma3", "phi3-long-above", "phi3-long-below"}
"""Their graphs rotate queries and keys by the rows' places themselves, beside the operator: not joined."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_joint_pass_gives_what_two_give(tmp_path: Path, case: Case) -> None:
    """For every family, in fp32: a prompt read in pieces beside two rows of unequal length that decode."""
    Imported(case, tmp_path)
    model = tmp_path / "fp32" / "model.onnx"
    together = joint.joined(onnx.load(str(model), load_external_data=False))
    if case.name in APART:
        assert together is None
        return
    assert together is not None
    session, other = open_session(model, CPU, 1), open_session(model, CPU, 1, graph=together.SerializeToString())
    apart, joined = (SharedKvRunner(session, 3, case.capacity, CPU, joint=each) for each in (None, other))
    assert (apart.joins, joined.joins) == (False, True)
    prompt, rows = case.ids[:40], [case.ids[:5], case.ids[3:14]]
    for runner in (apart, joined):
        for row, tokens in enumerate(rows):
            runner.prefill(row, tokens, 0)
    lengths = [len(tokens) for tokens in rows]
    for start, stop in ((0, 7), (7, 8), (8, 30), (30, 40)):
        piece, tokens, ends = prompt[start:stop], [case.ids[start], case.ids[stop]], stop == len(prompt)
        behind = apart.prefill(2, piece, start)
        expected = apart.decode(tokens, lengths).copy()
        got = joined.join(2, piece, start, tokens, lengths, ends=ends)
        np.testing.assert_allclose(got[-2:], expected, rtol=0, atol=1e-4)
        assert len(got) == 2 + ends
        lengths = [length + 1 for length in lengths]
    np.testing.assert_allclose(got[0], behind, rtol=0, atol=1e-4)
    np.testing.assert_allclose(joined.prefill(2, [9], 40), apart.prefill(2, [9], 40), rtol=0, atol=1e-4)


def pace(
    per_token_s: float, added_s: float, *, decode_s: float = 0.013, steps: int = 60, stall: float = JOINED
) -> tuple[Pace, list[float]]:
    """After `steps` joint passes of a device that takes so much for a token and for a piece; the passes' times."""
    paced, took = Pace(512), []
    paced.has_read(32, 32 * per_token_s)
    for _ in range(20):
        paced.has_decoded(7, decode_s)
    for step in range(steps):
        tokens = paced.joined(7, contended=False, first=step == 0, stall=stall)
        took.append(decode_s + added_s + tokens * per_token_s)
        paced.has_joined(tokens, 7, took[-1])
    return paced, took


@pytest.mark.parametrize("stall", [JOINED, STALL])
@pytest.mark.parametrize(("per_token_s", "added_s"), [(0.0008, 0.0025), (0.0015, 0.007), (0.0002, 0.001)])
def test_joint_passes_come_to_their_share(per_token_s: float, added_s: float, stall: float) -> None:
    """They settle close to so many times a step that only decodes, and none is far above."""
    _, took = pace(per_token_s, added_s, stall=stall)
    assert max(took) < 1.15 * stall * 0.013
    assert np.mean(took[20:]) == pytest.approx(stall * 0.013, rel=0.1)


@pytest.mark.parametrize(("tokens", "together"), [(12, False), (60, True)])
def test_a_prompt_that_cannot_be_read_at_once_is_read_with_decoding(
    tmp_path: Path, tokens: int, *, together: bool
) -> None:
    """To its end, however long it is; one that can be is read apart, so that others may follow in the same step. Its
    answer is that of a solo run either way."""
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf", context=96)
    manifest = import_gguf(gguf, tmp_path, name="t", licence="", source="", variants=["fp32"])
    model = tmp_path / "fp32" / "model.onnx"
    graph = joint.joined(onnx.load(str(model), load_external_data=False))
    assert graph is not None
    session, other = open_session(model, CPU, 1), open_session(model, CPU, 1, graph=graph.SerializeToString())
    long = Request("long", [], Sampling(max_tokens=8), prompt=[20 + i for i in range(tokens)])

    def run(*, beside: bool) -> tuple[list[str], tuple[int, ...]]:
        runner, read = SharedKvRunner(session, 2, 96, CPU, joint=other), []
        for name in ("prefill", "join"):
            setattr(runner, name, partial(_told, read, name, getattr(runner, name)))
        meter = AttributedMeter("model", 1.0)
        batcher = Batcher(runner, Text(tmp_path, manifest.tokenizer), slots=2, context=96, meter=meter)
        if beside:
            batcher.add(Request("stream", [], Sampling(max_tokens=90), prompt=[5, 6]))
            for _ in range(4):
                batcher.step()
            batcher._pace = Pace(256)  # a device that was seen to read 16 tokens in the time it may take
            for _ in range(4):
                batcher._pace.has_decoded(1, 0.010)
            batcher._pace.has_read(16, 16 * 0.001)
        read.clear()
        batcher.add(long)
        while True:
            for event in batcher.step():
                if isinstance(event, Finished) and event.id == "long":
                    return read, event.tokens

    read, answer = run(beside=True)
    assert set(read) == ({"join"} if together else {"prefill"})
    assert answer == run(beside=False)[1]


def _told(said: list[str], name: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    said.append(name)
    return call(*args, **options)


def test_a_step_that_was_held_up_is_not_believed_for_long() -> None:
    """One slow pass makes the next ones smaller, at first; a prompt is read on whatever happens."""
    paced, _ = pace(0.0008, 0.0025)
    before = paced.joined(7, contended=False, first=False)
    paced.has_joined(before, 7, 0.2)
    assert LEAST_JOINED <= paced.joined(7, contended=False, first=False) < before
    for _ in range(6):
        tokens = paced.joined(7, contended=False, first=False)
        paced.has_joined(tokens, 7, 0.013 + 0.0025 + tokens * 0.0008)
    assert paced.joined(7, contended=False, first=False) >= before - 2


def test_slow_steps_among_many_do_not_raise_what_decoding_alone_is_taken_to_be() -> None:
    """The median counts: a budget is not doubled by the step before it having been held up."""
    paced = Pace(512)
    paced.has_read(32, 0.03)
    for seconds in [0.013] * 12 + [0.05, 0.05]:
        paced.has_decoded(7, seconds)
    calm = Pace(512)
    calm.has_read(32, 0.03)
    for _ in range(14):
        calm.has_decoded(7, 0.013)
    assert paced.joined(7, contended=False, first=False) == calm.joined(7, contended=False, first=False)
