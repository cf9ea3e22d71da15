"""One worker for a GPU, against a real nats-server."""

from __future__ import annotations

import pytest

from services.workers import sole
from shared.bus import Bus
from shared.errors import DeviceUnavailable
from shared.messages import Device

GPU = Device(kind="cuda", name="H100", uuid="GPU-8932f937-d72c", provider="CUDAExecutionProvider")


async def test_a_second_worker_on_a_gpu_is_refused_until_the_first_has_left(bus: Bus) -> None:
    """The second names the device and says what to do; a third gets it as soon as the first is gone."""
    first = await sole.claim(bus, GPU, "w1")
    assert first is not None
    with pytest.raises(DeviceUnavailable, match="has H100 \\(GPU-8932f937-d72c\\)") as caught:
        await sole.claim(bus, GPU, "w2", wait_s=0.3)
    assert "CUDA_VISIBLE_DEVICES" in caught.value.remedy
    other = await sole.claim(bus, Device(kind="cuda", name="H100", uuid="MIG-1"), "w3")
    assert other is not None
    await first.stop()
    third = await sole.claim(bus, GPU, "w2")
    assert third is not None
    await third.stop()
    await other.stop()


async def test_workers_share_cpus(bus: Bus) -> None:
    """They take turns at the cores."""
    assert await sole.claim(bus, Device(kind="cpu", name="cpu"), "w1") is None
