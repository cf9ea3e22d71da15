"""`calm explain`: a decision with every candidate, its terms, and what would have changed it."""

from __future__ import annotations

import math

from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus
from shared.errors import NotFound
from shared.settings import Settings
from shared.utility import utility

_STEPS = ("received", "accepted", "analyzed", "planned", "dispatched", "pulled", "admitted", "first_token", "generated")


async def explain(query_id: str | None, settings: Settings, *, as_json: bool) -> int:
    """Print what is known about a query (the latest one when no id is given)."""
    bus = await Bus.connect(settings, "calm-explain", wait=False)
    try:
        if query_id is None:
            ask = m.KnowledgeRequest(limit=1)
            recent = await bus.ask(subjects.knowledge("recent"), ask, m.QueryRecords, 5.0)
            if not recent.records:
                raise NotFound("No query has been recorded yet.", 'Ask one: calm ask "..."')
            query_id = recent.records[0].query_id
        record = await bus.ask(subjects.knowledge("query"), m.KnowledgeRequest(id=query_id), m.QueryRecord, 5.0)
    finally:
        await bus.close()
    print(codec.to_json(record).decode() if as_json else render(record))
    return 0


def render(record: m.QueryRecord) -> str:
    """The record as text."""
    lines = [f"query {record.query_id}: {record.state}"]
    if record.query is not None:
        prompt = record.query.prompt or (record.query.messages or [m.ChatMessage(role="user", content="")])[-1].content
        lines.append(f"  {prompt[:160]!r}")
    if record.route is not None:
        lines += _route(record.route)
    if record.done is not None:
        lines += _end(record.done)
    if record.route is not None and record.done is not None and record.done.answer is not None:
        lines += _realised(record.route, record.done.answer, record.feedback)
    lines += [f"feedback {f.score:g}" + (f" ({f.label})" if f.label else "") for f in record.feedback]
    return "\n".join(lines)


def _route(route: m.Route) -> list[str]:
    weights = ", ".join(f"{name} {value:.3g}" for name, value in route.weights.items())
    domains = sorted(route.domains.items(), key=lambda item: -item[1])[:3]
    lines = [
        "",
        f"decision: {route.reason} - {route.why}",
        f"  by {route.planner} in {route.decided_in_s * 1e3:.2f} ms, knowledge version {route.knowledge_version},"
        f" learned version {route.learned_version or 'none'}, propensity {route.propensity:.3f}",
        f"  weights: {weights}"
        + (f", for objectives version {route.objectives_version}" if route.objectives_version else ""),
        "  domains: " + ", ".join(f"{name} {p:.2f}" for name, p in domains),
    ]
    if route.trial is not None:
        lines.append(
            f"  trial {route.trial.version}: its weights prefer {route.trial.candidate}, those in force"
            f" {route.trial.present}"
        )
    if route.flip:
        lines.append(f"  {route.flip}")
    if route.patience:
        told = ", ".join(f"{card} after {tokens}" for card, tokens in route.patience.items())
        lines.append(f"  cut off, where another card may be asked then: {told} tokens")
    lines += _cascade(route)
    lines += ["", f"  {'card':22}{'artifact':24}{'utility':>8}{'quality':>9}{'latency':>10}{'energy':>9}"]
    order = {card: rank for rank, card in enumerate(route.order)}
    for c in sorted(route.candidates, key=lambda c: order.get(c.card, 999)):
        if c.excluded:
            lines.append(f"  {c.card:22}{c.artifact:24}  excluded: {c.excluded}")
        else:
            lines.append(
                f"  {c.card:22}{c.artifact:24}{c.utility:8.3f}{c.quality:9.3f}{c.latency_s:8.2f} s{c.energy_j:7.1f} J"
            )
        terms = ", ".join(f"{name} {value:.3g}" for name, value in c.terms.items())
        if terms:
            lines.append(f"      {terms}")
    return lines


def _realised(route: m.Route, answer: m.Answer, feedback: list[m.Feedback]) -> list[str]:
    """What the choice came to, and what was lost by it: the realised regret. Of others only their promise is known."""
    promised = {
        c.card: utility(c.quality, c.latency_s, c.energy_j, route.weights) for c in route.candidates if not c.excluded
    }
    if not route.order or route.order[0] not in promised:
        return []
    chosen = next(c for c in route.candidates if c.card == route.order[0])
    score, how = (feedback[0].score, "judged") if feedback else (chosen.quality, "predicted, not judged")
    came = utility(score, answer.timings.total_s, answer.energy.joules, route.weights)
    line = (
        f"as it came: utility {came:.3f} (quality {score:.2f}, {how}), where {promised[chosen.card]:.3f} was promised"
    )
    others = {card: value for card, value in promised.items() if card != chosen.card}
    if not others:
        return [line]
    best = max(others, key=lambda card: others[card])
    regret = others[best] - came
    told = f"regret {regret:.3f}: {best}" if regret > 0.0 else f"no regret: {best}, the next best,"
    return [f"{line}; {told} promised {others[best]:.3f}"]


def _passed(one: m.Unread) -> str:
    if one.readable is False:
        return f"nothing readable ({one.why.replace('_', ' ')})"
    known = [f"right with a chance of {one.chance:.2f}"] if one.chance is not None else []
    known += [f"read: {one.value}"] if one.value is not None else []
    return ", ".join(known) or "less likely right"


def _cascade(route: m.Route) -> list[str]:
    lines = []
    for rank, step in enumerate(route.cascade):
        asked = "" if rank == 0 else f"asked with probability {step.reached:.2f}, "
        below = f"; below {step.below:.2f}{_surety(step)} {route.order[rank + 1]} is asked" if step.below else ""
        lines.append(f"  cascade: {route.order[rank]}, {asked}right with a chance of {step.chance:.2f}{below}")
    return lines


def _surety(step: m.CascadeStep) -> str:
    """The mean log-probability at which an answer's chance is the step's limit."""
    if not step.slope or not 0.0 < step.below < 1.0:
        return ""
    return f" (mean log-probability {(math.log(step.below / (1.0 - step.below)) - step.level) / step.slope:.2f})"


def _end(done: m.Done) -> list[str]:
    lines = [""]
    if done.failure is not None:
        lines.append(f"ended as {done.failure.code}: {done.failure.message} {done.failure.remedy}")
    if done.answer is not None:
        a, t = done.answer, done.answer.timings
        estimated = " estimated" if a.energy.estimated else ""
        lines += [
            f"answered by {a.model} on {a.worker} (attempt {a.attempt}): {a.usage.tokens_in} tokens in,"
            f" {a.usage.tokens_out} out, {a.energy.joules:.1f} J{estimated}, mean log-probability"
            f" {a.confidence.mean_logprob:.2f}",
            f"  load {t.load_s:.3f} s, queue {t.queue_s:.3f} s, prefill {t.prefill_s:.3f} s,"
            f" decode {t.decode_s:.3f} s, overhead {t.overhead_s:.4f} s,"
            + (f" other attempts {t.retried_s:.3f} s," if t.retried_s else "")
            + f" total {t.total_s:.3f} s",
        ]
        if a.chance is not None:
            lines.append(f"  right with a chance of {a.chance:.2f}")
        if a.reading is not None:
            read = "not readable" if a.reading.value is None else f"read: {a.reading.value[:200]}"
            lines.append(f"  {read} ({a.reading.why.replace('_', ' ')})")
    lines += [
        f"  not given: {one.card} on {one.worker}: {_passed(one)}, in"
        f" {one.seconds:.2f} s, {one.tokens_out} tokens, {one.energy_j:.1f} J: ...{one.text[-80:]!r}"
        for one in done.unread
    ]
    present = [(name, done.stamps[name]) for name in _STEPS if name in done.stamps]
    if present:
        start = present[0][1]
        lines.append("  " + ", ".join(f"{name} +{(at - start) * 1e3:.1f} ms" for name, at in present))
    return lines
