"""The engine over a real (tiny) model: batching changes nothing, sampling is reproducible, text is cut right."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.workers.engine.batcher import Batcher, Delta, Event, Failed, Finished, Request
from services.workers.engine.energy import ModelMeter, RaplMeter
from services.workers.engine.runner import SharedKvRunner
from services.workers.engine.session import open_session
from services.workers.engine.text import Growing, Text
from shared.errors import ContextExceeded, DeviceUnavailable
from shared.messages import Device, Sampling
from shared.models.gguf_import import import_gguf
from shared.models.manifest import Manifest
from tests.tiny import write_tiny_gguf

CPU = Device(kind="cpu", name="cpu", threads=1)
SLOTS, CONTEXT = 3, 96


class FakeMeter:
    """Each reading is one joule more."""

    source = "model"

    def __init__(self) -> None:
        self.readings = 0

    def read_j(self) -> float:
        self.readings += 1
        return float(self.readings)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("model")
    gguf = write_tiny_gguf(folder / "tiny.gguf", context=CONTEXT)
    return folder, import_gguf(gguf, folder, name="t", licence="", source="", variants=["fp32"])


@pytest.fixture(scope="module")
def session(model: tuple[Path, Manifest]) -> object:
    return open_session(model[0] / "fp32" / "model.onnx", CPU, 1)


def make(model: tuple[Path, Manifest], session: object, *, compact: bool = True, chunk: int = 256) -> Batcher:
    runner = SharedKvRunner(session, SLOTS, CONTEXT, CPU)  # type: ignore[arg-type]
    runner.compact = compact
    text = Text(model[0], model[1].tokenizer)
    return Batcher(runner, text, slots=SLOTS, context=CONTEXT, meter=FakeMeter(), prefill_chunk=chunk)  # type: ignore[arg-type]


def request(name: str, prompt: list[int], tokens: int = 8, **sampling: object) -> Request:
    return Request(name, [], Sampling(max_tokens=tokens, **sampling), prompt=prompt)  # type: ignore[arg-type]


def finish(batcher: Batcher) -> dict[str, Finished]:
    ended: dict[str, Finished] = {}
    while batcher.active:
        ended.update({e.id: e for e in batcher.step() if isinstance(e, Finished)})
    return ended


def alone(model: tuple[Path, Manifest], session: object, one: Request) -> tuple[int, ...]:
    batcher = make(model, session)
    batcher.add(one)
    return finish(batcher)[one.id].tokens


prompts = st.lists(st.integers(5, 250), min_size=1, max_size=40)
plans = st.lists(st.tuples(prompts, st.integers(1, 12), st.integers(0, 6)), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plans, st.integers(0, 20), st.booleans(), st.sampled_from([4, 16, 256]))
def test_any_schedule_gives_the_tokens_of_a_solo_run(
    model: tuple[Path, Manifest],
    session: object,
    plan: list[tuple[list[int], int, int]],
    cancel_at: int,
    compact: bool,
    chunk: int,
) -> None:
    """Ragged lengths, late joins, prompts read in pieces, a cancellation, moved or unmoved rows: same tokens."""
    batcher = make(model, session, compact=compact, chunk=chunk)
    waiting = [(at, request(f"s{i}", prompt, tokens)) for i, (prompt, tokens, at) in enumerate(plan)]
    ended: dict[str, Finished] = {}
    step = 0
    while waiting or batcher.active:
        for item in [w for w in waiting if w[0] <= step and batcher.free_slots > 0]:
            if batcher.free_slots > 0:
                batcher.add(item[1])
                waiting.remove(item)
        if step == cancel_at:
            batcher.cancel("s0")
        ended.update({e.id: e for e in batcher.step() if isinstance(e, Finished)})
        step += 1
    for i, (prompt, tokens, _) in enumerate(plan):
        if f"s{i}" in ended:
            assert ended[f"s{i}"].tokens == alone(model, session, request("x", prompt, tokens))
    assert len(ended) >= len(plan) - 1


def test_sampling_is_reproducible_by_seed(model: tuple[Path, Manifest], session: object) -> None:
    """The same seed gives the same tokens, whatever runs beside it; another seed gives others."""
    hot = {"temperature": 1.5, "top_p": 0.95, "top_k": 50}
    one = alone(model, session, request("a", [9, 8, 7], 20, seed=1, **hot))
    batcher = make(model, session)
    batcher.add(request("a", [9, 8, 7], 20, seed=1, **hot))
    batcher.add(request("b", [9, 8, 7], 20, seed=2, **hot))
    both = finish(batcher)
    assert both["a"].tokens == one
    assert both["b"].tokens != one


def test_confidence_is_that_of_the_model_s_own_distribution(model: tuple[Path, Manifest], session: object) -> None:
    """Log-probabilities are negative, the least is the least, and entropy is positive."""
    batcher = make(model, session)
    batcher.add(request("a", [10, 20], 10))
    end = finish(batcher)["a"]
    assert end.min_logprob <= end.mean_logprob < 0
    assert end.mean_entropy > 0
    assert end.tokens_in == 2
    assert end.tokens_out == len(end.tokens) <= 10


def test_a_prompt_that_fills_the_context_is_refused_and_answers_are_cut(
    model: tuple[Path, Manifest], session: object
) -> None:
    """A prompt without room for an answer raises; `max_tokens` is limited to what is left."""
    batcher = make(model, session)
    with pytest.raises(ContextExceeded, match=f"{CONTEXT} tokens"):
        batcher.add(request("a", [9] * CONTEXT))
    batcher.add(request("b", [9] * (CONTEXT - 4), 500))
    end = finish(batcher)["b"]
    assert end.tokens_out <= 4


def test_a_deadline_ends_a_running_sequence(model: tuple[Path, Manifest], session: object) -> None:
    """Past its deadline a sequence fails with the typed error and frees its row."""
    now = 0.0
    runner = SharedKvRunner(session, SLOTS, CONTEXT, CPU)  # type: ignore[arg-type]
    text = Text(model[0], model[1].tokenizer)
    batcher = Batcher(runner, text, slots=SLOTS, context=CONTEXT, meter=FakeMeter(), clock=lambda: now)  # type: ignore[arg-type]
    batcher.add(Request("a", [], Sampling(max_tokens=50), deadline_at=5.0, prompt=[9, 9]))
    batcher.step()
    now = 6.0
    events = batcher.step()
    assert [type(e) for e in events] == [Failed]
    assert batcher.free_slots == SLOTS


def test_energy_shares_add_up_to_the_meter(model: tuple[Path, Manifest], session: object) -> None:
    """What the sequences were charged is what the meter counted during steps that ran something."""
    meter = FakeMeter()
    runner = SharedKvRunner(session, SLOTS, CONTEXT, CPU)  # type: ignore[arg-type]
    batcher = Batcher(
        runner, Text(model[0], model[1].tokenizer), slots=SLOTS, context=CONTEXT, meter=meter,  # type: ignore[arg-type]
    )  # fmt: skip
    for name in ("a", "b"):
        batcher.add(request(name, [9, 8, 7], 6))
    before = meter.readings
    steps = 0
    ended: list[Event] = []
    while batcher.active:
        ended += [e for e in batcher.step() if isinstance(e, Finished)]
        steps += 1
    charged = sum(e.energy_in_j + e.energy_out_j for e in ended if isinstance(e, Finished))
    assert 0 < charged <= meter.readings - before
    # Each step reads at its start; of what lies between readings, only the gaps between steps go to nobody.
    assert charged >= meter.readings - before - steps


def test_streamed_pieces_are_the_text(model: tuple[Path, Manifest], session: object) -> None:
    """The deltas of a sequence, joined, are its final text."""
    batcher = make(model, session)
    batcher.add(request("a", [40, 41, 42], 30, temperature=1.2, seed=5))
    pieces, end = "", None
    while batcher.active:
        for event in batcher.step():
            if isinstance(event, Delta):
                pieces += event.text
            elif isinstance(event, Finished):
                end = event
    assert end is not None
    assert pieces == end.text


@pytest.mark.parametrize("stop", [[], ["a"]])
def test_an_answer_that_nobody_streams_is_the_same_answer(
    model: tuple[Path, Manifest], session: object, stop: list[str]
) -> None:
    """Only its text comes at the end, unless a stop string has to be looked for; its first token is told as ever."""
    batcher = make(model, session)
    found: dict[bool, tuple[list[str], Finished]] = {}
    for streamed in (True, False):
        sampling = Sampling(max_tokens=40, temperature=1.5, seed=3, stop=stop)
        batcher.add(Request("a", [], sampling, prompt=[40, 41, 42], streamed=streamed))
        events: list[Event] = []
        while batcher.active:
            events += batcher.step()
        end = events[-1]
        assert isinstance(end, Finished)
        found[streamed] = [e.text for e in events if isinstance(e, Delta)], end
    (grown, told), (late, end) = found[True], found[False]
    assert (end.text, end.tokens, end.reason) == (told.text, told.tokens, told.reason)
    assert "".join(grown) == "".join(late) == end.text
    assert late == (grown if stop else ["", end.text])


def test_a_first_token_does_not_wait_for_the_decoding_that_follows(
    model: tuple[Path, Manifest], session: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told when its prompt has been read; the rest of the step's events when the step is over."""
    batcher = make(model, session)
    order: list[str] = []
    decode = batcher._runner.decode
    monkeypatch.setattr(batcher._runner, "decode", lambda *args: (order.append("decode"), decode(*args))[1])
    batcher.add(request("a", [40, 41, 42]))
    batcher.add(request("b", [50, 51]))
    left = batcher.step(lambda events: order.extend(event.id for event in events))
    assert order == ["a", "b", "decode"]
    assert {event.id for event in left} <= {"a", "b"}


def test_text_never_splits_a_character_and_stops_before_a_stop_string(model: tuple[Path, Manifest]) -> None:
    """Bytes of one character wait for the rest; a stop string is found across tokens and not shown."""
    tokenizer = Text(model[0], model[1].tokenizer).tokenizer
    growing = Growing(tokenizer, [])
    shown = [growing.push(t) for t in tokenizer.encode("é東🙂", add_special_tokens=False).ids]
    assert "".join(shown) + growing.finish() == "é東🙂"
    assert not any("\ufffd" in piece for piece in shown)

    stopping = Growing(tokenizer, ["END", "###"])
    out = ""
    for token in tokenizer.encode("one EN two END three", add_special_tokens=False).ids:
        out += stopping.push(token)
        assert "END" not in out
        if stopping.stopped:
            break
    assert out + stopping.finish() == "one EN two "


def test_cuda_is_never_silently_the_cpu(model: tuple[Path, Manifest]) -> None:
    """A session asked for CUDA that ONNX Runtime gives on the CPU is refused."""
    with pytest.raises(DeviceUnavailable, match="CUDA device 0 was asked for"):
        open_session(model[0] / "fp32" / "model.onnx", Device(kind="cuda", name="gpu"), 1)


def test_rapl_counts_over_a_wraparound(tmp_path: Path) -> None:
    """A counter that wraps goes on counting; a machine without one is told apart."""
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "max_energy_range_uj").write_text("1000000\n")
    (zone / "energy_uj").write_text("900000\n")
    meter = RaplMeter(tmp_path)
    (zone / "energy_uj").write_text("100000\n")
    assert abs(meter.read_j() - 0.2) < 1e-9
    with pytest.raises(OSError, match="RAPL"):
        RaplMeter(tmp_path / "none")
    model = ModelMeter(10.0, 5.0, 1.0)
    assert model.source == "model"
    assert model.read_j() <= model.read_j()
