"""Splits a query's time into the parts that its answer reports. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from shared.messages import Timings


def split(
    stamps: Mapping[str, float],
    *,
    engine_ready_at: float,
    slot_open_at: float,
    admitted_at: float,
    first_token_at: float,
    ended_at: float,
) -> Timings:
    """The parts of the time from intake to the last token. All arguments are Unix seconds.

    The clock of a query stands still for the orchestration while it waits for its model (until the engine was
    ready) and for a slot (until this engine had one free and was asking for work; and inside the engine until its
    prompt began to be read), and from the first dispatch to this one (earlier attempts). What is left beside prefill
    and decode is overhead: CALM's own work and the broker's.
    """
    received = stamps["received"]
    dispatched = stamps["dispatched"]
    pulled = stamps["pulled"]
    load_s = max(0.0, min(engine_ready_at, pulled) - dispatched)
    waiting_from = max(dispatched, engine_ready_at)
    queue_s = max(0.0, min(slot_open_at, pulled) - waiting_from) + max(0.0, admitted_at - pulled)
    prefill_s = first_token_at - admitted_at
    decode_s = ended_at - first_token_at
    total_s = ended_at - received
    retried_s = max(0.0, dispatched - stamps.get("first_dispatched", dispatched))
    parts = load_s + queue_s + prefill_s + decode_s + retried_s
    return Timings(
        queue_s=queue_s,
        load_s=load_s,
        prefill_s=prefill_s,
        decode_s=decode_s,
        overhead_s=max(0.0, total_s - parts),  # clocks of several hosts may differ by more than it
        total_s=total_s,
        retried_s=retried_s,
    )
