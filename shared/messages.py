"""The catalogue of wire messages: every type that crosses NATS, and no other, is defined here.

Each message is a frozen msgspec Struct whose `type` field carries name and version (`query.v1`). Public
messages travel as JSON (or MessagePack, when the sender says so in the `Content-Type` header), internal ones
as MessagePack. Times are Unix seconds, durations seconds (`_s`), energy joules (`_j`), sizes bytes (`_bytes`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

Slug = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,127}$")]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Meta(ge=0.0)]
Positive = Annotated[float, Meta(gt=0.0)]


class _Public(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of what users write and read: an unknown field is an error, so that a typo is noticed."""


class _Internal(Struct, frozen=True, omit_defaults=True):
    """Base of what services write: unknown fields are ignored, so that versions can be mixed."""


# --- Public: what clients send ------------------------------------------------------------------


class ChatMessage(_Public, frozen=True, kw_only=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Constraints(_Public, frozen=True, kw_only=True):
    """Hard limits: a model that breaks one is not a candidate. `None` means no limit."""

    models: list[Slug] | None = None
    """Only these cards may answer."""
    exclude: list[Slug] = []
    tags: list[str] = []
    """The card must carry every one of these tags."""
    min_quality: Share | None = None
    """Lowest predicted quality, 0 to 1."""
    max_latency_s: Positive | None = None
    """Highest predicted time to the full answer."""
    max_energy_j: Positive | None = None
    """Highest predicted energy for this answer."""


class Preference(_Public, frozen=True, kw_only=True):
    """Weights of this request's utility; each replaces the fleet's own where it is given."""

    quality: NonNegative | None = None
    latency: NonNegative | None = None
    energy: NonNegative | None = None


class ExpectChoice(_Public, frozen=True, kw_only=True, tag_field="kind", tag="choice"):
    """The answer must name one of these, as in "The answer is (C)" or "Yes, because ..."."""

    of: Annotated[list[Annotated[str, Meta(min_length=1, max_length=100)]], Meta(min_length=2, max_length=64)]
    """A single letter or digit is found as it is written, and only where it is marked as a choice; longer ones are
    found in upper and lower case alike."""


class ExpectNumber(_Public, frozen=True, kw_only=True, tag_field="kind", tag="number"):
    """The answer must give a number: the one announced ("the answer is 42", "#### 42"), else the last one."""


class ExpectJson(_Public, frozen=True, kw_only=True, tag_field="kind", tag="json"):
    """The answer must be, or hold, one JSON object or array."""

    keys: Annotated[list[Annotated[str, Meta(max_length=100)]], Meta(max_length=64)] = []
    """It must then be an object that has every one of these keys."""


class ExpectContains(_Public, frozen=True, kw_only=True, tag_field="kind", tag="contains"):
    """The answer must contain one of these pieces of text, in upper or lower case."""

    any_of: Annotated[list[Annotated[str, Meta(min_length=1, max_length=200)]], Meta(min_length=1, max_length=64)]


Expect = ExpectChoice | ExpectNumber | ExpectJson | ExpectContains
"""What an answer must look like to be of use."""


class Query(_Public, frozen=True, kw_only=True, tag="query.v1"):
    """A question to the fleet, published to `calm.query`. Exactly one of `prompt` and `messages` is needed."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    id: Slug | None = None
    """Chosen by the client for idempotent resubmission and `calm.cancel.<id>`; made up when absent."""
    stream: bool = False
    model: Slug | None = None
    """Ask for one card by name and leave routing out."""
    max_tokens: Annotated[int, Meta(ge=1, le=131072)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=5.0)] | None = None
    """0 means greedy."""
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    stop: Annotated[list[str], Meta(max_length=16)] = []
    """Generation ends before the first of these strings."""
    priority: Literal["hi", "lo"] = "hi"
    deadline_s: Annotated[float, Meta(gt=0.0, le=86400.0)] = 120.0
    """Counted from acceptance: then the query ends as `deadline_expired`."""
    constraints: Constraints = Constraints()
    preference: Preference = Preference()
    expect: Expect | None = None
    """What an answer must look like: it is then read, and what was read comes with it (`reading`). The card's own when
    left out."""
    retries: Annotated[int, Meta(ge=0, le=8)] | None = None
    """So many further models of the route are asked, one after the other, while nothing can be read and there is time;
    the fleet's own number (0 unless its file says otherwise) when left out."""
    cascade: bool | None = None
    """Whether an answer that is likely wrong, by the model's own confidence, is handed on to another model where that
    is worth its time and energy; as the fleet's file says (`false` unless it does) when left out."""
    metadata: dict[str, str] = {}
    """Kept with the query in the knowledge base."""


class Feedback(_Public, frozen=True, kw_only=True, tag="feedback.v1"):
    """A user's judgement of an answer, sent to `calm.feedback`."""

    query_id: Slug
    score: Share
    label: Annotated[str, Meta(max_length=200)] | None = None


class Objectives(_Public, frozen=True, kw_only=True):
    """What the fleet is to hold, averaged over its queries. `None` means that there is no such objective."""

    latency_p95_s: Positive | None = None
    """95 % of queries take no longer than this, from acceptance to the last token."""
    energy_j_per_query: Positive | None = None
    """Mean energy of a query."""
    energy_j_per_hour: Positive | None = None
    """Energy of all queries of an hour."""
    min_quality_ratio: Annotated[float, Meta(gt=0.0, le=2.0)] | None = None
    """Mean predicted quality, as a share of what the card `reference` would have given."""
    reference: Slug | None = None
    """The card that `min_quality_ratio` is relative to."""
    w_quality: NonNegative | None = None
    """Weight of quality in place of the fleet's own."""
    w_latency: NonNegative | None = None
    """Weight of latency in place of the fleet's own; where a latency objective holds, the controller moves it."""
    w_energy: NonNegative | None = None
    """Weight of energy in place of the fleet's own; where an energy objective holds, the controller moves it."""


class Control(_Public, frozen=True, kw_only=True, tag="control.v1"):
    """Argument of `calm.control`: show, change or withdraw the fleet's objectives while it runs."""

    action: Literal["show", "set", "reset", "try", "promote", "drop"] = "show"
    """`set` changes what `objectives` gives and leaves the rest; `reset` goes back to the fleet file. `try` tries the
    weights that `objectives` gives beside those in force, `promote` puts them in force, `drop` ends the trial."""
    objectives: Objectives = Objectives()
    clear: list[str] = []
    """With `set`: names of objectives that are withdrawn."""
    share: Annotated[float, Meta(ge=0.0, le=0.9)] = 0.0
    """With `try`: of the queries, so many are routed by the weights on trial; with 0 it is only noted where they would
    have sent each."""
    trial: Annotated[int, Meta(ge=0)] = 0
    """With `promote` and `drop`: the version of the trial that is meant, so that no other is; 0 means any."""
    by: Annotated[str, Meta(max_length=200)] = ""
    """Who asked, for the record."""


# --- Public: what clients receive ---------------------------------------------------------------


class Usage(_Public, frozen=True, kw_only=True):
    tokens_in: int
    tokens_out: int
    tokens_cached: int = 0
    """Of `tokens_in`, those that lay in the engine's KV cache already (a shared or earlier beginning)."""


class Timings(_Public, frozen=True, kw_only=True):
    """Where the time went, in seconds. `total_s` is their sum, from intake to the last token."""

    queue_s: float
    """Waiting for a slot in a busy engine."""
    load_s: float
    """Waiting for the model to become resident."""
    prefill_s: float
    """From the slot to the first token."""
    decode_s: float
    """From the first token to the last."""
    overhead_s: float
    """Everything else: CALM's own work, the broker and embedding included."""
    total_s: float
    retried_s: float = 0.0
    """On attempts beside the one that this answer is from: failed, or not readable."""


class Energy(_Public, frozen=True, kw_only=True):
    """Energy of this answer. `source` says how it is known; `model` means estimated from stated powers."""

    joules: float
    source: Literal["nvml", "rapl", "model"]
    retried_j: float = 0.0
    """Of `joules`, what attempts before this one took, whose answers could not be read."""

    @property
    def estimated(self) -> bool:
        return self.source == "model"


class Confidence(_Public, frozen=True, kw_only=True):
    """From the engine's own distribution at each generated token, in nats."""

    mean_logprob: float
    min_logprob: float
    mean_entropy: float


class Reading(_Public, frozen=True, kw_only=True):
    """What was read in an answer of which something was expected."""

    value: str | None
    """The choice as the query wrote it, the number in plain digits, the JSON text, or the piece of text contained; null
    when nothing could be read."""
    why: str
    """How it was found (`announced`, `alone`, `first`, `only`, `last`, `whole`, `fenced`, `within`, `contained`), or
    why not (`nothing`, `several`, `cut_off`, `no_json`, `keys_missing`)."""


class PassedOver(_Public, frozen=True, kw_only=True):
    """Another attempt of a query, whose answer was not given."""

    model: str
    attempt: int
    why: str
    """`unsure`, or, where it could not be read, as in `Reading`."""
    chance: float | None = None
    """Of being right; null without `cascade`."""


class Answer(_Public, frozen=True, kw_only=True, tag="answer.v1"):
    """The final answer to a query: the last message of a stream, the only one otherwise. Its text is the whole answer,
    whatever chunks came before."""

    id: str
    text: str
    model: str
    artifact: str
    worker: str
    finish_reason: Literal["stop", "length"]
    usage: Usage
    timings: Timings
    energy: Energy
    confidence: Confidence
    attempt: int
    why: str
    """One sentence: why this model. `calm explain ID` has the whole decision."""
    reading: Reading | None = None
    """Null when nothing was expected of the answer."""
    chance: float | None = None
    """Of being right, by the model's confidence and what judgements say of that; null without `cascade`."""
    passed_over: list[PassedOver] = []
    """Answers of this query that were not given, in the order in which that was known."""


class Trial(_Public, frozen=True, kw_only=True, tag="trial.v1"):
    """Weights tried beside those in force. Also the value of KV `calm_control`, key `trial`."""

    version: int
    """Grows with every trial."""
    share: float = 0.0
    """Of the queries that are routed by utility, those that are routed by these weights."""
    w_quality: float | None = None
    """None leaves the weight in force, here and below."""
    w_latency: float | None = None
    w_energy: float | None = None
    at: float = 0.0
    """Since when."""
    by: str = ""
    ended: bool = False
    """Promoted or dropped; the entry stays, so that versions grow."""


class ControlState(_Public, frozen=True, kw_only=True, tag="control_state.v1"):
    """The objectives in force, the weights as moved to hold them, and how they stand. The reply of `calm.control`."""

    objectives: Objectives = Objectives()
    version: int = 0
    """Grows with every change of the objectives."""
    event: Literal["set", "reset", "try", "promote", "drop", "moved", "show"] = "show"
    """Why this was recorded."""
    changed_at: float = 0.0
    changed_by: str = ""
    weights: dict[str, float] = {}
    """w_q, w_l and w_e as the planners use them, with their scales `latency_slo_s` and `energy_ref_j`."""
    moved_at: float = 0.0
    """When the controller last moved the weights; 0 when the fleet's own stand."""
    controller: str = ""
    """The planner that runs the controller."""
    count: int = 0
    """Queries that the figures below are over, 500 at most."""
    latency_p95_s: float | None = None
    energy_j_mean: float | None = None
    energy_j_per_hour: float | None = None
    infeasible: list[str] = []
    """Objectives that are broken with their weight at its bound: no policy of this fleet holds them now."""
    trial: Trial | None = None
    """Weights on trial, if any are."""


class Chunk(_Public, frozen=True, kw_only=True, tag="chunk.v1"):
    """Part of a streamed answer. `seq` counts from 0 within an attempt; a higher `attempt` starts over."""

    id: str
    seq: int
    attempt: int
    text: str
    restarted: bool = False
    """True on the first chunk of an attempt after the first: drop the text received before it."""
    model: str = ""
    """The card that writes; on the first chunk of an attempt only."""


class Failure(_Public, frozen=True, kw_only=True, tag="error.v1"):
    """A typed error as data. `remedy` says what to change."""

    code: str
    message: str
    remedy: str = ""
    retryable: bool = False
    id: str = ""
    """The query's id, empty when nothing was accepted."""
    detail: dict[str, str] = {}


class Ok(_Public, frozen=True, kw_only=True, tag="ok.v1"):
    """Plain acknowledgement."""

    message: str = ""


# --- The pipeline ---------------------------------------------------------------------------------


class Accepted(_Internal, frozen=True, kw_only=True, tag="accepted.v1"):
    """`calm.queries.new`: a valid query that the intake has taken responsibility for."""

    query: Query
    query_id: str
    reply: str = ""
    """The client's inbox; carried inside, because JetStream uses the reply subject itself."""
    encoding: Literal["json", "msgpack"] = "json"
    deadline_at: float
    stamps: dict[str, float] = {}
    """Unix time of each step so far: received, accepted, analyzed, planned, dispatched, pulled ..."""


class Profile(_Internal, frozen=True, kw_only=True):
    """What the analyzer knows about a query."""

    embedding: bytes = b""
    """Sentence embedding: little-endian float32 of unit length (384 values for MiniLM)."""
    form: bytes = b""
    """Plain facts about its text (`shared.learn.features.FORM`), little-endian float16."""
    domains: dict[str, float] = {}
    """Probability by domain; sums to 1."""
    affinity: dict[str, float] = {}
    """By card: cosine similarity between the query and the card's description and exemplars, -1 to 1."""
    tokens_in: dict[str, int] = {}
    """By model: prompt tokens under that model's tokenizer, chat template left out; estimated where they cannot exceed
    any context."""
    tokens_out: float = 128.0
    """Predicted length of the answer in tokens."""
    difficulty: float = 0.5
    """0 (easy) to 1 (hard)."""
    prompt_chars: int = 0


class Analyzed(_Internal, frozen=True, kw_only=True, tag="analyzed.v1"):
    """`calm.queries.analyzed`."""

    accepted: Accepted
    profile: Profile


class Candidate(_Internal, frozen=True, kw_only=True):
    """One card as the planner saw it for one query."""

    card: str
    artifact: str
    worker: str = ""
    """The worker assumed for the estimate."""
    excluded: str | None = None
    """Reason code of the hard constraint that excluded it; None for a candidate that stood."""
    quality: float = 0.0
    latency_s: float = 0.0
    energy_j: float = 0.0
    utility: float = 0.0
    terms: dict[str, float] = {}
    """The parts: affinity, domain_score, queue_s, load_s, prefill_s, decode_s, load_j, w_q, w_l, w_e ..."""


class Tried(_Internal, frozen=True, kw_only=True):
    """The two policies that stood behind a decision while weights were on trial."""

    version: int
    """Of the trial."""
    present: str
    """The card that the weights in force prefer,"""
    candidate: str
    """and that which the weights on trial do."""


class CascadeStep(_Internal, frozen=True, kw_only=True):
    """A card of a route whose answers may be handed on. Of an answer with mean log-probability c, the chance of being
    right is 1 / (1 + exp(-(level + slope c)))."""

    level: float
    slope: float
    below: float = 0.0
    """While the best answer has a lower chance than this, the next card of the route is worth asking."""
    chance: float = 0.0
    """Expected before it is asked."""
    reached: float = 1.0
    """Probability that it is asked at all."""
    latency_s: float = 0.0
    """Of this attempt alone, as expected."""


class Route(_Internal, frozen=True, kw_only=True, tag="route.v1"):
    """A routing decision, also published on `calm.decision.route`."""

    query_id: str
    order: list[str]
    """Cards to try, best first; empty when no candidate stood."""
    candidates: list[Candidate]
    reason: str
    """Reason code: `best_utility`, `explored`, `trial`, `cascade`, `asked_for`, `only_candidate`, `no_feasible_model`,
    `context_exceeded`."""
    why: str = ""
    """The reason as one sentence for people."""
    runner_up: str | None = None
    margin: float = 0.0
    """Utility of the choice minus that of the runner-up."""
    flip: str = ""
    """What would have turned the choice to the runner-up."""
    weights: dict[str, float] = {}
    """w_q, w_l and w_e, with their scales `latency_slo_s` and `energy_ref_j`."""
    patience: dict[str, int] = {}
    """By card: output tokens after which its answer is cut off, where another card may be asked then."""
    cascade: list[CascadeStep] = []
    """Of the first cards of `order`; empty without `cascade`, and where no answer is worth handing on."""
    propensity: float = 1.0
    """Probability with which the policy took this choice."""
    trial: Tried | None = None
    """What weights on trial made of it, where there are any and the choice was by utility."""
    knowledge_version: int = 0
    learned_version: int = 0
    """Of the learned quality; 0 when the cards' own scores were used."""
    lengths_version: int = 0
    """Of the learned lengths of answers; 0 when means stood for them."""
    confidence_version: int = 0
    """Of what confidences say; 0 where that was not asked."""
    objectives_version: int = 0
    embedding: bytes = b""
    """The query's sentence embedding, little-endian float16: what its judgement is learned with,"""
    form: bytes = b""
    """along with the facts about its text that its profile has."""
    domains: dict[str, float] = {}
    decided_at: float = 0.0
    decided_in_s: float = 0.0
    planner: str = ""


class Planned(_Internal, frozen=True, kw_only=True, tag="planned.v1"):
    """`calm.queries.planned`: what the executor carries out."""

    accepted: Accepted
    route: Route
    """Without its candidates and terms: those are in the journal (`calm.decision.route`)."""
    tokens_out: float = 128.0


class Sampling(_Internal, frozen=True, kw_only=True):
    """Resolved generation settings: the query's where given, else the card's, else the defaults."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: list[str] = []


class Work(_Internal, frozen=True, kw_only=True, tag="work.v1"):
    """`calm.work.<artifact>.<priority>`: one attempt, complete in itself."""

    query_id: str
    attempt: int
    """Counts from 1 over the route; redeliveries of the same attempt add to it in the engine."""
    rank: int
    """Index into `planned.route.order` of the card this attempt uses."""
    card: str
    artifact: str
    messages: list[ChatMessage]
    sampling: Sampling
    planned: Planned
    """Kept whole, so that any executor can fall back after this attempt without state of its own."""
    adapter: str = ""
    """LoRA adapter of the artifact that the card uses."""
    prompt_lookup: bool = False
    """As in the card."""
    expect: Expect | None = None
    """The query's, else the card's."""
    retries: int = 0
    """Further models that may be asked when this answer cannot be read."""
    cascade: CascadeStep | None = None
    """Of this card, where its answer may be handed on."""
    unread: Done | None = None
    """How the query ends when no later attempt does better: the answer likeliest to be right so far, or, where none
    could be read, the latest."""
    stamps: dict[str, float] = {}


class AttemptFailed(_Internal, frozen=True, kw_only=True, tag="attempt_failed.v1"):
    """`calm.queries.failed`: an engine could not finish an attempt; an executor decides what follows."""

    work: Work
    failure: Failure
    worker: str
    attempt: int
    """The highest attempt number used so far."""
    at: float
    unread: Done | None = None
    """The answer, where it was finished and cannot be read (`unreadable`) or is likely wrong (`unsure`): the end of the
    query unless another model is asked. Where an earlier one is likelier to be right, that."""


class Unread(_Internal, frozen=True, kw_only=True):
    """Another attempt of a query, whose answer was not taken: it could not be read, or was less likely right."""

    card: str
    artifact: str
    worker: str
    attempt: int
    why: str
    """As in `PassedOver`."""
    tokens_in: int = 0
    tokens_out: int = 0
    finish_reason: Literal["stop", "length"] = "stop"
    energy_j: float = 0.0
    seconds: float = 0.0
    """From its dispatch to its last token."""
    text: str = ""
    """The end of what it wrote."""
    readable: bool | None = False
    """Null when nothing was expected of it."""
    value: str | None = None
    """What was read in it."""
    mean_logprob: float | None = None
    chance: float | None = None
    """As in `Answer`."""


class Done(_Internal, frozen=True, kw_only=True, tag="done.v1"):
    """`calm.done.<query_id>`: how a query ended. The first one published for an id is the only one kept."""

    query_id: str
    answer: Answer | None = None
    failure: Failure | None = None
    reply: str = ""
    encoding: Literal["json", "msgpack"] = "json"
    attempt: int = 0
    stamps: dict[str, float] = {}
    card: str = ""
    artifact: str = ""
    worker: str = ""
    device_class: str = ""
    batch_mean: float = 0.0
    """Sequences that ran beside it in a decode step, on average, itself included."""
    energy_in_j: float = 0.0
    """Of the answer's energy, what reading the prompt took; both are 0 where the worker does not know the split."""
    energy_out_j: float = 0.0
    """Of the answer's energy, what writing the answer took."""
    tokens_drafted: int = 0
    """Tokens of the answer that were guessed and verified (`prompt_lookup`)."""
    tokens_accepted: int = 0
    """Of these, those that were right: each saved a step."""
    unread: list[Unread] = []
    """Other attempts, whose answers were not taken, in the order in which that was known."""
    rejected: bool = False
    """True for bad input that was never accepted; kept for the statistics only."""


class Dead(_Internal, frozen=True, kw_only=True, tag="dead.v1"):
    """`calm.dead`: a message that was given up, with the reason, for inspection and replay."""

    subject: str
    reason: str
    payload: bytes
    query_id: str = ""
    service: str = ""
    at: float = 0.0


# --- The fleet ------------------------------------------------------------------------------------


class Device(_Internal, frozen=True, kw_only=True):
    kind: Literal["cpu", "cuda"]
    name: str
    index: int = 0
    uuid: str = ""
    """Of a GPU, or of a slice of one (MIG): unique whatever the host. Empty for a CPU."""
    memory_bytes: int = 0
    """Total memory of the device (host memory for a CPU)."""
    provider: str = "CPUExecutionProvider"
    """ONNX Runtime execution provider that engines ask for, and must get."""
    threads: int = 1

    @property
    def device_class(self) -> str:
        """What latency and energy are learned by, e.g. `cpu-2t` or `cuda-nvidia-h100`."""
        if self.kind == "cpu":
            return f"cpu-{self.threads}t"
        return f"cuda-{self.name.lower().replace(' ', '-')}"


class EngineState(_Internal, frozen=True, kw_only=True):
    """One resident (or becoming resident, or leaving) artifact on a worker."""

    artifact: str
    state: Literal["loading", "ready", "draining", "failed"]
    footprint_bytes: int
    """Counted against the budget: weights, KV cache and the process's own share."""
    measured_bytes: int = 0
    """As measured on the process or device; 0 while unknown."""
    slots: int = 0
    active: int = 0
    """Sequences being generated."""
    held: int = 0
    """Messages taken from the queue and waiting for a slot."""
    loaded_at: float = 0.0
    last_used_at: float = 0.0
    load_s: float = 0.0
    tpot_s: float = 0.0
    """Recent time per output token, exponentially weighted; 0 while unknown."""
    tokens_out: int = 0
    pid: int = 0


class WorkerState(_Internal, frozen=True, kw_only=True, tag="worker_state.v1"):
    """KV `calm_fleet`, key `worker.<id>`: refreshed each second, gone 3 s after the last."""

    worker: str
    host: str
    device: Device
    budget_bytes: int
    engines: list[EngineState] = []
    standby: list[str] = []
    """Artifacts that are not resident, but loaded in host memory: resident again in milliseconds."""
    lacks: list[str] = []
    """Artifacts of the fleet that cannot be loaded here, since they are not in this worker's model store."""
    draining: bool = False
    started_at: float = 0.0
    at: float = 0.0
    version: str = ""

    @property
    def used_bytes(self) -> int:
        """Sum of the footprints of all engines, in whatever state."""
        return sum(e.footprint_bytes for e in self.engines)


class ArtifactSpec(_Internal, frozen=True, kw_only=True):
    """What a worker needs to hold an artifact, and the planner to count it."""

    name: str
    model: str
    variant: str
    weights_bytes: int
    kv_bytes_per_token: int
    slots: int
    """Sequences of `context` tokens whose keys and values are counted in the footprint."""
    context: int
    """Tokens a slot can hold: prompt and answer together."""
    sequences: int = 0
    """Most sequences at once in the bytes of all slots, as many as their prompts and answers let; 0 for one a slot."""
    overhead_bytes: int = 0
    """The engine process without weights and KV cache."""
    adapters: list[str] = []
    """LoRA adapters that its engine holds over the model: those of all cards that use it."""
    adapter_bytes: int = 0
    """Of all these adapters."""
    tokenizer: str = ""
    """sha256 of tokenizer.json: models that share it share their token counts."""

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values an engine may hold."""
        return self.context * self.slots

    @property
    def kv_bytes(self) -> int:
        return self.kv_bytes_per_token * self.kv_tokens

    @property
    def footprint_bytes(self) -> int:
        return self.weights_bytes + self.adapter_bytes + self.overhead_bytes + self.kv_bytes

    def at_once(self, device: Device) -> int:
        """Sequences that an engine on `device` takes. On a GPU a row's memory is its own from the start, so that more
        rows than slots would be more bytes than were counted."""
        return self.slots if device.kind == "cuda" else max(self.slots, self.sequences)


class Card(_Internal, frozen=True, kw_only=True, tag="card.v1"):
    """KV `calm_models`, key = name: what routing chooses, with the artifact it runs on."""

    name: str
    artifact: ArtifactSpec
    adapter: str = ""
    """LoRA adapter over the artifact; empty for the model as it is."""
    prompt_lookup: bool = False
    """Answers mostly repeat pieces of their prompts: guess them, and verify several tokens in one step."""
    description: str
    exemplars: list[str] = []
    domains: dict[str, float] = {}
    """Expected quality by domain, 0 to 1."""
    quality: float = 0.5
    """Expected quality where no domain score applies, 0 to 1."""
    system_prompt: str = ""
    tags: list[str] = []
    pinned: bool = False
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    parameters_b: float = 0.0
    """Parameters in billions, for priors."""
    expect: Expect | None = None
    """What its answers must look like, where the query does not say."""


class Policy(_Internal, frozen=True, kw_only=True, tag="policy.v1"):
    """KV `calm_models`, key `_policy`: the fleet's objectives and residency rules."""

    fleet: str
    w_quality: float = 1.0
    w_latency: float = 0.3
    w_energy: float = 0.1
    latency_slo_s: float = 5.0
    energy_ref_j: float = 50.0
    min_residence_s: float = 3.0
    """A model stays at least this long after it became ready."""
    idle_evict_s: float = 600.0
    """A model unused for this long is evicted; 0 keeps it for ever."""
    worker_memory_bytes: int = 0
    """Budget of a worker that sets none itself; 0 leaves it at 80 % of the device."""
    embedder: str = "minilm"
    """Model in the store that embeds queries and cards."""
    embedder_variant: str = "int8"
    explore: float = 0.05
    """Largest probability of not choosing the best guess, for the sake of learning; 0 never explores."""
    max_wait_s: float = 5.0
    """A query waits at most about this long for a model that is not resident before another must leave."""
    retries: int = 0
    """Further models that are asked when an answer cannot be read, for queries that do not say."""
    cascade: bool = False
    """Whether answers that are likely wrong are handed on, for queries that do not say."""


class InForce(_Internal, frozen=True, kw_only=True, tag="in_force.v1"):
    """KV `calm_control`, key `objectives`: what was last asked for on `calm.control`."""

    objectives: Objectives
    version: int
    """Grows with every change."""
    action: Literal["set", "reset", "promote"] = "set"
    at: float = 0.0
    by: str = ""


class Moved(_Internal, frozen=True, kw_only=True, tag="moved.v1"):
    """KV `calm_control`, key `weights`: the weights as the dual controller moved them, and its memory."""

    version: int
    """Of the objectives that they are to hold; weights for other objectives are not used."""
    fleet: str
    weights: dict[str, float]
    """`w_quality`, `w_latency`, `w_energy`, `latency_slo_s`, `energy_ref_j`: fields of the policy."""
    at: float
    controller: str = ""
    count: int = 0
    latency_p95_s: float | None = None
    energy_j_mean: float | None = None
    energy_j_per_hour: float | None = None
    infeasible: list[str] = []
    state: bytes = b""
    """The controller's memory, for the planner that takes over."""


class CardStanding(_Internal, frozen=True, kw_only=True, tag="card_standing.v1"):
    """KV `calm_control`, key `standing.<card>`: whether a card is trusted."""

    card: str
    state: Literal["healthy", "quarantined"] = "healthy"
    scale: float = 1.0
    """Predicted quality is multiplied by this."""
    reason: str = ""
    """`drift`, `restored` or `rebased`: the last event."""
    evidence: float = 0.0
    judgements: int = 0
    """In the present state."""
    at: float = 0.0


class LearnedPart(_Internal, frozen=True, kw_only=True, tag="learned_part.v1"):
    """KV `calm_control`, key `learned.<name>.<index>`: a piece of learned parameters, small enough for a message."""

    name: Literal["quality", "length", "confidence"]
    version: int
    index: int
    count: int
    """Pieces in all; those of one version belong together."""
    data: bytes


class Load(_Internal, frozen=True, kw_only=True, tag="load.v1"):
    """`calm.command.load.<worker>`: make an artifact resident. Idempotent by `op_id`."""

    op_id: str
    worker: str
    spec: ArtifactSpec
    reason: str
    after: list[str] = []
    """Operations on the same worker that must have ended first (evictions that make room)."""
    issued_at: float = 0.0
    expires_at: float = 0.0


class Evict(_Internal, frozen=True, kw_only=True, tag="evict.v1"):
    """`calm.command.evict.<worker>`: drain an artifact's engine and end it. Idempotent by `op_id`."""

    op_id: str
    worker: str
    artifact: str
    reason: str
    issued_at: float = 0.0
    expires_at: float = 0.0


class Operation(_Internal, frozen=True, kw_only=True, tag="operation.v1"):
    """`calm.journal.operation`: how a load or evict ended, or an engine was lost."""

    op_id: str
    kind: Literal["load", "evict", "lost"]
    worker: str
    artifact: str
    ok: bool
    reason: str
    """Why the planner wanted it."""
    failure: Failure | None = None
    seconds: float = 0.0
    bytes: int = 0
    """Footprint taken or given back."""
    held_bytes: int = 0
    """Measured memory of the engine: after a load, or before an evict."""
    freed_bytes: int = 0
    """Of these, what an evict gave back, measured."""
    at: float = 0.0


class WorkerReply(_Internal, frozen=True, kw_only=True, tag="worker_reply.v1"):
    """A worker's answer to a load or evict request, sent when the operation has ended."""

    op_id: str
    ok: bool
    failure: Failure | None = None
    seconds: float = 0.0
    bytes: int = 0
    held_bytes: int = 0
    freed_bytes: int = 0


class Placement(_Internal, frozen=True, kw_only=True, tag="placement.v1"):
    """`calm.decision.placement`: one pass of the residency planner that changed something."""

    id: str
    loads: list[Load] = []
    evicts: list[Evict] = []
    reason: str = ""
    demand: dict[str, int] = {}
    """Queries waiting or running, by artifact."""
    values: dict[str, float] = {}
    """Worth of each resident artifact as the planner saw it, by `worker/artifact`."""
    decided_at: float = 0.0
    planner: str = ""


class EnergyAccount(_Internal, frozen=True, kw_only=True):
    """What one artifact has cost on one worker."""

    artifact: str
    active_j: float = 0.0
    """While it ran steps, the device's baseline power included."""
    load_j: float = 0.0
    loads: int = 0
    busy_s: float = 0.0
    tokens_in: int = 0
    """Of the answers that its engines finished."""
    tokens_out: int = 0
    answers: int = 0
    """From here on only in `energy_reports.v1`: what the figures of the answers up to the report's `at` add up to."""
    answers_j: float = 0.0


class EnergyReport(_Internal, frozen=True, kw_only=True, tag="energy_report.v1"):
    """`calm.telemetry.<worker>.energy`: a device's joules by account, summed since the worker started."""

    worker: str
    host: str = ""
    device_class: str = ""
    source: Literal["nvml", "rapl", "model"] = "model"
    """`model`: every figure is estimated from stated powers."""
    started_at: float = 0.0
    at: float = 0.0
    """Whatever ended by then is in the accounts with all that it took; later work may be, in part."""
    elapsed_s: float = 0.0
    total_j: float = 0.0
    """By the meter; all other joules here add up to it."""
    idle_j: float = 0.0
    other_j: float = 0.0
    """Of processes that are not CALM's, where the meter counts a whole host."""
    accounts: list[EnergyAccount] = []


class EnergyReports(_Internal, frozen=True, kw_only=True, tag="energy_reports.v1"):
    """`calm.knowledge.energy`: each worker's ledger, over all its starts that are still remembered."""

    workers: list[EnergyReport] = []


class Symptom(_Internal, frozen=True, kw_only=True, tag="symptom.v1"):
    """`calm.symptom.<kind>`: something the analyzer or an executor noticed."""

    kind: Literal["slo_violation", "overload", "worker_lost", "engine_lost", "breaker_open", "drift", "recovery"]
    subject: str
    """The model, artifact or worker it is about."""
    detail: str
    value: float = 0.0
    limit: float = 0.0
    at: float = 0.0


class Heartbeat(_Internal, frozen=True, kw_only=True, tag="heartbeat.v1"):
    """`calm.telemetry.<service>.health`: each service, once a second."""

    service: str
    instance: str
    state: Literal["starting", "ready", "draining"]
    in_flight: int = 0
    handled: int = 0
    failed: int = 0
    pid: int = 0
    host: str = ""
    at: float = 0.0
    detail: str = ""


# --- Knowledge ------------------------------------------------------------------------------------


class ArtifactQos(_Internal, frozen=True, kw_only=True):
    """Learned cost of one artifact on one device class, over the recent window."""

    artifact: str
    device_class: str
    count: int = 0
    prefill_s_per_token: float = 0.0
    tpot_s: float = 0.0
    tpot_batch: float = 1.0
    """Mean batch size at which `tpot_s` was seen."""
    load_s: float = 0.0
    loads: int = 0
    energy_j_per_token_in: float = 0.0
    energy_j_per_token_out: float = 0.0
    energy_source: str = "model"


class CardQos(_Internal, frozen=True, kw_only=True):
    """What one card did over the recent window."""

    card: str
    answered: int = 0
    failed: int = 0
    tokens_out_mean: float = 0.0
    latency_p50_s: float = 0.0
    latency_p95_s: float = 0.0
    ttft_p50_s: float = 0.0
    energy_j_mean: float = 0.0
    feedback_count: int = 0
    feedback_mean: float = 0.0


class Qos(_Internal, frozen=True, kw_only=True, tag="qos.v1"):
    """`calm.knowledge.qos` and, once a second, `calm.telemetry.monitor.qos`."""

    version: int = 0
    artifacts: list[ArtifactQos] = []
    cards: list[CardQos] = []
    at: float = 0.0


class KnowledgeRequest(_Public, frozen=True, kw_only=True, tag="knowledge_request.v1"):
    """Argument of `calm.knowledge.<verb>`: `id` for one record, `limit` for lists."""

    id: str = ""
    limit: Annotated[int, Meta(ge=1, le=1000)] = 20
    after: float = 0.0
    """For lists that are read in parts: only what was decided later than this Unix time."""


class TrialRow(_Internal, frozen=True, kw_only=True, array_like=True):
    """One decision that was taken while weights were on trial, with what came of it."""

    at: float
    chosen: str
    present: str
    candidate: str
    propensity: float
    predicted: list[list[float]]
    """[3][3]: of the chosen, present and candidate card the predicted quality, latency (s) and energy (J)."""
    score: float | None = None
    """As judged; None until it is."""
    latency_s: float | None = None
    """As answered, with all attempts; None when it was not answered."""
    energy_j: float | None = None


class TrialRows(_Internal, frozen=True, kw_only=True, tag="trial_rows.v1"):
    """The decisions under one trial, oldest first; `more` when there are more after the last."""

    rows: list[TrialRow]
    more: bool = False


class QueryRecord(_Internal, frozen=True, kw_only=True, tag="query_record.v1"):
    """Everything known about one query."""

    query_id: str
    state: Literal["accepted", "answered", "failed"]
    query: Query | None = None
    route: Route | None = None
    done: Done | None = None
    feedback: list[Feedback] = []
    received_at: float = 0.0


class QueryRecords(_Internal, frozen=True, kw_only=True, tag="query_records.v1"):
    records: list[QueryRecord] = []


class Counts(_Internal, frozen=True, kw_only=True, tag="counts.v1"):
    """`calm.knowledge.counts`: totals since the knowledge base was created."""

    accepted: int = 0
    answered: int = 0
    failed: int = 0
    rejected: int = 0
    in_flight: int = 0
    feedback: int = 0
    by_card: dict[str, int] = {}
    """Answered queries by card."""
    failures: dict[str, int] = {}
    """By error code."""
    loads: int = 0
    evictions: int = 0
    lost: int = 0
    by_operation_reason: dict[str, int] = {}


class Rejections(_Internal, frozen=True, kw_only=True, tag="rejections.v1"):
    """`calm.telemetry.monitor.rejected`: bad input refused by one intake since its last report."""

    counts: dict[str, int]
    """By error code."""
    at: float


class ControlStates(_Internal, frozen=True, kw_only=True, tag="control_states.v1"):
    """`calm.knowledge.controls`: the latest changes of objectives and moves of weights, newest first."""

    states: list[ControlState] = []


class Operations(_Internal, frozen=True, kw_only=True, tag="operations.v1"):
    """`calm.knowledge.operations`: the latest loads, evictions and losses, newest first."""

    operations: list[Operation] = []


def stamp(stamps: dict[str, float], **more: float) -> dict[str, float]:
    """Return `stamps` with further times added; the original is left as it is."""
    return {**stamps, **more}
