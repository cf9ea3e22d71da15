"""The supervisor's energy ledger: one meter per device, whoever runs on it; NVML against a stand-in of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.workers.energy_keeper import EnergyKeeper, Running
from services.workers.engine.energy import AttributedMeter, ModelMeter, NvmlMeter, choose_meter
from services.workers.engine.gate import Open
from services.workers.protocol import Activity, Charge, Command
from shared.messages import Device
from shared.settings import Settings

GPU = Device(kind="cuda", name="GPU", index=0, threads=1)
CPU = Device(kind="cpu", name="cpu", threads=2)


@dataclass
class FakeNvml:
    """The calls of pynvml that are used. Energy in millijoules, as NVML has it."""

    millijoules: int = 0
    counts: bool = True
    asked: list[Any] = field(default_factory=list)

    def nvmlInit(self) -> None:  # noqa: N802 NVML's names
        self.asked.append("init")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        self.asked.append(index)
        return f"handle-{index}"

    NVMLError = RuntimeError

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 8

    def nvmlDeviceGetMigMode(self, _handle: str) -> list[int]:  # noqa: N802
        raise RuntimeError("Not Supported")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, _handle: str) -> int:  # noqa: N802
        if not self.counts:
            raise RuntimeError("Not Supported")
        return self.millijoules


class FakeEngine:
    """An engine process that reports what the test says, and remembers what it is told."""

    def __init__(self, pid: int = 1) -> None:
        self.activity = Activity()
        self.pid = pid
        self.told: list[Command] = []

    def works(self, busy_s: float) -> None:
        self.activity = Activity(busy_s=self.activity.busy_s + busy_s)

    async def tell(self, command: Command) -> None:
        self.told.append(command)


class Bench:
    """A keeper whose time, meter and processes are the test's."""

    def __init__(self, device: Device = GPU, source: str = "nvml") -> None:
        self.nvml = FakeNvml()
        self.now = 0.0
        self.cores: dict[int, float] = {}
        self.host_s = 0.0
        self.running: list[Running] = []
        meter: Any = None
        if source == "nvml":
            meter = NvmlMeter(0, self.nvml)
        elif source == "rapl":
            meter = NvmlMeter(0, self.nvml)
            meter.source = "rapl"
        self.keeper = EnergyKeeper(
            None, Settings(power_idle_w=10.0, power_core_w=8.0), "w1", device, lambda: self.running, meter=meter,
            clock=lambda: 1000.0 + self.now, ticker=lambda: self.now, core_s=self.cores.get,
            host_core_s=lambda: self.host_s,
        )  # fmt: skip

    def passes(self, seconds: float, joules: float = 0.0) -> Any:
        self.now += seconds
        self.nvml.millijoules += round(joules * 1000)
        return self.keeper.tick()


def test_engines_that_share_a_gpu_share_its_counter() -> None:
    """Two engines at work: the counter's joules are divided between them, and counted once."""
    bench, a, b = Bench(), FakeEngine(1), FakeEngine(2)
    bench.passes(1.0, 50.0)
    bench.running = [Running("a", a, False), Running("b", b, False)]
    a.works(0.3)
    b.works(0.1)
    shares = bench.passes(0.5, 100.0)
    assert shares.idle_j == pytest.approx(5.0)  # 0.1 s in which neither ran, at the 50 W seen before
    assert shares.active == pytest.approx({"a": 71.25, "b": 23.75})
    report = bench.keeper.report()
    assert report.source == "nvml"
    assert report.total_j == pytest.approx(150.0)
    assert sum(x.active_j + x.load_j for x in report.accounts) + report.idle_j == pytest.approx(report.total_j)
    assert [x.loads for x in report.accounts] == [1, 1]


async def test_a_report_says_up_to_when_it_is_complete() -> None:
    """Engines tell what they did a little later: the last half second may be missing, except at the end."""
    bench = Bench()
    bench.passes(2.0, 10.0)
    bench.now += 1.0  # a report sent later has no more in it
    assert bench.keeper.report().at == pytest.approx(1001.5)
    await bench.keeper.stop()
    assert bench.keeper.report().at == pytest.approx(1003.0)


def test_a_load_is_an_account_of_its_own() -> None:
    """What a model costs while it is being loaded is not charged to queries."""
    bench, a = Bench(), FakeEngine()
    bench.running = [Running("a", a, True)]
    bench.passes(2.0, 120.0)
    account = bench.keeper.report().accounts[0]
    assert (account.load_j, account.active_j, account.loads) == (pytest.approx(120.0), 0.0, 1)


async def test_an_engine_is_told_its_part() -> None:
    """The charge is what was attributed so far, and the busy seconds up to which."""
    bench, a = Bench(), FakeEngine()
    bench.running = [Running("a", a, False)]
    a.works(0.5)
    bench.passes(0.5, 40.0)
    await bench.keeper._charge()
    await bench.keeper._charge()
    assert a.told == [Charge(joules=40.0, busy_s=0.5)]


@pytest.mark.parametrize("anew", [True, False])
async def test_a_process_may_load_more_than_once(anew: bool) -> None:
    """One that was parked and serves again is charged from where its own meter is, be it a new one or not."""
    bench, a = Bench(), FakeEngine()
    bench.running = [Running("a", a, False)]
    a.works(0.5)
    bench.passes(0.5, 40.0)
    bench.running = [Running("a", a, True)]
    bench.passes(0.5, 20.0)
    a.activity = Activity(busy_s=0.1 if anew else 0.6)
    bench.running = [Running("a", a, False)]
    bench.passes(0.1, 7.0)
    await bench.keeper._charge()
    assert a.told == [Charge(joules=7.0, busy_s=0.1) if anew else Charge(joules=47.0, busy_s=0.6)]
    account = bench.keeper.report().accounts[0]
    assert (account.active_j, account.load_j, account.loads) == (47.0, 20.0, 2)
    assert account.busy_s == pytest.approx(0.6)


def test_estimates_follow_core_seconds_and_say_that_they_are_estimates() -> None:
    """Without a counter: 8 W for each core second of an engine, 10 W for the host, all of it marked."""
    bench, a, b = Bench(CPU, "model"), FakeEngine(1), FakeEngine(2)
    bench.running = [Running("a", a, False), Running("b", b, False)]
    bench.cores.update({1: 1.5, 2: 0.5})
    a.works(1.0)
    b.works(1.0)
    shares = bench.passes(1.0)
    assert bench.keeper.source == "model"
    assert shares.active["a"] == pytest.approx(3 * shares.active["b"])
    assert shares.idle_j == 0.0


def test_rapl_counts_the_whole_host_and_charges_its_others() -> None:
    """Half of the host's core seconds were other processes': half of the joules are theirs."""
    bench, a = Bench(CPU, "rapl"), FakeEngine(1)
    bench.running = [Running("a", a, False)]
    bench.cores.update({1: 1.0})
    bench.host_s = 2.0 + 1.0
    a.works(1.0)
    shares = bench.passes(1.0, 90.0)
    assert shares.other_j == pytest.approx(2 * shares.active["a"], rel=0.05)
    bench.running = []
    assert bench.passes(1.0, 20.0).idle_j == pytest.approx(20.0)
    bench.host_s += 0.05  # a host that does next to nothing is idle all the same
    assert bench.passes(1.0, 20.0).idle_j == pytest.approx(19.0, rel=0.02)


@given(
    st.lists(
        st.tuples(st.floats(0.01, 2.0), st.floats(0, 500), st.lists(st.floats(0, 2.0), min_size=3, max_size=3)),
        max_size=20,
    )
)
def test_the_accounts_add_up_to_the_counter(steps: list[tuple[float, float, list[float]]]) -> None:
    """Engines come to work, load and leave: the ledger is the meter's total, to one part in 10^9."""
    bench = Bench()
    engines = [FakeEngine(i) for i in range(3)]
    for index, (seconds, joules, work) in enumerate(steps):
        bench.running = [Running(f"m{i}", e, i == index % 4) for i, e in enumerate(engines) if (index + i) % 5]
        for engine, busy_s in zip(engines, work, strict=True):
            engine.works(busy_s)
        bench.passes(seconds, joules)
    ledger = bench.keeper.ledger
    assert abs(ledger.residual_j) <= 1e-9 * max(ledger.total_j, 1.0)
    assert ledger.total_j == pytest.approx(bench.nvml.millijoules / 1000)


def test_the_counter_s_device_is_the_one_that_cuda_means() -> None:
    """CUDA_VISIBLE_DEVICES is translated, by number and UUID; a device without a counter is estimated."""
    nvml = FakeNvml(millijoules=2500)
    assert NvmlMeter(1, nvml, "2,3").read_j() == 2.5
    assert NvmlMeter(0, nvml, "MIG-abc").read_j() == 2.5
    assert NvmlMeter(1, nvml).read_j() == 2.5
    assert [a for a in nvml.asked if a != "init"] == [2, 3, "MIG-abc", 1]
    assert isinstance(choose_meter(GPU, 1.0, 1.0, nvml=FakeNvml(counts=False)), ModelMeter)
    assert isinstance(choose_meter(GPU, 1.0, 1.0, nvml=nvml, visible="7"), NvmlMeter)


def test_an_engine_s_meter_runs_only_while_it_computes() -> None:
    """Between steps, and waiting for a turn, it stands still; a settlement moves it towards the supervisor's figure."""
    now = 0.0

    class Waiting(Open):
        def __enter__(self) -> Open:
            nonlocal now
            now += 3.0  # for its turn
            return self

    meter = AttributedMeter("nvml", 100.0, clock=lambda: now)
    with meter.gated(Waiting()):
        now += 1.0
        assert meter.read_j() == 100.0
    now = 15.0
    assert meter.read_j() == 100.0
    assert meter.busy_s == 1.0
    meter.settle(50.0, 1.0)
    assert meter.read_j() == 100.0
    with meter.gated(Open()):
        now += 2.0
    assert 100.0 <= meter.read_j() < 200.0
