"""From our answers, errors, keys and figures to what HTTP says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.decide import board, keys, problem, prometheus, response
from services.gateway.decide.request import Asked
from services.gateway.fleet import Snapshot
from services.gateway.metrics import Metrics
from shared import errors, listening
from shared import messages as m
from tests import samples

ASKED = Asked(query=m.Query(prompt="x", id="q1"))
AS_JSON = Asked(query=m.Query(prompt="x", id="q1"), json_object=True)


def answer(text: str = "yes", **more: Any) -> m.Answer:
    return m.Answer(
        id="q1", text=text, model="small", artifact="a-int8", worker="w1", attempt=1, why="Best.",
        **{"finish_reason": "stop", **more},
        usage=m.Usage(tokens_in=5, tokens_out=3, tokens_cached=2),
        timings=m.Timings(queue_s=0, load_s=0, prefill_s=0.1, decode_s=0.2, overhead_s=0.01, total_s=0.31),
        energy=m.Energy(joules=1.5, source="model"),
        confidence=m.Confidence(mean_logprob=-0.1, min_logprob=-1.0, mean_entropy=0.2),
    )  # fmt: skip


def test_a_completion_holds_all_of_the_answer() -> None:
    """What OpenAI's JSON has a place for stands there, the rest in `calm`."""
    whole = json.loads(response.whole("chat", answer(finish_reason="length"), ASKED, 1700000000))
    assert whole["choices"] == [{
        "index": 0, "finish_reason": "length", "logprobs": None,
        "message": {"role": "assistant", "content": "yes", "refusal": None},
    }]  # fmt: skip
    assert (whole["id"], whole["object"], whole["created"]) == ("q1", "chat.completion", 1700000000)
    assert (whole["model"], whole["system_fingerprint"]) == ("small", "a-int8")
    assert whole["usage"] == {
        "prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8, "prompt_tokens_details": {"cached_tokens": 2}
    }  # fmt: skip
    assert set(whole["calm"]) == {
        "id", "model", "artifact", "worker", "timings", "energy", "confidence", "attempt", "why", "reading", "chance",
        "passed_over",
    }  # fmt: skip
    older = json.loads(response.whole("text", answer(), ASKED, 0))
    assert (older["object"], older["choices"][0]["text"]) == ("text_completion", "yes")


def test_an_answer_that_is_to_be_json_is_the_json_that_was_read() -> None:
    """The prose around it stays in `calm.text`; where nothing could be read the text is given as it is."""
    read = answer('Here: {"a": 1}.', reading=m.Reading(value='{"a": 1}', why="within"))
    whole = json.loads(response.whole("chat", read, AS_JSON, 0))
    assert whole["choices"][0]["message"]["content"] == '{"a": 1}'
    assert whole["calm"]["text"] == 'Here: {"a": 1}.'
    assert response.content(read, ASKED) == 'Here: {"a": 1}.'
    unread = answer("No.", reading=m.Reading(value=None, why="no_json"))
    assert response.content(unread, AS_JSON) == "No."


@pytest.mark.parametrize("kind", ["chat", "text"])
@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_s_events(kind: response.Kind, include_usage: bool) -> None:
    """The role once, the finish reason last, usage behind it where it was asked for, then the end."""
    events = response.Events(kind, "q1", 7, include_usage)
    data = events.text("ye", "small", first=True) + events.text("s", "small", first=False) + events.end(answer(), "yes")
    *lines, done = [line.removeprefix("data: ") for line in data.decode().split("\n\n") if line]
    assert done == "[DONE]"
    told = [json.loads(line) for line in lines]
    assert {(t["id"], t["created"], t["model"]) for t in told} == {("q1", 7, "small")}
    assert all(("usage" in t) == include_usage for t in told)
    if include_usage:
        assert told[-1]["choices"] == []
        assert told.pop()["usage"]["total_tokens"] == 8
    if kind == "chat":
        assert [t["choices"][0]["delta"] for t in told] == [
            {"role": "assistant", "content": "ye"},
            {"content": "s"},
            {},
        ]
    else:
        assert [t["choices"][0]["text"] for t in told] == ["ye", "s", ""]
    assert [t["choices"][0]["finish_reason"] for t in told] == [None, None, "stop"]
    assert told[-1]["calm"]["model"] == "small"


@given(st.text())
def test_no_text_breaks_an_event(text: str) -> None:
    """Line ends inside a text are escaped: an event is one line."""
    data = response.Events("chat", "q", 0, include_usage=False).text(text, "m", first=False)
    assert data.count(b"\n") == 2
    assert json.loads(data.removeprefix(b"data: "))["choices"][0]["delta"]["content"] == text


def _every_error(kind: type[errors.CalmError]) -> list[type[errors.CalmError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _every_error(child))]


def test_every_error_that_a_query_can_end_in_has_a_status() -> None:
    """Of the tree in shared/errors.py all that clients may meet; no error is a success."""
    for kind in (
        *_every_error(errors.BadRequest),
        *_every_error(errors.Unserved),
        errors.NotReady,
        errors.BusUnavailable,
    ):
        assert kind.code in problem.STATUS or kind is errors.Unserved, kind
    for kind in _every_error(errors.CalmError):
        told = problem.of_error(kind("Message.", "Remedy."))
        assert told.status >= 400
        error = told.body["error"]
        assert (error["message"], error["code"], error["remedy"]) == ("Message. Remedy.", kind.code, "Remedy.")
        assert ("Retry-After" in told.headers) == (told.status == 503)


def test_clients_are_told_what_is_worth_repeating() -> None:
    """OpenAI's clients repeat any 5xx by themselves: a deadline that has passed, and what is at fault itself, are not
    to be."""
    for code, retryable, again in (
        ("overloaded", True, "true"), ("not_ready", True, "true"), ("engine_failed", True, "true"),
        ("deadline_expired", True, "false"), ("cancelled", False, "false"), ("invalid_query", False, "false"),
    ):  # fmt: skip
        told = problem.of_failure(m.Failure(code=code, message="m", retryable=retryable))
        assert told.headers["x-should-retry"] == again, code


def test_what_fails_inside_says_nothing_of_it() -> None:
    """A status of 500 has no more than where to look."""
    told = problem.of_status(500, "Traceback")
    assert "Traceback" not in json.dumps(told.body)


def test_models_are_routing_and_the_cards() -> None:
    """Routing first; a card of the same name stands in its place."""
    listed = response.models([samples.card("b"), samples.card("a", tags=["t"])])
    assert [entry["id"] for entry in listed] == ["calm", "a", "b"]
    assert listed[1]["calm"]["tags"] == ["t"]
    assert [entry["id"] for entry in response.models([samples.card("calm")])] == ["calm"]


def test_keys_are_read_from_lists_and_files_and_compared_whole() -> None:
    """Commas, lines, blanks and remarks; only a whole key with the right scheme is let in."""
    known = keys.digests(" a, b ,", "# remark, x\nc\n\n d \n")
    assert len(known) == 4
    for key in "abcd":
        assert keys.allowed(f"Bearer {key}", known)
        assert keys.allowed(f"bearer  {key} ", known)
    for header in (None, "", "Bearer", "Bearer ", "Bearer x", "Bearer a, b", "Basic a", "a", "Bearer \udcff"):
        assert not keys.allowed(header, known), header
    assert keys.digests("", " , \n#\n") == frozenset()


@pytest.mark.parametrize(
    ("text", "address", "url"),
    [
        ("127.0.0.1:8484", ("127.0.0.1", 8484), "http://127.0.0.1:8484"),
        ("0.0.0.0:80", ("0.0.0.0", 80), "http://127.0.0.1:80"),
        (":80", ("0.0.0.0", 80), "http://127.0.0.1:80"),
        ("8484", ("127.0.0.1", 8484), "http://127.0.0.1:8484"),
        ("[::1]:0", ("::1", 0), "http://[::1]:0"),
        ("my-host:99", ("my-host", 99), "http://my-host:99"),
    ],
)
def test_addresses_to_listen_on(text: str, address: tuple[str, int], url: str) -> None:
    """As people write them, and as a client finds them."""
    assert listening.parse(text) == address
    assert listening.url(*address) == url


@pytest.mark.parametrize("text", ["", "host", "host:", "host:x", "host:70000", "http://host:1", "a b:1", "host:-1"])
def test_what_is_no_address_is_told(text: str) -> None:
    """With what to write instead."""
    with pytest.raises(errors.SettingsInvalid, match="HOST:PORT"):
        listening.parse(text)


def test_a_histogram_counts_what_lies_at_or_below_each_bound() -> None:
    """Prometheus' buckets are cumulative, and the last holds everything."""
    histogram = prometheus.Histogram("h", "H.", "route")
    for seconds in (0.005, 0.006, 500.0):
        histogram.add("/x", seconds)
    lines = prometheus.render([histogram.family()]).splitlines()
    assert 'h_bucket{route="/x",le="0.005"} 1' in lines
    assert 'h_bucket{route="/x",le="0.01"} 2' in lines
    assert 'h_bucket{route="/x",le="120"} 2' in lines
    assert 'h_bucket{route="/x",le="+Inf"} 3' in lines
    assert 'h_count{route="/x"} 3' in lines


def test_labels_are_quoted() -> None:
    """Quotes, backslashes and line ends of a label do not break the line."""
    family = prometheus.gauge("g", "G.", {(("a", 'x"\\\n'),): 1.5})
    assert prometheus.render([family]).splitlines()[-1] == 'g{a="x\\"\\\\\\n"} 1.5'


def test_the_fleet_s_figures_stand_in_the_metrics() -> None:
    """Workers, models, queues, counts, quality of service and joules, each once."""
    worker = samples.worker(engines=[samples.engine(samples.spec(), active=2)])
    ledger = m.EnergyReport(
        worker="w1", total_j=10.0, idle_j=4.0, accounts=[m.EnergyAccount(artifact="a-int8", active_j=5.0, load_j=1.0)]
    )
    snapshot = Snapshot(
        workers=[worker], queues={"a-int8": 3}, counts=m.Counts(accepted=7, answered=5, loads=2),
        qos=m.Qos(cards=[m.CardQos(card="small", latency_p95_s=1.25, energy_j_mean=3.0)]),
        energy=m.EnergyReports(workers=[ledger]),
        services=[m.Heartbeat(service="planner", instance="p", state="ready")],
    )  # fmt: skip
    metrics = Metrics()
    metrics.answered(answer())
    metrics.requests.add("/v1/models", "200")
    lines = metrics.render(snapshot, ready=True).splitlines()
    for line in (
        "calm_ready 1", "calm_workers 1", 'calm_engine_active{artifact="a-int8",state="ready",worker="w1"} 2',
        'calm_queue_depth{artifact="a-int8"} 3', 'calm_queries_total{state="accepted"} 7',
        'calm_operations_total{kind="loads"} 2', 'calm_card_latency_p95_seconds{card="small"} 1.25',
        'calm_card_energy_joules_mean{card="small"} 3',
        'calm_energy_joules_total{account="active",source="model",worker="w1"} 5',
        'calm_services{service="planner",state="ready"} 1', 'calm_http_tokens_total{model="small",kind="completion"} 3',
        'calm_http_energy_joules_total{model="small",source="model"} 1.5',
        'calm_http_requests_total{route="/v1/models",status="200"} 1',
    ):  # fmt: skip
        assert line in lines, line
    named = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(named) == len(set(named))


def _record(**more: Any) -> m.QueryRecord:
    return m.QueryRecord(
        query_id="q1", received_at=5.0, query=m.Query(prompt="SECRET"), **{"state": "answered", **more}
    )  # fmt: skip


def test_the_dashboard_shows_the_fleet_and_no_words_of_its_users() -> None:
    """Workers with their models, all cards, joules by account, decisions; neither questions nor answers."""
    done = m.Done(query_id="q1", answer=answer("SECRET"))
    failed = m.Done(query_id="q1", failure=m.Failure(code="engine_failed", message="x"))
    ledger = m.EnergyReport(worker="w1", source="model", total_j=9.0, idle_j=3.0)
    shown = board.fleet(
        missing="",
        services=[m.Heartbeat(service="planner", instance="p", state="ready")],
        workers=[samples.worker(engines=[samples.engine(samples.spec(), tpot_s=0.01)])],
        cards=[samples.card("small"), samples.card("idle")],
        queues={"a-int8": 2},
        counts=m.Counts(by_card={"small": 4}),
        qos=m.Qos(cards=[m.CardQos(card="small", answered=4)]),
        energy=m.EnergyReports(workers=[ledger]),
        recent=[
            _record(done=done, feedback=[m.Feedback(query_id="q1", score=0.5)]),
            _record(state="failed", done=failed),
            _record(state="accepted"),
        ],
        at=7.0,
    )
    assert "SECRET" not in json.dumps(shown)
    assert shown["workers"][0]["engines"][0]["tokens_per_s"] == pytest.approx(100.0)
    assert [(one["card"], one["answered_in_all"]) for one in shown["models"]] == [("idle", 0), ("small", 4)]
    assert shown["counts"]["in_flight"] == 0  # what is nought is told as well
    assert shown["models"][1]["recent"]["feedback_count"] == 0
    answered, lost, waiting = shown["decisions"]
    assert (answered["model"], answered["why"], answered["energy_j"], answered["feedback"]) == (
        "small",
        "Best.",
        1.5,
        [0.5],
    )
    assert (lost["error"], lost["latency_s"]) == ("engine_failed", None)
    assert (waiting["state"], waiting["model"]) == ("accepted", "")
    nothing = board.fleet(
        missing="x", services=[], workers=[], cards=[], queues={}, counts=None, qos=None, energy=None, recent=[], at=0.0
    )  # fmt: skip
    assert (nothing["counts"], nothing["energy"], nothing["missing"]) == (None, [], "x")


def test_an_explanation_has_every_candidate_in_the_order_of_the_route_and_no_words() -> None:
    """What stood, what was excluded, what would have changed the choice."""
    route = m.Route(
        query_id="q1", order=["b", "a"], reason="best_utility", why="b is best.", flip="If a were quicker.",
        candidates=[m.Candidate(card="c", artifact="x", excluded="tags"), m.Candidate(card="a", artifact="x"),
                    m.Candidate(card="b", artifact="x", utility=0.5)],
        embedding=b"1234", domains={"law": 0.1, "code": 0.9},
    )  # fmt: skip
    told = board.explained(_record(route=route, done=m.Done(query_id="q1", answer=answer("SECRET"))))
    assert [one["card"] for one in told["candidates"]] == ["b", "a", "c"]
    assert told["candidates"][2]["excluded"] == "tags"
    assert (told["why"], told["flip"], told["worker"]) == ("b is best.", "If a were quicker.", "w1")
    assert "SECRET" not in json.dumps(told)
    assert board.explained(_record(state="accepted"))["state"] == "accepted"
