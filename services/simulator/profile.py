"""Hardware profiles (`profiles/*.toml`): what a model of a given size costs on a device, as fitted or as measured.

Two kinds: *fitted* gives time and energy as functions of parameters and batch size, fitted to published measurements
(`python -m bench.profiles fit CSV`); *measured* lists artifacts one by one, as a running system learned them
(`python -m bench.profiles measure`).
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from shared.errors import DataInvalid

PROFILES = Path(__file__).parents[2] / "profiles"


class Fit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Coefficients; P is billions of parameters per GPU, P_all those of all GPUs, g the GPUs, b the batch size."""

    step_ms: list[float]
    """c0 + c1 P + (c2 + c3 P) b: milliseconds of a decode step."""
    token_j: list[float]
    """(d0 P_all + d2 g) / b + d1 P_all + d3: joules of an output token, prefill included."""
    anchors: list[tuple[float, float]] = []
    """(billions of parameters, joules of an output token) as measured at `anchor_sequences`."""
    anchor_sequences: int = 32


class MeasuredArtifact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Unit costs of one artifact alone on the device, in seconds and joules."""

    prefill_s: float
    tpot_s: float
    slope: float
    load_s: float
    prefill_j: float
    decode_j: float
    load_j: float
    beside: float = 1.0
    """A prompt token takes this many times as long while other sequences or engines run: prompts are read in
    small pieces then."""


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    description: str = ""
    shared: bool = True
    """Engines on one device divide its time."""
    fit: Fit | None = None
    prefill_s_per_b: float = 0.0
    """Seconds a prompt token takes for each billion of parameters on one GPU."""
    load_base_s: float = 1.0
    load_gb_per_s: float = 1.0
    load_w: float = 100.0
    """Power drawn by one GPU while it loads."""
    artifacts: dict[str, MeasuredArtifact] = {}
    overhead_s: float = 0.0
    """What a query takes beyond waiting, loading, reading and writing: the way through the services."""
    turns: bool = False
    """The device is a host's cores: engines take turns at it step by step, and who loads computes there too. Without it
    engines divide the device evenly, and a load takes nothing of it."""
    turn_cost: float = 1.0
    """Where engines take turns: what they take together, relative to the sum of their own steps."""
    load_beside: float = 0.0
    """There too: a load takes this much longer, as a share of its time alone, for each engine at work."""


@dataclass(frozen=True)
class UnitCosts:
    """Of one model on one worker: `tpot_s` and `decode_j` at batch size 1; see `step_s` and `token_j` for others."""

    prefill_s: float
    tpot_s: float
    slope: float
    load_s: float
    prefill_j: float
    decode_j: float
    load_j: float
    token_j: tuple[float, float] = (0.0, 0.0)
    """Joules of an output token at batch b: token_j[0] / b + token_j[1]."""
    beside: float = 1.0
    """Growth of `prefill_s` while other sequences or engines run."""

    def step_s(self, batch: float) -> float:
        """Seconds of a decode step at this batch size."""
        return self.tpot_s * (1.0 + self.slope * (batch - 1.0))


@dataclass(frozen=True)
class Profile:
    """A device class."""

    name: str
    description: str
    shared: bool
    overhead_s: float
    turns: bool
    turn_cost: float
    load_beside: float
    _file: _File = field(repr=False)

    def costs(
        self, model: str, *, parameters_b: float, active_b: float, memory_bytes: int, gpus: int, sequences: int
    ) -> UnitCosts:
        """Unit costs of a model.

        Args:
            model: its name, for measured profiles.
            parameters_b, active_b: billions of parameters, all and those used for one token.
            memory_bytes: what is read from disk to load it.
            gpus: GPUs of the worker; the model is split over them.
            sequences: if not 0, the energy of an output token is taken at this many concurrent sequences, whatever
                the simulated concurrency (the figure that publications state); 0 follows the simulation.

        Raises:
            DataInvalid: the profile is a measured one and does not have this model.
        """
        file = self._file
        if file.fit is None:
            if model not in file.artifacts:
                raise DataInvalid(
                    f"The profile {self.name} has no figures for {model!r}.",
                    f"Measure it, or use one of: {', '.join(sorted(file.artifacts))}.",
                )
            a = file.artifacts[model]
            return UnitCosts(
                a.prefill_s, a.tpot_s, a.slope, a.load_s, a.prefill_j, a.decode_j, a.load_j, (0.0, a.decode_j),
                a.beside,
            )  # fmt: skip
        c0, c1, c2, c3 = file.fit.step_ms
        read = _read_b(parameters_b, active_b, 8) / gpus
        alone = (c0 + c1 * read + c2 + c3 * active_b / gpus) / 1e3
        load = file.load_base_s + memory_bytes / 1e9 / (file.load_gb_per_s * gpus)
        d0, d1, d2, d3 = file.fit.token_j
        if sequences:
            token = (0.0, self.token_j_at_anchor(active_b))
        else:
            token = (d0 * active_b + d2 * gpus, d1 * active_b + d3)
        return UnitCosts(
            prefill_s=file.prefill_s_per_b * active_b / gpus,
            tpot_s=alone,
            slope=(c2 + c3 * active_b / gpus) / 1e3 / alone,
            load_s=load,
            prefill_j=0.0,
            decode_j=token[0] / 8 + token[1],
            load_j=load * file.load_w * gpus,
            token_j=token,
        )

    def paced(self, factor: float) -> Profile:
        """The same device while all it computes takes `factor` times as long. For measured profiles."""
        artifacts = {
            name: msgspec.structs.replace(
                a, prefill_s=a.prefill_s * factor, tpot_s=a.tpot_s * factor, load_s=a.load_s * factor
            )
            for name, a in self._file.artifacts.items()
        }
        return replace(self, _file=msgspec.structs.replace(self._file, artifacts=artifacts))

    def token_j_at_anchor(self, active_b: float) -> float:
        """Joules of an output token at `anchor_sequences`: in proportion to (active) parameters, from the measured
        size that is nearest on a logarithmic scale."""
        assert self._file.fit is not None
        size, joules = min(self._file.fit.anchors, key=lambda a: abs(math.log(a[0] / active_b)))
        return joules * active_b / size


def load_profile(name_or_path: str | Path) -> Profile:
    """Read a profile, given by path or by the name of one in `profiles/`.

    Raises:
        DataInvalid: there is no such file, or it cannot be used.
    """
    path = Path(name_or_path)
    if not path.suffix:
        path = PROFILES / f"{name_or_path}.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.toml")))
        raise DataInvalid("There is no such profile.", f"Name a file, or one of: {known}.", path=str(path)) from None
    return parse_profile(text, str(path))


def parse_profile(text: str, path: str = "") -> Profile:
    """A profile from its text; `path` is for the message.

    Raises:
        DataInvalid: it cannot be used.
    """
    try:
        file = msgspec.convert(tomllib.loads(text), _File)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise DataInvalid(f"This is no profile: {error}.", "See profiles/h100.toml.", path=path) from None
    return Profile(
        file.name, file.description, file.shared, file.overhead_s, file.turns, file.turn_cost, file.load_beside, file
    )


def _read_b(parameters_b: float, active_b: float, batch: float) -> float:
    """Billions of parameters read in a step: with a mixture of experts, those that any sequence of the batch uses."""
    idle = max(1.0 - active_b / parameters_b, 0.0)
    return parameters_b * (1.0 - idle**batch) if idle else parameters_b
