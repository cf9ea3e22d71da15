"""Admission by KV memory: many short sequences share the bytes of few long ones, and never hold more."""

from __future__ import annotations

import mmap
import struct
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.workers.engine.batcher import Batcher, Finished, Request
from services.workers.engine.cache import HostCache
from services.workers.engine.energy import ModelMeter
from services.workers.engine.loader import Opened, open_model, start
from services.workers.engine.schedule import Schedule
from shared.messages import ArtifactSpec, Device, Sampling
from shared.models.manifest import Manifest
from tests.tiny import tiny_fp32

CPU = Device(kind="cpu", name="cpu", threads=1)
GPU = Device(kind="cuda", name="gpu", provider="CUDAExecutionProvider")
CONTEXT, SLOTS, SEQUENCES = 256, 2, 9


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp("model")
    manifest = tiny_fp32(folder, CONTEXT)
    return open_model(folder, manifest, spec_of(manifest), CPU)


def spec_of(manifest: Manifest, sequences: int = SEQUENCES) -> ArtifactSpec:
    variant = manifest.variant("fp32")
    assert variant is not None
    return manifest.artifact(variant, slots=SLOTS, context=CONTEXT, overhead_bytes=0, sequences=sequences)


def engine(opened: Opened, sequences: int = SEQUENCES) -> tuple[Batcher, Schedule]:
    spec = msgspec.structs.replace(opened.spec, sequences=sequences)
    batcher = start(replace(opened, spec=spec), ModelMeter(1, 1, 1))
    return batcher, batcher._schedule


def run(batcher: Batcher, requests: list[Request]) -> tuple[dict[str, tuple[int, ...]], int, int]:
    """Tokens by request, the most sequences at once, and the most KV tokens held at once."""
    schedule = batcher._schedule
    for request in requests:
        batcher.add(request)
    ended: dict[str, tuple[int, ...]] = {}
    together = held = 0
    while batcher.active:
        ended |= {e.id: e.tokens for e in batcher.step() if isinstance(e, Finished)}
        together = max(together, sum(row.owner is not None for row in schedule.rows))
        held = max(held, schedule.held_tokens)
    return ended, together, held


def request(name: str, prompt: list[int], tokens: int) -> Request:
    return Request(name, [], Sampling(max_tokens=tokens), prompt=prompt)


def test_many_short_and_a_long_one_share_the_bytes_of_the_slots(opened: Opened) -> None:
    """Short ones run more at a time than there are slots, the long one waits for memory, none overruns it, and every
    token is that of a solo run."""
    batcher, schedule = engine(opened)
    assert schedule.slots == SEQUENCES
    short = [request(f"s{i}", [20 + i, 30, 40 + i], 12) for i in range(12)]
    long = request("long", [5 + i % 200 for i in range(200)], CONTEXT)
    ended, together, held = run(batcher, [*short[:6], long, *short[6:]])
    assert together > SLOTS
    assert held <= opened.spec.kv_tokens
    assert set(ended) == {r.id for r in [*short, long]}
    for one in [*short, long]:
        solo, _, _ = run(engine(opened, sequences=0)[0], [one])
        assert ended[one.id] == solo[one.id]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 150), st.integers(1, 60)), min_size=1, max_size=14))
def test_no_mix_of_lengths_overruns_the_budget(opened: Opened, sizes: list[tuple[int, int]]) -> None:
    """Whatever comes together: everybody is answered, and no more tokens are held than were counted."""
    batcher, _ = engine(opened)
    requests = [request(f"r{i}", [10 + (i * 7 + j) % 200 for j in range(a)], b) for i, (a, b) in enumerate(sizes)]
    ended, together, held = run(batcher, requests)
    assert set(ended) == {r.id for r in requests}
    assert together <= SEQUENCES
    assert held <= opened.spec.kv_tokens


def test_who_waits_for_memory_is_known(opened: Opened) -> None:
    """An engine that is short of memory says so, and takes on no more, until somebody has ended."""
    batcher, _ = engine(opened)
    for name in ("a", "b", "c"):
        batcher.add(request(name, [7, 8, 9], CONTEXT))
    batcher.step()
    assert batcher.short_of_memory
    while batcher.active > 1:
        batcher.step()
    batcher.step()
    assert not batcher.short_of_memory


def test_planner_and_engine_count_the_same_bytes(opened: Opened) -> None:
    """The footprint's KV bytes are the engine's tokens times what the graph's cache takes for one, measured on it."""
    spec = opened.spec
    cache = [i for i in opened.session.get_inputs() if i.name.startswith("past")]
    per_token = sum(int(i.shape[1]) * int(i.shape[3]) * 4 for i in cache)
    assert spec.kv_bytes == spec.kv_tokens * per_token
    assert spec.footprint_bytes == spec.weights_bytes + spec.kv_bytes
    assert engine(opened)[1]._capacity == spec.kv_tokens


def test_a_gpu_takes_a_sequence_a_slot(opened: Opened) -> None:
    """Rows on a device are allocated whole: more of them than slots would be bytes that nobody counted."""
    assert (opened.spec.at_once(CPU), opened.spec.at_once(GPU)) == (SEQUENCES, SLOTS)
    assert msgspec.structs.replace(opened.spec, sequences=0).at_once(CPU) == SLOTS


def _committed_tokens(batcher: Batcher) -> int:
    """Tokens that the KV cache's resident pages hold, as the kernel counts them."""
    cache = batcher._runner.cache  # type: ignore[attr-defined]
    assert isinstance(cache, HostCache)
    pages = 0
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        for array in cache._arrays.values():
            first, count = int(array.ctypes.data) // mmap.PAGESIZE, array.nbytes // mmap.PAGESIZE
            pagemap.seek(8 * first)
            pages += sum(entry >> 63 for entry in struct.unpack(f"{count}Q", pagemap.read(8 * count)))
    heads = sum(array.shape[1] for array in cache._arrays.values())
    return int(pages * cache.granule // heads)


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="asks Linux")
def test_the_kernel_has_committed_no_more_than_was_counted(opened: Opened) -> None:
    """Resident pages of all rows together stay within the slots' bytes while short and long sequences come and go."""
    batcher, schedule = engine(opened)
    for number in range(24):
        long = number % 6 == 3
        prompt = [10 + (7 * number + i) % 200 for i in range(180 if long else 5 + 3 * number)]
        batcher.add(request(f"r{number}", prompt, 30 if long else 4 + number % 9))
    most = 0
    while batcher.active:
        batcher.step()
        committed = _committed_tokens(batcher)
        assert committed <= opened.spec.kv_tokens
        assert committed <= schedule.held_tokens or batcher._moves  # what an end left to release, the next step does
        most = max(most, committed)
    assert opened.spec.kv_tokens / 2 < most <= opened.spec.kv_tokens
