"""Settings of every process: read from `CALM_*` environment variables once, at start, and frozen."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.errors import SettingsInvalid

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip

PACKED = ".packed"
"""Folder of the model store for weights that are packed for a kind of CPU."""
WORTH_PACKING_BYTES = 8 * 2**20
"""Smaller models are not worth a file."""

_ALSO = {"hub_url": ("HF_ENDPOINT",), "hub_token": ("CALM_HF_TOKEN", "HF_TOKEN")}
"""Variables that are read when a setting's own is not set: what the hub's own tools use."""


def parse_bytes(text: str | int) -> int:
    """`1500 MB`, `1.5GiB` or a plain number, as bytes.

    Raises:
        ValueError: when it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size: write for example 1500 MB or 2 GiB")
    return int(float(match[1]) * unit)


def format_bytes(count: float) -> str:
    """For people: `1.25 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


@dataclass(frozen=True)
class Settings:
    """Everything that the environment can say. Each field's variable is `CALM_` and the field's name."""

    nats_url: str = "nats://127.0.0.1:4222"
    """Comma-separated server URLs; user and password may stand in them."""
    nats_creds: str = ""
    """Path of a NATS credentials file."""
    nats_ca: str = ""
    """Path of the certificate authority (PEM) that signed the broker's certificate; the system's when not set.
    Connections are encrypted where the URL begins with `tls://` or the broker asks for it."""
    nats_cert: str = ""
    """Path of a certificate (PEM) to show to a broker that verifies its clients,"""
    nats_key: str = ""
    """and of its key."""
    nats_inbox: str = "_INBOX"
    """Beginning of this process's reply subjects, for users who may subscribe to those alone: `_INBOX.NAME`."""
    nats_server: str = ""
    """Path of a nats-server program, instead of the packaged one."""
    home: Path = Path("~/.calm")
    """Where models, the knowledge base, JetStream files and logs of a local run live."""
    models_dir: Path = Path()
    """The model store; `<home>/models` when not set."""
    knowledge_url: str = ""
    """SQLAlchemy URL; SQLite at `<home>/knowledge.db` when not set."""
    hub_url: str = "https://huggingface.co"
    """Model hub, or a mirror of one, that `hf:` sources are fetched from; HF_ENDPOINT is understood too."""
    hub_token: str = ""
    """Access token for the hub; CALM_HF_TOKEN and HF_TOKEN are understood too."""
    fleet: str = "embedded"
    """A fleet file, or the name of one in `fleets/`."""
    instance: str = ""
    """Name of this process among its replicas; host name and process id when not set."""
    worker_id: str = ""
    """Name of a worker: a slug; made from host name and process id when not set."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    cuda_visible_devices: str | None = None
    """CUDA_VISIBLE_DEVICES as CUDA itself reads it, with no variable of ours: empty hides all GPUs, None is not set."""
    worker_memory: int = 0
    """Budget of a worker in bytes (`1500 MB` is understood); 0 takes the fleet file's, else 80 % of the device."""
    threads: int = 0
    """Threads an engine may use; 0 means all cores."""
    engine_priority: str = "idle"
    """How CPU engines share cores with the rest: `idle` (they take what is left, so that generating never delays
    routing; Linux), `nice` (lower priority) or `normal`."""
    weights_cache: str = ""
    """Where engines on CPUs keep weights packed for this CPU, which all engines of the host map and share (about twice
    the variant's size on disk); in the model store when not set, or under `<home>/cache/weights` where the store is
    read-only; `off` for none."""
    standby_memory: int = 0
    """Host memory for evicted models that stay loaded, without their KV cache, to be resident again in milliseconds;
    beside the worker's budget. 0 for none."""
    engine_start: str = "fork"
    """`fork`: on Linux, engines on CPUs are forked from one process of the host, which has imported everything, and
    share its memory. `spawn`: each is a process of its own, as elsewhere and on GPUs."""
    spare_engines: int = 1
    """Where engines are spawned: processes kept started but empty, so that a load need not wait for one; some 40 MB
    each."""
    cuda_graphs: bool = False
    """Engines on GPUs decode by CUDA graphs: one launch a step instead of one a kernel. Off until it has been measured
    on a GPU (docs/gpu.md)."""
    power_idle_w: float = 10.0
    """Stated power of an idle host, for energy estimates where nothing can be measured."""
    power_core_w: float = 8.0
    """Stated power of one busy core, likewise."""
    carbon_g_per_kwh: float = 0.0
    """Grams of CO2 per kWh of the electricity used; `calm energy` shows carbon when it is set."""
    max_prompt_bytes: int = 1_000_000
    """Largest message that the intake accepts."""
    http: str = "127.0.0.1:8484"
    """Where the gateway listens: HOST:PORT; port 0 takes a free one."""
    api_keys: str = ""
    """Comma-separated keys, of which clients of the gateway must send one; none are asked for when this and the next
    are empty."""
    api_keys_file: str = ""
    """Path of a file with such keys, one a line."""
    http_origins: str = ""
    """Comma-separated origins whose web pages may call the gateway from browsers (CORS); `*` for any."""
    drain_s: float = 10.0
    """How long a stopping process waits for work in flight before it hands it back."""
    retention_days: float = 30.0
    """Raw rows of the knowledge base are kept this long."""
    log_level: str = "info"

    @property
    def encrypted(self) -> bool:
        """Whether the broker may be spoken to in cipher alone."""
        return "tls://" in self.nats_url

    @property
    def models_path(self) -> Path:
        return self.models_dir if self.models_dir != Path() else self.home / "models"

    @property
    def weights_paths(self) -> tuple[Path, ...]:
        """Where packed weights are looked for, and written to where that is possible, in this order."""
        if self.weights_cache == "off":
            return ()
        if self.weights_cache:
            return (Path(self.weights_cache).expanduser(),)
        return self.models_path / PACKED, self.home / "cache" / "weights"

    @property
    def database_url(self) -> str:
        return self.knowledge_url or f"sqlite+aiosqlite:///{self.home / 'knowledge.db'}"

    @property
    def name(self) -> str:
        return self.instance or f"{slug(socket.gethostname())}-{os.getpid()}"

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the environment.

        Raises:
            SettingsInvalid: names the variable, its value and what is expected.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, object] = {}
        values["cuda_visible_devices"] = environ.get("CUDA_VISIBLE_DEVICES")
        for name, default in cls.defaults().items():
            if name == "cuda_visible_devices":
                continue
            variable = f"CALM_{name.upper()}"
            variable = next((v for v in (variable, *_ALSO.get(name, ())) if environ.get(v)), variable)
            text = environ.get(variable, "")
            if text:
                values[name] = _parse(variable, text, default)
        home = values.get("home", cls.home)
        values["home"] = Path(str(home)).expanduser().absolute()
        return cls(**values)  # type: ignore[arg-type]

    @classmethod
    def defaults(cls) -> dict[str, object]:
        return {name: field.default for name, field in cls.__dataclass_fields__.items()}


def _parse(variable: str, text: str, default: object) -> object:
    try:
        if variable in ("CALM_WORKER_MEMORY", "CALM_MAX_PROMPT_BYTES", "CALM_STANDBY_MEMORY"):
            return parse_bytes(text)
        if isinstance(default, Path):
            return Path(text).expanduser().absolute()
        if isinstance(default, bool):
            return _yes(text)
        if isinstance(default, (int, float)):
            return type(default)(text)
    except ValueError as error:
        raise SettingsInvalid(
            f"{variable}={text!r} cannot be used: {error}.",
            f"Set it to something like {default}, or unset it.",
        ) from None
    return text


def _yes(text: str) -> bool:
    if text.strip().lower() not in ("0", "1", "false", "true", "no", "yes", "off", "on"):
        raise ValueError("it is neither 1 nor 0")
    return text.strip().lower() in ("1", "true", "yes", "on")


def slug(text: str) -> str:
    """A name that NATS subjects, KV keys and durable names all accept."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-") or "x"
