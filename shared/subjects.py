"""The one module that builds subjects, and the streams and buckets behind them. `docs/subjects.md` lists all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shared import messages as m

QUERY = "calm.query"
FEEDBACK = "calm.feedback"
CONTROL = "calm.control"
NEW = "calm.queries.new"
ANALYZED = "calm.queries.analyzed"
PLANNED = "calm.queries.planned"
FAILED = "calm.queries.failed"
DEAD = "calm.dead"
DECISION_ROUTE = "calm.decision.route"
DECISION_PLACEMENT = "calm.decision.placement"
DECISION_CONTROL = "calm.decision.control"
JOURNAL_ACCEPTED = "calm.journal.accepted"
JOURNAL_OPERATION = "calm.journal.operation"
QOS = "calm.telemetry.monitor.qos"
REJECTED = "calm.telemetry.monitor.rejected"

KNOWLEDGE_VERBS = ("query", "recent", "counts", "qos", "operations", "placement", "controls", "trial", "energy")

STREAM_QUERIES = "CALM_QUERIES"
STREAM_WORK = "CALM_WORK"
STREAM_DONE = "CALM_DONE"
STREAM_JOURNAL = "CALM_JOURNAL"
STREAM_COMMANDS = "CALM_COMMANDS"
STREAM_DEAD = "CALM_DEAD"

BUCKET_FLEET = "calm_fleet"
BUCKET_MODELS = "calm_models"
BUCKET_LEASES = "calm_leases"
BUCKET_CONTROL = "calm_control"
POLICY_KEY = "_policy"
OBJECTIVES_KEY = "objectives"
WEIGHTS_KEY = "weights"
TRIAL_KEY = "trial"

INTAKE_QUEUE = "calm-intake"
KNOWLEDGE_QUEUE = "calm-knowledge"
CONTROL_QUEUE = "calm-control"

INBOXES = "_INBOX"
DONE_TO_INBOX = (f"calm.done.*.{INBOXES}.>", f"{INBOXES}.>")
"""What stream `CALM_DONE` republishes, and where: only what it has stored, which is the first end of a query."""
_ELSEWHERE = "end"

ALL_WORK = "calm.work.>"

PRIORITIES: tuple[Literal["hi", "lo"], ...] = ("hi", "lo")


def cancel(query_id: str) -> str:
    return f"calm.cancel.{query_id}"


def done(query_id: str, reply: str) -> str:
    """Where a query's end is claimed. The broker sends what it stores on to a client's inbox, which it finds here."""
    return f"calm.done.{query_id}.{reply if delivered_by_broker(reply) else _ELSEWHERE}"


def done_of(query_id: str) -> str:
    """Whatever the client's inbox (`*` for every query)."""
    return f"calm.done.{query_id}.>"


def query_of_done(subject: str) -> str:
    """The query id in a subject made by `done`."""
    return subject.split(".", 3)[2]


def delivered_by_broker(reply: str) -> bool:
    """Whether the broker itself hands a claimed end to this inbox: NATS clients' own inboxes, unless renamed."""
    return reply.startswith(f"{INBOXES}.")


def work(artifact: str, priority: str) -> str:
    return f"calm.work.{artifact}.{priority}"


def work_durable(artifact: str, priority: str) -> str:
    """Name of the durable consumer that all engines of an artifact share."""
    return f"{artifact}-{priority}"


def artifact_of_work(subject: str) -> str:
    """The artifact in a subject made by `work`."""
    return subject.split(".")[2]


def load(worker: str) -> str:
    return f"calm.command.load.{worker}"


def evict(worker: str) -> str:
    return f"calm.command.evict.{worker}"


def worker_request(worker: str, verb: Literal["load", "evict"]) -> str:
    return f"calm.worker.{worker}.{verb}"


def health(service: str) -> str:
    return f"calm.telemetry.{service}.health"


def energy(worker: str) -> str:
    return f"calm.telemetry.{worker}.energy"


def symptom(kind: str) -> str:
    return f"calm.symptom.{kind}"


def knowledge(verb: str) -> str:
    return f"calm.knowledge.{verb}"


def fleet_key(worker: str) -> str:
    return f"worker.{worker}"


def standing_key(card: str) -> str:
    return f"standing.{card}"


def learned_key(name: str, index: int | str) -> str:
    return f"learned.{name}.{index}"


def kv(bucket: str, key: str) -> str:
    """The stream subject under a KV key (`>` for all of a bucket)."""
    return f"$KV.{bucket}.{key}"


def lease_of_gpu(uuid: str) -> str:
    """Key of the lease of a GPU."""
    return f"gpu.{uuid}"


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue: a subject pattern, how it is carried, what it holds and who uses it."""

    pattern: str
    kind: str
    message: tuple[type, ...]
    sender: str
    receiver: str
    note: str = ""


CATALOGUE: tuple[Entry, ...] = (
    Entry(QUERY, "core request, queue group", (m.Query,), "clients", "monitor", "answered to the reply inbox"),
    Entry("<reply inbox>", "core", (m.Chunk, m.Answer, m.Failure), "workers, executor, monitor", "clients",
          "chunks only when `stream` is true, then exactly one answer or error"),
    Entry(cancel("<query_id>"), "core", (), "clients, executor", "executor, workers", "empty payload"),
    Entry(FEEDBACK, "core request", (m.Feedback,), "clients", "monitor", "replies `ok.v1` or `error.v1`"),
    Entry(NEW, f"JetStream {STREAM_QUERIES}, work queue", (m.Accepted,), "monitor", "analyzer"),
    Entry(ANALYZED, f"JetStream {STREAM_QUERIES}, work queue", (m.Analyzed,), "analyzer", "planner"),
    Entry(PLANNED, f"JetStream {STREAM_QUERIES}, work queue", (m.Planned,), "planner", "executor",
          "held unacknowledged until the query is done"),
    Entry(FAILED, f"JetStream {STREAM_QUERIES}, work queue", (m.AttemptFailed,), "workers", "executor"),
    Entry(work("<artifact>", "<priority>"), f"JetStream {STREAM_WORK}, work queue", (m.Work,), "executor",
          "engines of the artifact", "one durable consumer per artifact and priority (`hi`, `lo`)"),
    Entry(done("<query_id>", f"{INBOXES}.<token>"), f"JetStream {STREAM_DONE}, one message per subject, first wins",
          (m.Answer, m.Failure, m.Done), "workers, executor, planner, monitor", "clients, monitor, executor",
          "the claim: see decisions/0003; the client's final message with the rest of `done.v1` as JSON in the header "
          "`Calm-Record`, which the broker republishes to the inbox in the subject (`end` in its place for other "
          "reply subjects)"),
    Entry(DEAD, f"JetStream {STREAM_DEAD}", (m.Dead,), "all services", "people"),
    Entry(load("<worker>"), f"JetStream {STREAM_COMMANDS}, work queue", (m.Load,), "planner", "executor"),
    Entry(evict("<worker>"), f"JetStream {STREAM_COMMANDS}, work queue", (m.Evict,), "planner", "executor"),
    Entry(worker_request("<worker>", "load"), "core request", (m.Load, m.WorkerReply), "executor", "worker"),
    Entry(worker_request("<worker>", "evict"), "core request", (m.Evict, m.WorkerReply), "executor", "worker"),
    Entry(DECISION_ROUTE, f"JetStream {STREAM_JOURNAL}", (m.Route,), "planner", "monitor, planner"),
    Entry(DECISION_PLACEMENT, f"JetStream {STREAM_JOURNAL}", (m.Placement,), "planner", "monitor"),
    Entry(JOURNAL_ACCEPTED, f"JetStream {STREAM_JOURNAL}", (m.Accepted,), "monitor", "monitor",
          "the record of an acceptance, from every intake replica to the knowledge owner"),
    Entry(JOURNAL_OPERATION, f"JetStream {STREAM_JOURNAL}", (m.Operation,), "executor, worker", "monitor"),
    Entry(symptom("<kind>"), "core", (m.Symptom,), "analyzer, executor", "planner, monitor"),
    Entry(health("<service>"), "core, each second", (m.Heartbeat,), "all services", "`calm up`, `calm status`"),
    Entry(QOS, "core, each second", (m.Qos,), "monitor", "planner, analyzer"),
    Entry(REJECTED, "core request, each second when there are any", (m.Rejections, m.Ok), "monitor", "monitor",
          "from every intake replica to the knowledge owner"),
    Entry(energy("<worker>"), "core, every 5 s", (m.EnergyReport,), "workers", "monitor",
          "sums since the worker started, so that one that is lost is in the next"),
    Entry(knowledge("query"), "core request", (m.KnowledgeRequest, m.QueryRecord), "all", "monitor"),
    Entry(knowledge("recent"), "core request", (m.KnowledgeRequest, m.QueryRecords), "all", "monitor"),
    Entry(knowledge("counts"), "core request", (m.KnowledgeRequest, m.Counts), "all", "monitor"),
    Entry(knowledge("qos"), "core request", (m.KnowledgeRequest, m.Qos), "all", "monitor"),
    Entry(knowledge("operations"), "core request", (m.KnowledgeRequest, m.Operations), "all", "monitor"),
    Entry(knowledge("controls"), "core request", (m.KnowledgeRequest, m.ControlStates), "all", "monitor"),
    Entry(knowledge("trial"), "core request", (m.KnowledgeRequest, m.TrialRows), "all", "monitor",
          "`id`: the version of the trial; decisions taken meanwhile, with what came of them"),
    Entry(knowledge("placement"), "core request", (m.KnowledgeRequest, m.Placement), "all", "monitor"),
    Entry(knowledge("energy"), "core request", (m.KnowledgeRequest, m.EnergyReports), "all", "monitor"),
    Entry(kv(BUCKET_FLEET, fleet_key("<worker>")), f"KV {BUCKET_FLEET}, TTL 3 s", (m.WorkerState,), "worker",
          "planner, executor, CLI", "refreshed each second"),
    Entry(kv(BUCKET_MODELS, "<card>"), f"KV {BUCKET_MODELS}", (m.Card,), "monitor", "all services"),
    Entry(kv(BUCKET_MODELS, POLICY_KEY), f"KV {BUCKET_MODELS}", (m.Policy,), "monitor", "all services"),
    Entry(CONTROL, "core request", (m.Control, m.ControlState, m.Failure), "people", "planner",
          "objectives, changed while the system runs"),
    Entry(DECISION_CONTROL, f"JetStream {STREAM_JOURNAL}", (m.ControlState,), "planner", "monitor",
          "every change of the objectives, and the weights as moved, at most every 10 s"),
    Entry(kv(BUCKET_CONTROL, OBJECTIVES_KEY), f"KV {BUCKET_CONTROL}", (m.InForce,), "planner", "planner, monitor"),
    Entry(kv(BUCKET_CONTROL, WEIGHTS_KEY), f"KV {BUCKET_CONTROL}", (m.Moved,), "planner", "planner",
          "written by the placement leader, which runs the dual controller"),
    Entry(kv(BUCKET_CONTROL, TRIAL_KEY), f"KV {BUCKET_CONTROL}", (m.Trial,), "planner", "planner",
          "the latest weights on trial, ended or not"),
    Entry(kv(BUCKET_CONTROL, standing_key("<card>")), f"KV {BUCKET_CONTROL}", (m.CardStanding,), "monitor", "planner"),
    Entry(kv(BUCKET_CONTROL, learned_key("<name>", "<index>")), f"KV {BUCKET_CONTROL}", (m.LearnedPart,), "monitor",
          "planner"),
    Entry(kv(BUCKET_LEASES, "placement"), f"KV {BUCKET_LEASES}, TTL 3 s", (), "planner", "planner",
          "the instance that plans residency"),
    Entry(kv(BUCKET_LEASES, lease_of_gpu("<uuid>")), f"KV {BUCKET_LEASES}, TTL 3 s", (), "worker", "worker",
          "the worker that has the GPU"),
    Entry(kv(BUCKET_LEASES, "knowledge"), f"KV {BUCKET_LEASES}, TTL 3 s", (), "monitor", "monitor",
          "the instance that owns the knowledge base"),
)  # fmt: skip
