"""Outcomes folders and traces: read as documented, refused with file, line and remedy."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest

from bench.sim import routers
from bench.sim.data import Outcomes, load_outcomes, load_trace
from bench.sim.split import half_of, split
from shared.errors import DataInvalid

QUERIES = (
    '{"id": 1, "prompt": "one?", "category": "sums"}\n\n{"id": "b", "prompt": "two??", "extra": 3}\n'
    '{"id": 3, "prompt": "three"}\n'
)
OUTCOMES = "query_id,model,answer,correct,output_chars\n1,x,A,1,40\n1,y,,0.25,80\nb,x,,0,8\nb,y,C,0.5,12\n3,x,D,1,4\n"


def folder(tmp_path: Path, queries: str = QUERIES, outcomes: str = OUTCOMES) -> Path:
    (tmp_path / "queries.jsonl").write_text(queries)
    with gzip.open(tmp_path / "outcomes.csv.gz", "wt") as file:
        file.write(outcomes)
    return tmp_path


def test_a_folder_is_read(tmp_path: Path) -> None:
    """Scores may be fractions, a model may be missing for a query, and what could be read is known."""
    found = load_outcomes(folder(tmp_path))
    assert found.ids == ("1", "b", "3")
    assert found.categories == ("sums", None, None)
    assert found.models == ("x", "y")
    np.testing.assert_array_equal(found.score, np.array([[1, 0.25], [0, 0.5], [1, np.nan]], np.float32))
    np.testing.assert_array_equal(found.tokens_out, np.array([[10, 20], [2, 3], [1, np.nan]], np.float32))
    assert found.answered is not None
    assert found.answered.tolist() == [[True, False], [False, True], [True, False]]
    assert found.take([2, 0]).ids == ("3", "1")
    assert found.only(["y"]).score.shape == (3, 1)
    with pytest.raises(DataInvalid, match="no model 'z'"):
        found.only(["z"])


@pytest.mark.parametrize("answers", [None, ""])
def test_answers_may_be_missing(tmp_path: Path, answers: str | None) -> None:
    """Without the column, or with nothing in it, nothing is said about what could be read."""
    rows = ["query_id,model,correct,output_chars" + ("" if answers is None else ",answer")]
    rows += [f"1,x,0.5,4{'' if answers is None else ','}", f"b,x,1,8{'' if answers is None else ','}"]
    found = load_outcomes(folder(tmp_path, outcomes="\n".join(rows) + "\n"))
    assert found.answer is None
    assert found.answered is None


@pytest.mark.parametrize(
    ("queries", "outcomes", "line", "words"),
    [
        (QUERIES + "{oops\n", OUTCOMES, 5, "no query"),
        (QUERIES + '{"id": 9}\n', OUTCOMES, 5, "prompt"),
        (QUERIES + '{"id": "1", "prompt": "again"}\n', OUTCOMES, 5, "was there before"),
        (QUERIES, OUTCOMES + "7,x,A,1,4\n", 7, "no query '7'"),
        (QUERIES, OUTCOMES + "3,y,A,1.5,4\n", 7, "from 0 to 1"),
        (QUERIES, OUTCOMES + "3,y,A,nan,4\n", 7, "from 0 to 1"),
        (QUERIES, OUTCOMES + "3,y,A,1,-4\n", 7, "at least 0"),
        (QUERIES, OUTCOMES + "3,y,A,1\n", 7, "4 cells"),
        (QUERIES, OUTCOMES + "1,x,A,1,4\n", 7, "second outcome"),
        (QUERIES, OUTCOMES + "3,,A,1,4\n", 7, "names no model"),
        (QUERIES, "query_id,model,score\n1,x,1\n", 1, "'correct' is missing"),
        (QUERIES, "query_id,model,correct,output_chars\n", 0, "no outcomes"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, queries: str, outcomes: str, line: int, words: str) -> None:
    """The error says which file, which line, what is wrong, and what to do."""
    with pytest.raises(DataInvalid, match=words) as caught:
        load_outcomes(folder(tmp_path, queries, outcomes))
    assert caught.value.line == line
    assert str(tmp_path) in caught.value.path
    assert caught.value.remedy


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    """An empty folder, and a file that only claims to be gzipped."""
    with pytest.raises(DataInvalid, match=r"neither queries\.jsonl"):
        load_outcomes(tmp_path)
    (tmp_path / "queries.jsonl.gz").write_text("no gzip")
    (tmp_path / "outcomes.csv").write_text(OUTCOMES)
    with pytest.raises(DataInvalid, match="cannot be read"):
        load_outcomes(tmp_path)


def test_a_trace_is_read(tmp_path: Path) -> None:
    """Azure's seven digits of a second, in any order of lines; plain seconds do as well."""
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:50.9951690,396,109\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
    )
    found = load_trace(path)
    np.testing.assert_allclose(found.arrival_s, [0.0, 4.314579], atol=1e-5)
    assert found.tokens_out.tolist() == [44.0, 109.0]
    path.write_text("Timestamp,ContextTokens,GeneratedTokens\n0.5,1,2\n2.0,3,4\n")
    assert load_trace(path).arrival_s.tolist() == [0.0, 1.5]
    path.write_text("Timestamp,ContextTokens,GeneratedTokens\nyesterday,1,2\n")
    with pytest.raises(DataInvalid, match="yesterday") as caught:
        load_trace(path)
    assert caught.value.line == 2


def test_a_split_loses_nothing(tmp_path: Path) -> None:
    """Every query is in one half, by its id alone, with all that was known of it."""
    source = folder(tmp_path)
    counts = split(source, (tmp_path / "a", tmp_path / "b"))
    assert sum(counts) == 3
    whole = load_outcomes(source)
    for half, name in enumerate("ab"):
        if counts[half]:
            part = load_outcomes(tmp_path / name)
            assert all(half_of(i) == half for i in part.ids)
            rows = [whole.ids.index(i) for i in part.ids]
            np.testing.assert_array_equal(part.score, whole.take(rows).only(part.models).score)


def test_a_split_by_share_gives_about_that_share_and_halves_are_as_they_were() -> None:
    parts = [half_of(f"q{i}", share=0.8) for i in range(4000)]
    assert sum(part == 0 for part in parts) == pytest.approx(3200, abs=100)
    halves = [half_of(f"q{i}", "salt") for i in range(200)]
    assert halves == [hashlib.sha256(f"saltq{i}".encode()).digest()[0] & 1 for i in range(200)]
    with pytest.raises(DataInvalid, match="share"):
        split(Path("nowhere"), (Path("a"), Path("b")), share=1.0)


def recorded(tmp_path: Path, n: int = 240) -> tuple[Outcomes, np.ndarray]:
    """Outcomes of three models, two of them good at one of two categories; and embeddings that tell these apart."""
    rng = np.random.default_rng(0)
    kind = rng.integers(2, size=n)
    queries = [f'{{"id": {i}, "prompt": "q{i}", "category": "{"ab"[k]}"}}' for i, k in enumerate(kind)]
    rows = ["query_id,model,correct,output_chars"]
    for i, k in enumerate(kind):
        for name, chance in zip(("first", "second", "big"), ((0.8, 0.3, 0.9), (0.2, 0.7, 0.9))[k], strict=True):
            rows.append(f"{i},{name},{int(rng.random() < chance)},{400 if name == 'big' else 100}")
    x = np.eye(8)[kind] + 0.2 * rng.normal(size=(n, 8))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return load_outcomes(folder(tmp_path, "\n".join(queries) + "\n", "\n".join(rows) + "\n")), x


def test_every_router_routes(tmp_path: Path) -> None:
    """Those that look at the query find the better small model for each kind; the others do what their name says."""
    outcomes, x = recorded(tmp_path)
    small = outcomes.only(["first", "second"])
    best = np.array([{"a": 0, "b": 1}[str(c)] for c in outcomes.categories])
    looking: list[routers.Router] = [
        routers.CategoryBest(), routers.Knn(), routers.Ridge(), routers.Calm(), routers.LinUcb(small.models, x),
        routers.Semantic({"first": np.eye(8)[0], "second": np.eye(8)[1]}),
    ]  # fmt: skip
    for router in looking:
        router.fit(small, x)
        assert (router.scores(small, x).argmax(1) == best).mean() > 0.95, router.name
    for router in (routers.Single(), routers.Single("second"), routers.RoundRobin(), routers.Random(1)):
        router.fit(small, x)
        shares = np.bincount(router.scores(small, x).argmax(1), minlength=2) / len(small)
        expected = {"best-single": 1.0, "single:second": 1.0, "round-robin": 0.5, "random": 0.5}[router.name]
        assert shares.max() == pytest.approx(expected, abs=0.1), router.name
    win = routers.WinRate("big")
    win.fit(outcomes, x)
    assert (win.scores(outcomes, x)[:, 2] > win.scores(outcomes, x)[:, 1]).any()


def test_linucb_learns_from_its_own_choices(tmp_path: Path) -> None:
    """Fed the outcome of what it chose, it comes to choose well."""
    outcomes, x = recorded(tmp_path)
    small = outcomes.only(["first", "second"])
    router = routers.LinUcb(small.models, x)
    for row in range(len(x)):
        model = router.choose(x[row])
        router.observe(x[row], model, float(small.score[row, model]))
    best = np.array([{"a": 0, "b": 1}[str(c)] for c in outcomes.categories])
    assert (router.scores(small, x).argmax(1) == best).mean() > 0.9
