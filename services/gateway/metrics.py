"""What `/metrics` says: the gateway's own requests, and the fleet."""

from __future__ import annotations

from collections.abc import Iterator

from services.gateway.decide import prometheus
from services.gateway.decide.prometheus import Counter, Family, Histogram, Labels, counter, gauge
from services.gateway.fleet import Snapshot
from shared import messages as m


class Metrics:
    """Counts of this gateway, since it started."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.requests = Counter("calm_http_requests_total", "Requests answered.", ("route", "status"))
        self.errors = Counter("calm_http_errors_total", "Errors told to clients, by code.", ("code",))
        self.disconnects = Counter("calm_http_disconnects_total", "Clients that left before their answer.", ("route",))
        self.seconds = Histogram("calm_http_request_seconds", "From a request's head to its answer's end.", "route")
        self.first = Histogram(
            "calm_http_first_text_seconds", "From a request's head to a stream's first text.", "route"
        )
        self.tokens = Counter("calm_http_tokens_total", "Tokens of answered requests.", ("model", "kind"))
        self.joules = Counter("calm_http_energy_joules_total", "Energy of answered requests.", ("model", "source"))

    def answered(self, answer: m.Answer) -> None:
        """An answer was passed on."""
        self.tokens.add(answer.model, "prompt", by=answer.usage.tokens_in)
        self.tokens.add(answer.model, "completion", by=answer.usage.tokens_out)
        self.joules.add(answer.model, answer.energy.source, by=answer.energy.joules)

    def render(self, fleet: Snapshot, *, ready: bool) -> str:
        """In Prometheus' text format."""
        return prometheus.render([*self._own(), gauge("calm_ready", "1 when queries can be answered.", ready),
                                  *_fleet(fleet)])  # fmt: skip

    def _own(self) -> Iterator[Family]:
        yield gauge("calm_http_in_flight", "Requests being answered.", self.in_flight)
        for counted in (self.requests, self.errors, self.disconnects, self.tokens, self.joules):
            yield counted.family()
        yield self.seconds.family()
        yield self.first.family()


def _fleet(fleet: Snapshot) -> Iterator[Family]:
    yield gauge("calm_workers", "Workers that are alive.", len(fleet.workers))
    services: dict[Labels, float] = {}
    for beat in fleet.services:
        key = (("service", beat.service), ("state", beat.state))
        services[key] = services.get(key, 0) + 1
    yield gauge("calm_services", "Service processes, by state.", services)
    yield gauge("calm_worker_memory_budget_bytes", "Budget of a worker.", _workers(fleet, "budget_bytes"))
    yield gauge("calm_worker_memory_used_bytes", "Footprints of its engines.", _workers(fleet, "used_bytes"))
    engines = {
        (("artifact", engine.artifact), ("state", engine.state), ("worker", worker.worker)): engine
        for worker in fleet.workers
        for engine in worker.engines
    }
    yield gauge("calm_engine", "Resident models, by state.", dict.fromkeys(engines, 1.0))
    yield gauge("calm_engine_active", "Answers being generated.", {key: e.active for key, e in engines.items()})
    yield gauge("calm_engine_slots", "Answers that fit at once.", {key: e.slots for key, e in engines.items()})
    queues: dict[Labels, float] = {(("artifact", artifact),): float(count) for artifact, count in fleet.queues.items()}
    yield gauge("calm_queue_depth", "Queries dispatched and not yet done.", queues)
    if fleet.counts is not None:
        yield from _counts(fleet.counts)
    if fleet.qos is not None:
        yield from _qos(fleet.qos)
    if fleet.energy is not None:
        yield from _energy(fleet.energy)


def _workers(fleet: Snapshot, name: str) -> dict[Labels, float]:
    return {(("worker", worker.worker),): float(getattr(worker, name)) for worker in fleet.workers}


def _counts(counts: m.Counts) -> Iterator[Family]:
    states = ("accepted", "answered", "failed", "rejected")
    yield counter(
        "calm_queries_total", "Queries of the whole fleet, over all clients.", _named(counts, "state", states)
    )
    yield gauge("calm_queries_in_flight", "Accepted and not yet ended.", counts.in_flight)
    kinds = ("loads", "evictions", "lost")
    yield counter("calm_operations_total", "Models loaded, evicted, and engines lost.", _named(counts, "kind", kinds))


def _named(counts: m.Counts, label: str, names: tuple[str, ...]) -> dict[Labels, float]:
    return {((label, name),): float(getattr(counts, name)) for name in names}


def _qos(qos: m.Qos) -> Iterator[Family]:
    for name, text in (
        ("latency_p50_s", "Latency of recent answers, median."),
        ("latency_p95_s", "Latency of recent answers, 95th percentile."),
        ("ttft_p50_s", "Time to first token of recent answers, median."),
        ("energy_j_mean", "Mean energy of recent answers."),
        ("feedback_mean", "Mean score of recent feedback."),
    ):
        cards = [card for card in qos.cards if name != "feedback_mean" or card.feedback_count]
        values: dict[Labels, float] = {(("card", card.card),): float(getattr(card, name)) for card in cards}
        unit = name.replace("_s", "_seconds") if name.endswith("_s") else name.replace("energy_j", "energy_joules")
        yield gauge(f"calm_card_{unit}", text, values)


def _energy(energy: m.EnergyReports) -> Iterator[Family]:
    joules: dict[Labels, float] = {}
    for worker in energy.workers:
        own = (("source", worker.source), ("worker", worker.worker))
        spent = {
            "idle": worker.idle_j,
            "other": worker.other_j,
            "active": sum(account.active_j for account in worker.accounts),
            "load": sum(account.load_j for account in worker.accounts),
        }
        joules |= {(("account", name), *own): value for name, value in spent.items()}
    yield counter("calm_energy_joules_total", "Energy by worker and account; they add up to its meter.", joules)
