"""The worker's pure parts: memory ledger, timings, device probe."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.workers import device, timings
from services.workers.ledger import Ledger
from shared.errors import DeviceUnavailable, NoMemory
from shared.settings import Settings


def test_the_ledger_never_promises_more_than_the_budget() -> None:
    """A reservation beyond the free bytes is refused with the numbers; released bytes can be promised again."""
    ledger = Ledger(100)
    ledger.reserve("a", 60)
    with pytest.raises(NoMemory, match="60 B, and 40 B of 100 B are free"):
        ledger.reserve("b", 60)
    assert ledger.release("a") == 60
    ledger.reserve("b", 60)
    assert ledger.release("unknown") == 0
    assert ledger.used_bytes == 60


def _split(**times: float) -> dict[str, float]:
    stamps = {"received": 0.0, "dispatched": times["dispatched"], "pulled": times["pulled"]}
    parts = timings.split(
        stamps, engine_ready_at=times["ready"], slot_open_at=times["open"], admitted_at=times["admitted"],
        first_token_at=times["first"], ended_at=times["end"],
    )  # fmt: skip
    return {"load": parts.load_s, "queue": parts.queue_s, "overhead": parts.overhead_s, "total": parts.total_s}


def test_an_idle_resident_model_leaves_only_overhead() -> None:
    """Nothing was loaded or waited for: what is neither prefill nor decode is overhead."""
    parts = _split(dispatched=0.01, ready=-50, open=-20, pulled=0.02, admitted=0.02, first=0.5, end=1.0)
    assert (parts["load"], parts["queue"]) == (0.0, 0.0)
    assert abs(parts["overhead"] - 0.02) < 1e-9


def test_loading_and_waiting_are_told_apart() -> None:
    """Until the engine was ready it is load; until a slot opened, and until reading began, it is queue."""
    parts = _split(dispatched=1.0, ready=3.0, open=4.0, pulled=4.1, admitted=4.5, first=5.0, end=6.0)
    assert abs(parts["load"] - 2.0) < 1e-9
    assert abs(parts["queue"] - 1.4) < 1e-9
    assert abs(parts["overhead"] - 1.1) < 1e-9


def test_time_of_earlier_attempts_stands_by_itself() -> None:
    """From the first dispatch to the last it is neither overhead nor anything of the attempt that answered."""
    stamps = {"received": 0.0, "first_dispatched": 0.5, "dispatched": 3.0, "pulled": 3.1}
    parts = timings.split(
        stamps, engine_ready_at=0.0, slot_open_at=0.0, admitted_at=3.1, first_token_at=4.0, ended_at=5.0
    )
    assert parts.retried_s == pytest.approx(2.5)
    assert parts.overhead_s == pytest.approx(0.6)
    assert parts.total_s == 5.0


times = st.lists(st.floats(0, 100), min_size=7, max_size=7)


@given(times)
def test_parts_are_never_negative_and_never_exceed_the_whole(values: list[float]) -> None:
    """For any order of events that can happen, the parts add up to no more than the total."""
    dispatched, pulled, admitted, first, end = sorted(values[:5])
    parts = _split(
        dispatched=dispatched, pulled=pulled, admitted=admitted, first=first, end=end,
        ready=min(values[5], pulled), open=min(values[6], pulled),
    )  # fmt: skip
    assert all(v >= 0 for v in parts.values())
    assert parts["load"] + parts["queue"] + parts["overhead"] <= parts["total"] + 1e-6


def test_cuda_asked_for_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker told to use CUDA does not silently take the CPU; `auto` does, and says which it took."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(DeviceUnavailable, match="no CUDA provider"):
        device.probe(Settings(device="cuda:0"))
    with pytest.raises(DeviceUnavailable, match="not a device"):
        device.probe(Settings(device="tpu"))
    found = device.probe(Settings(device="auto", threads=3))
    assert (found.kind, found.threads, found.device_class) == ("cpu", 3, "cpu-3t")
