"""What a supervisor and its engine processes say to each other: one JSON line a message over the engine's pipes.

The supervisor writes `Start` first, `Charge` while it runs and `Drain` at last to the engine's standard input, whose
end also ends the engine; the engine writes `Ready`, `State`, `Activity`, `Parked` and `Refused` to its standard output.
An engine that was told to park waits for another `Start` of the same artifact. Not wire messages: they never leave the
host.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from shared.messages import ArtifactSpec, Device, Failure


class Start(Struct, frozen=True, kw_only=True, tag="start"):
    worker: str
    spec: ArtifactSpec
    device: Device
    energy_source: Literal["nvml", "rapl", "model"] = "model"
    power_w: float = 0.0
    """Joules per busy second to reckon with until the first `Charge`."""


class Drain(Struct, frozen=True, kw_only=True, tag="drain"):
    """Take no new work, finish what is in hand within `timeout_s`, hand back the rest, and end."""

    timeout_s: float
    park: bool = False
    """Do not end, but keep the model in memory without its KV cache, as a standby."""


class Charge(Struct, frozen=True, kw_only=True, tag="charge"):
    """The engine's part of the device's energy: `joules` in all, up to the `busy_s`-th second in which it ran steps."""

    joules: float
    busy_s: float


class Ready(Struct, frozen=True, kw_only=True, tag="ready"):
    load_s: float
    provider: str
    measured_bytes: int


class State(Struct, frozen=True, kw_only=True, tag="state"):
    active: int
    held: int
    tokens_out: int
    tpot_s: float
    last_used_at: float
    measured_bytes: int


class Activity(Struct, frozen=True, kw_only=True, tag="activity"):
    """What the engine has done so far: seconds in which it ran steps, and the tokens of the answers it finished."""

    busy_s: float = 0.0
    tokens_in: int = 0
    tokens_out: int = 0


class Parked(Struct, frozen=True, kw_only=True, tag="parked"):
    """The engine is a standby now, and holds `measured_bytes`."""

    measured_bytes: int


class Refused(Struct, frozen=True, kw_only=True, tag="refused"):
    """The engine could not be made ready."""

    failure: Failure


Command = Start | Drain | Charge
Report = Ready | State | Activity | Parked | Refused
