"""What a supervisor and its engine processes say to each other: one JSON line a message over the engine's pipes.

The supervisor writes `Start` first and `Drain` later to the engine's standard input, whose end also ends the engine;
the engine writes `Ready`, `State` and `Refused` to its standard output. Not wire messages: they never leave the host.
"""

from __future__ import annotations

from msgspec import Struct

from shared.messages import ArtifactSpec, Device, Failure


class Start(Struct, frozen=True, kw_only=True, tag="start"):
    worker: str
    spec: ArtifactSpec
    device: Device


class Drain(Struct, frozen=True, kw_only=True, tag="drain"):
    """Take no new work, finish what is in hand within `timeout_s`, hand back the rest, and end."""

    timeout_s: float


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


class Refused(Struct, frozen=True, kw_only=True, tag="refused"):
    """The engine could not be made ready."""

    failure: Failure


Command = Start | Drain
Report = Ready | State | Refused
