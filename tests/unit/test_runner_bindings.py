"""What a graph reads when it runs: arrays are bound by their addresses, and must still be there."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from services.workers.engine.runner import SharedKvRunner
from shared.messages import Device

CPU = Device(kind="cpu", name="cpu")
STEP = ("input_ids", "attention_mask", "position_ids")


class Session:
    """Stands in for a session with inputs of an exporter's; a run reads what lies at the addresses bound."""

    def __init__(self, steps: tuple[str, ...]) -> None:
        self._steps = steps
        self.read: dict[str, list[int]] = {}

    def get_inputs(self) -> list[Any]:
        made = [SimpleNamespace(name=name, type="tensor(int64)", shape=["b", "s"]) for name in self._steps]
        past = [SimpleNamespace(name=f"past.{side}", type="tensor(float)", shape=["b", 1, "n", 2]) for side in "kv"]
        return [*made, *past]

    def get_outputs(self) -> list[Any]:
        logits = SimpleNamespace(name="logits", type="tensor(float)", shape=["b", "s", 8])
        return [logits, *(SimpleNamespace(name=f"present.{side}", type="tensor(float)", shape=[]) for side in "kv")]

    def get_overridable_initializers(self) -> list[Any]:
        return []

    def io_binding(self) -> Session:
        self.bound: dict[str, tuple[Any, list[int], int]] = {}
        return self

    def bind_input(self, name: str, _device: str, _index: int, dtype: Any, shape: list[int], pointer: int) -> None:
        self.bound[name] = (dtype, shape, pointer)

    def bind_output(self, *_: Any) -> None: ...

    def run_with_iobinding(self, binding: Session) -> None:
        junk = [np.full(size, -1, np.int64) for size in range(1, 32) for _ in range(8)]  # takes freed memory
        for name in self._steps:
            dtype, shape, pointer = binding.bound[name]
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            self.read[name] = np.frombuffer(ctypes.string_at(pointer, size), dtype).tolist()
        assert junk


@pytest.mark.parametrize("steps", [STEP, STEP[:2], ("input_ids", "seqlens_k", "position_ids")])
def test_what_a_step_is_given_is_there_when_it_runs(steps: tuple[str, ...]) -> None:
    session: Any = Session(steps)
    runner = SharedKvRunner(session, 2, 16, CPU)
    runner.prefill(0, [3, 4, 5], 0)
    assert session.read["input_ids"] == [3, 4, 5]
    for _ in range(3):
        runner.decode([6, 7], [3, 1])
        assert session.read["input_ids"] == [6, 7]
        if "attention_mask" in steps:
            assert session.read["attention_mask"] == [1, 1, 1, 1, 1, 1, 0, 0]
        else:
            assert session.read["seqlens_k"] == [3, 1]
        if "position_ids" in steps:
            assert session.read["position_ids"] == [3, 1]
