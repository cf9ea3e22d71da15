"""Decoding as CUDA graphs need it: over buffers that stay where they are, in a few numbers of rows. On the CPU, whose
sessions take the graph ids and do nothing about them; no graph has been captured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from structlog.testing import capture_logs

from services.workers.engine.captured import GRAPH_ID, CapturedRunner, width, without_copies
from services.workers.engine.runner import SharedKvRunner
from services.workers.engine.schedule import Copy, Release
from services.workers.engine.session import open_session
from shared.errors import SettingsInvalid, UnsupportedModel
from shared.messages import Device
from shared.settings import Settings
from tests.families.cases import CASES, Case
from tests.families.logits import Imported
from tests.placement import copies
from tests.tiny import tiny_fp32

CPU = Device(kind="cpu", name="cpu", threads=1)
ROWS, CONTEXT = 12, 64


class Spy:
    """A session that notes of each run how many rows its graph has (-1: it has none), and fails those it is told to."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self.graphs: list[int] = []
        self.bound: dict[int, Any] = {}
        self.fails: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: ort.RunOptions) -> None:
        graph = int(options.get_run_config_entry(GRAPH_ID))
        rows = -1 if graph == -1 else binding.get_outputs()[0].shape()[0]
        self.graphs.append(rows)
        if rows in self.fails:
            raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
        if rows > 0:
            assert graph > 0
            assert self.bound.setdefault(graph, binding) is binding, "a graph keeps its addresses"
        self._session.run_with_iobinding(binding, options)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> ort.InferenceSession:
    folder = tmp_path_factory.mktemp("model")
    tiny_fp32(folder, CONTEXT)
    return open_session(folder / "fp32" / "model.onnx", CPU, 1)


@pytest.fixture
def spy(session: ort.InferenceSession) -> Spy:
    return Spy(session)


def captured(session: Any, rows: int = ROWS) -> CapturedRunner:
    return CapturedRunner(session, rows, CONTEXT, CPU)


def plain(session: Any, rows: int = ROWS) -> SharedKvRunner:
    return SharedKvRunner(session, rows, CONTEXT, CPU, on_device=True)


def prompt(row: int, length: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(row).integers(5, 250, length)]


def greedy(logits: NDArray[Any]) -> list[int]:
    return [int(t) for t in logits.argmax(-1)]


def test_rows_are_rounded_up_to_few_numbers() -> None:
    assert [width(rows, 64) for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17, 63, 64)] == [1, 2, 4, 4, 8, 8, 16, 16, 24, 64, 64]
    assert [width(rows, 3) for rows in (1, 2, 3)] == [1, 2, 3]  # and never to more than there are


def test_ragged_rows_that_join_and_leave_have_the_logits_of_the_ordinary_path(spy: Spy) -> None:
    """To the bit: that the total length is always the whole context changes nothing, nor do rows that nobody asked
    for. Each number of rows is one graph over one binding; whatever is no decode step belongs to none."""
    runners = (captured(spy), plain(spy._session))
    lengths = [1 + 3 * row for row in range(ROWS)]
    tokens = [0] * ROWS
    for row, length in enumerate(lengths):
        ours, theirs = (runner.prefill(row, prompt(row, length), 0) for runner in runners)
        np.testing.assert_array_equal(ours, theirs)
        tokens[row] = int(theirs.argmax())
    assert set(spy.graphs) == {-1}
    spy.graphs.clear()
    spans = [1, 3, 5, 12, 12, 2, 9, 7, 11, 1, 12]
    for span in spans:
        ours, theirs = (runner.decode(tokens[:span], lengths[:span]) for runner in runners)
        np.testing.assert_array_equal(ours, theirs)
        tokens[:span] = greedy(theirs)
        lengths[:span] = [length + 1 for length in lengths[:span]]
    assert spy.graphs == [width(span, ROWS) for span in spans] == [1, 4, 8, 12, 12, 2, 12, 8, 12, 1, 12]
    spy.graphs.clear()
    ours, theirs = (runner.verify(2, [9, 8, 7], lengths[2]) for runner in runners)
    np.testing.assert_array_equal(ours, theirs)
    assert spy.graphs == [-1]


def test_rows_that_nobody_asked_for_keep_what_they_hold(spy: Spy) -> None:
    """A prompt that is half read, a prefix that is kept, one copied and one cut to its beginning: all beside steps that
    run their rows too."""
    runner = captured(spy, 8)
    text = prompt(7, 30)
    alone = plain(spy._session, 1).prefill(0, text, 0)
    runner.prefill(0, prompt(0, 5), 0)
    for row in (4, 6, 7):
        runner.prefill(row, text[:20], 0)
    runner.apply(Copy(4, 5, 12))
    runner.apply(Copy(6, 6, 15))
    runner.apply(Release(7, 8))
    for step in range(6):
        runner.decode([9] * 4 + [0], [5 + step, step, step, step, 20])  # row 4 lies within the rows asked for
    assert set(spy.graphs) == {-1, 8}
    for row, kept in ((4, 20), (5, 12), (6, 15), (7, 8)):
        np.testing.assert_allclose(runner.prefill(row, text[kept:], kept), alone, atol=1e-5)


def test_a_full_row_is_not_written_beyond(spy: Spy) -> None:
    """What a row without room reads goes to its last place, and no further: the next row is as it was."""
    runner = captured(spy, 8)
    runner.prefill(5, prompt(1, CONTEXT), 0)
    text = prompt(2, 9)
    alone = plain(spy._session, 1).prefill(0, text, 0)
    runner.prefill(6, text[:6], 0)
    for step in range(3):
        runner.decode([9] * 5, [step] * 5)
    assert runner._steps[8].parts["seqlens_k"].tolist()[5:] == [CONTEXT - 1, 6, 0]
    np.testing.assert_allclose(runner.prefill(6, text[6:], 6), alone, atol=1e-5)


def test_a_capture_that_fails_ends_capturing(spy: Spy) -> None:
    """Said once; the step is run as ever, and all that follow."""
    runner, other = captured(spy, 4), plain(spy._session, 4)
    for one in (runner, other):
        one.prefill(0, prompt(0, 5), 0)
        one.prefill(1, prompt(1, 3), 0)
    spy.graphs.clear()
    spy.fails = {2}
    with capture_logs() as logs:
        np.testing.assert_array_equal(runner.decode([7], [5]), other.decode([7], [5]))
        for step in (0, 1):
            lengths = [6 + step, 3 + step]
            np.testing.assert_array_equal(runner.decode([8, 9], lengths), other.decode([8, 9], lengths))
        np.testing.assert_array_equal(runner.decode([8], [8]), other.decode([8], [8]))
    assert spy.graphs == [1, 2, -1, -1, -1]
    (said,) = logs
    assert (said["event"], said["log_level"]) == ("cuda_graphs_off", "warning")
    assert "failure 900" in said["reason"]


def test_two_runners_over_one_session_have_graphs_of_their_own(spy: Spy) -> None:
    """The session would replay the first one's over addresses that may be gone."""
    for _ in range(2):
        runner = captured(spy, 4)
        for rows in (1, 2, 3, 2):
            runner.decode([7] * rows, [0] * rows)
    assert len(spy.bound) == 6


def test_a_graph_that_fails_once_it_has_run_is_no_failed_capture(spy: Spy) -> None:
    """The step fails as any step does; the next ones are still captured."""
    runner = captured(spy, 2)
    runner.decode([7], [0])
    spy.fails = {1}
    with pytest.raises(RuntimeError, match="failure 900"):
        runner.decode([7], [1])
    spy.fails = set()
    runner.decode([7], [1])
    assert runner.capturing
    assert spy.graphs == [1, 1, 1]


def test_buffers_that_cannot_be_had_end_capturing(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, expected = captured(spy, 2), plain(spy._session, 2).decode([7], [0])

    def full(*_: Any) -> Any:
        raise RuntimeError("Failed to allocate memory for requested buffer")

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", full)
    with capture_logs() as logs:
        np.testing.assert_array_equal(runner.decode([7], [0]), expected)
    assert [line["event"] for line in logs] == ["cuda_graphs_off"]
    assert spy.graphs == [-1]


ON_HOST = ("total_sequence_length", "logits_from")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_is_copied_within_a_graph_that_is_to_be_captured(tmp_path: Path, case: Case) -> None:
    """By ONNX Runtime's rules for placing nodes, in every family and half precision: with one copy it would refuse. And
    the graph in which that was changed gives the same logits, whatever is read at once."""
    made = ("fp16", "int8-fp16", "int4-fp16")
    try:
        imported = Imported(case, tmp_path, "fp32", *made)
    except UnsupportedModel:  # it overflows in half precision, and is in none of these
        return
    before = set()
    for variant in made:
        file = tmp_path / variant / "model.onnx"
        graph = without_copies(file, case.capacity)
        assert not list(copies(graph or file.read_bytes(), ON_HOST))
        before |= set(copies(file.read_bytes(), ON_HOST))
        assert (graph is not None) == bool(before)
    expected_copies = {"rotation.before <- rotation.length"} if "rotation.length" in _values(file) else set()
    if case.name in LONG:
        expected_copies.add("rotation.global.angles <- rotation.global.chosen")
    assert before == expected_copies
    if not before:
        return
    file, expected = tmp_path / "fp32" / "model.onnx", imported.token_by_token()
    session = open_session(file, CPU, 1, graph=without_copies(file, case.capacity))
    runner = CapturedRunner(session, 3, case.capacity, CPU)
    np.testing.assert_allclose(runner.prefill(2, case.ids[:5], 0), expected[4], atol=1e-4)
    np.testing.assert_allclose(runner.prefill(2, case.ids[5:9], 5), expected[8], atol=1e-4)
    for place in range(9, case.tokens):
        logits = runner.decode([3, 0, case.ids[place]], [place - 9, 0, place])
        np.testing.assert_allclose(logits[2], expected[place], atol=1e-4)


LONG = ("phi3-long-below", "phi3-long-above", "phi4-partial-long")
"""Cases with two rotations to choose from."""


def _values(file: Path) -> set[str]:
    graph = onnx.load(str(file), load_external_data=False).graph
    return {name for node in graph.node for name in node.output}


def test_a_copy_is_found_where_there_is_one() -> None:
    """What tells whether something is copied: a shape that is added to what lies on the device, unless it is a shape
    that is wanted."""
    ints = {name: helper.make_tensor_value_info(name, TensorProto.INT64, ["n"]) for name in ("x", "y")}

    def model(*nodes: Any) -> bytes:
        graph = helper.make_graph(list(nodes), "g", [ints["x"]], [ints["y"]])
        return bytes(helper.make_model(graph).SerializeToString())

    shape = helper.make_node("Shape", ["x"], ["shape"])
    added = model(shape, helper.make_node("Cast", ["x"], ["z"]), helper.make_node("Add", ["z", "shape"], ["y"]))
    assert list(copies(added, ())) == ["y <- shape"]
    assert list(copies(model(shape, helper.make_node("Reshape", ["x", "shape"], ["y"])), ())) == []
    assert list(copies(model(shape, helper.make_node("Add", ["x", "shape"], ["y"])), ())) == ["y <- x"]  # on the host


def positioned(file: Path) -> bytes:
    """The graph, told positions by an input instead of finding them out itself."""
    proto = onnx.load(str(file), load_external_data=False)
    for node in proto.graph.node:
        for at, name in enumerate(node.input):
            if name == "rotation.places":
                node.input[at] = "position_ids"
    proto.graph.input.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "seq"]))
    return bytes(proto.SerializeToString())


def test_positions_are_told_to_graphs_that_ask_for_them(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name.startswith("qwen3"))
    imported = Imported(case, tmp_path)
    expected = imported.token_by_token()
    session = open_session(tmp_path / "fp32" / "model.onnx", CPU, 1, graph=positioned(tmp_path / "fp32" / "model.onnx"))
    runner = CapturedRunner(session, 4, case.capacity, CPU)
    runner.prefill(2, case.ids[:9], 0)
    for place in range(9, case.tokens):
        logits = runner.decode([3, 0, case.ids[place]], [place - 9, 0, place])
        np.testing.assert_allclose(logits[2], expected[place], atol=1e-4)


def test_the_setting_is_off_and_can_be_on() -> None:
    assert not Settings.from_env({}).cuda_graphs
    for text, on in (("1", True), ("on", True), ("0", False), ("no", False)):
        assert Settings.from_env({"CALM_CUDA_GRAPHS": text}).cuda_graphs is on
    with pytest.raises(SettingsInvalid, match="CALM_CUDA_GRAPHS='perhaps'"):
        Settings.from_env({"CALM_CUDA_GRAPHS": "perhaps"})
