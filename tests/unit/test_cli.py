"""The command line: options, what is shown, and what is restarted when."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec
import pytest

from services.cli import ask, explain, status
from services.cli.decide import FIRST_S, LONGEST_S, STEADY_S, History, after_end
from services.cli.options import parser, settings_of, url_file
from shared import messages as m
from shared.errors import InvalidQuery
from shared.models.fleet_file import load_fleet
from shared.models.pull import wanted_by
from shared.settings import Settings, parse_bytes
from tests.samples import engine, spec, worker


def _arguments(*words: str) -> argparse.Namespace:
    return parser().parse_args(words)


def test_ask_s_options_become_the_query() -> None:
    """Each option of `calm ask` lands in its field; a system prompt makes it a conversation."""
    words = ("ask", "hi", "--model", "a", "--max-tokens", "9", "--prefer", "energy", "--max-energy", "5", "--tag", "x")
    query = ask.query_of(_arguments(*words), "hi", "id1")
    assert (query.prompt, query.model, query.max_tokens, query.stream) == ("hi", "a", 9, True)
    assert query.constraints == m.Constraints(max_energy_j=5.0, tags=["x"])
    assert query.preference.energy is not None
    assert query.preference.latency is not None
    assert query.preference.energy > query.preference.latency
    talk = ask.query_of(_arguments("ask", "hi", "--system", "be brief", "--no-stream"), "hi", "id1")
    assert talk.prompt is None
    assert [t.role for t in talk.messages or []] == ["system", "user"]
    assert talk.stream is False


@pytest.mark.parametrize(
    ("what", "expect"),
    [
        ("choice:A, B", m.ExpectChoice(of=["A", "B"])),
        ("number", m.ExpectNumber()),
        ("json", m.ExpectJson()),
        ("json:name,age", m.ExpectJson(keys=["name", "age"])),
        ("contains:SELECT", m.ExpectContains(any_of=["SELECT"])),
    ],
)
def test_ask_s_expectation_becomes_the_query_s(what: str, expect: m.Expect) -> None:
    query = ask.query_of(_arguments("ask", "hi", "--expect", what, "--retries", "2"), "hi", "id1")
    assert (query.expect, query.retries) == (expect, 2)


@pytest.mark.parametrize("what", ["choice", "choice:A", "regex:a+", "contains"])
def test_an_expectation_that_ask_does_not_understand_is_refused_with_what_to_write(what: str) -> None:
    with pytest.raises(InvalidQuery, match="choice:A,B,C"):
        ask.expected(what)


def test_a_local_system_is_found_by_its_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--nats comes first, then CALM_NATS_URL, then the address that `calm up` left in its home."""
    monkeypatch.delenv("CALM_NATS_URL", raising=False)
    monkeypatch.setenv("CALM_HOME", str(tmp_path))
    assert settings_of(_arguments("status")).nats_url == Settings.nats_url
    url_file(tmp_path).parent.mkdir()
    url_file(tmp_path).write_text("nats://127.0.0.1:5555")
    assert settings_of(_arguments("status")).nats_url == "nats://127.0.0.1:5555"
    monkeypatch.setenv("CALM_NATS_URL", "nats://elsewhere:1")
    assert settings_of(_arguments("status")).nats_url == "nats://elsewhere:1"
    assert settings_of(_arguments("status", "--nats", "nats://named:2")).nats_url == "nats://named:2"


def test_restarts_wait_longer_each_time_until_steady() -> None:
    """A service that ends again and again waits longer each time; one that ran for long starts afresh."""
    wait, history = after_end(History(), 1.0)
    assert wait == FIRST_S
    waits = []
    for _ in range(10):
        wait, history = after_end(history, 1.0)
        waits.append(wait)
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_S
    wait, history = after_end(history, STEADY_S)
    assert wait == FIRST_S
    assert history.restarts == 12


def _answer(source: str = "model") -> m.Answer:
    return m.Answer(
        id="q1", text="t", model="card", artifact="a-int8", worker="w1", finish_reason="stop",
        usage=m.Usage(tokens_in=3, tokens_out=11), attempt=1, why="because",
        timings=m.Timings(queue_s=0.0, load_s=0.7, prefill_s=0.1, decode_s=1.0, overhead_s=0.005, total_s=1.805),
        energy=m.Energy(joules=12.34, source=source),  # type: ignore[arg-type]
        confidence=m.Confidence(mean_logprob=-0.5, min_logprob=-2.0, mean_entropy=1.0),
    )  # fmt: skip


def test_the_summary_of_an_answer_names_what_matters() -> None:
    """Model, worker, speed, energy and whether that is an estimate, waiting, why, and the id."""
    text = ask.summary(_answer(), 0.25, 1.9)
    assert "card on w1: first token 0.25 s, 1.90 s in all, 11 tokens, 10 tokens/s, 12.3 J (estimated)" in text
    assert "waited 0.70 s for the model to load" in text
    assert text.endswith("because\nquery q1")
    assert "estimated" not in ask.summary(_answer("nvml"), None, 1.9)


def test_explain_shows_every_candidate_with_its_terms() -> None:
    """Chosen and excluded cards, weights, what would have flipped it, and how it ended."""
    good = m.Candidate(
        card="good", artifact="a", utility=0.5, quality=0.6, latency_s=1.0, energy_j=2.0, terms={"fit": 1.1}
    )
    out = m.Candidate(card="out", artifact="b", excluded="lacks_tag")
    route = m.Route(
        query_id="q1", order=["good"], candidates=[out, good], reason="only_candidate", why="why",
        weights={"w_q": 1.0, "w_l": 0.5, "w_e": 0.1, "latency_slo_s": 4.0, "energy_ref_j": 10.0},
        flip="x would have been chosen with more", domains={"law": 0.9},
    )  # fmt: skip
    done = m.Done(query_id="q1", answer=_answer(), stamps={"received": 1.0, "planned": 1.5})
    record = m.QueryRecord(query_id="q1", state="answered", query=m.Query(prompt="hello"), route=route, done=done)
    text = explain.render(record)
    for part in ("good", "fit 1.1", "excluded: lacks_tag", "w_q 1", "law 0.90", "x would have", "planned +500.0 ms"):
        assert part in text
    assert text.index("good ") < text.index("out ")


def test_explain_tells_what_the_choice_came_to() -> None:
    """Realised utility against what was promised, and the regret against the best other candidate's promise."""
    weights = {"w_q": 1.0, "w_l": 0.0, "w_e": 0.0, "latency_slo_s": 4.0, "energy_ref_j": 10.0}
    candidates = [m.Candidate(card=card, artifact="a", quality=q) for card, q in (("good", 0.6), ("next", 0.5))]
    candidates.append(m.Candidate(card="best", artifact="b", quality=0.9, excluded="lacks_tag"))
    route = m.Route(
        query_id="q1", order=["good", "next"], candidates=candidates, reason="best_utility", weights=weights
    )  # fmt: skip
    record = m.QueryRecord(query_id="q1", state="answered", route=route, done=m.Done(query_id="q1", answer=_answer()))

    def told(score: float | None) -> str:
        feedback = [] if score is None else [m.Feedback(query_id="q1", score=score)]
        return explain.render(msgspec.structs.replace(record, feedback=feedback))

    assert "utility 0.200 (quality 0.20, judged), where 0.600 was promised; regret 0.300: next promised 0.500" in told(
        0.2
    )
    assert "no regret: next, the next best, promised 0.500" in told(0.8)
    assert "quality 0.60, predicted, not judged" in told(None)


def test_status_shows_workers_models_and_operations() -> None:
    """Memory, slots, queues, counts, and each load and eviction with its reason."""
    snapshot = status.Snapshot(
        workers=[worker(engines=[engine(spec(), active=2)])],
        queues={"a-int8": 3},
        counts=m.Counts(accepted=5, answered=4, failed=1, by_card={"card": 4}, failures={"cancelled": 1}, loads=1),
        operations=[
            m.Operation(op_id="o", kind="load", worker="w1", artifact="a-int8", ok=True, reason="demand"),
            m.Operation(
                op_id="p",
                kind="evict",
                worker="w1",
                artifact="b-int8",
                ok=True,
                reason="idle",
                seconds=0.1,
                held_bytes=200_000_000,
                freed_bytes=195_000_000,
            ),
        ],
    )
    text = status.render(snapshot)
    for part in ("a-int8", "2/4 slots", "queues: a-int8 3", "5 accepted, 4 answered", "cancelled 1", "demand"):
        assert part in text
    assert "gave back 195 MB of 200 MB" in text


@pytest.mark.parametrize("name", ["embedded", "starter"])
def test_the_fleets_that_we_ship_are_valid(name: str) -> None:
    """Both load, and every card's model and variant is fetched; states what its models need."""
    fleet = load_fleet(name)
    fetched = {(w.name, v) for w in wanted_by(fleet) for v in w.variants}
    assert {(c.model, c.variant) for c in fleet.cards} <= fetched
    if name == "starter":
        assert all(model.memory and parse_bytes(model.memory) > 0 for model in fleet.models)
    else:
        assert len(fleet.cards) >= 4


def test_sizes_are_read_with_their_units() -> None:
    """Decimal and binary units, plain numbers; anything else is refused."""
    assert parse_bytes("1.5 GB") == 1_500_000_000
    assert parse_bytes("2GiB") == 2 * 2**30
    assert parse_bytes(7) == 7
    with pytest.raises(ValueError, match="not a size"):
        parse_bytes("lots")
