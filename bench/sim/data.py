"""Recorded outcomes of real models on real queries, and recorded arrivals: what the simulator replays.

An outcomes folder holds two files, plain or gzipped:

- `queries.jsonl`: one object a line with `id` and `prompt`; `category` and `answer` (the right one) are optional.
- `outcomes.csv`: columns `query_id`, `model`, `correct` (a score from 0 to 1) and `output_chars`; `answer` (what was
  read from the output, empty when nothing could be) is optional.

A trace is a CSV file as published with the Azure LLM inference traces: `TIMESTAMP,ContextTokens,GeneratedTokens`.

    outcomes = load_outcomes(Path("outcomes"))
    features = embed(outcomes.prompts)          # bench.sim.embed
    trace = load_trace(Path("trace.csv"))
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.errors import DataInvalid

CHARS_PER_TOKEN = 4.0
"""Characters of English text per token, about; outcomes record characters."""

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Outcomes:
    """What n queries got from k models."""

    ids: tuple[str, ...]
    prompts: tuple[str, ...]
    categories: tuple[str | None, ...]
    models: tuple[str, ...]
    score: Floats
    """[n, k], 0 to 1; NaN where this model was not asked."""
    answer: NDArray[np.str_] | None
    """[n, k], what was read from the output; None when the file does not say."""
    answered: Bools | None
    """[n, k], whether an answer could be read: can be seen at run time. None when the file does not say."""
    tokens_in: Floats
    """[n], of the prompt."""
    tokens_out: Floats
    """[n, k]; NaN where this model was not asked."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int] | NDArray[Any]) -> Outcomes:
        """The queries at `rows` (indices or a mask), in that order."""
        index = np.arange(len(self))[np.asarray(rows)]
        return Outcomes(
            ids=tuple(self.ids[i] for i in index),
            prompts=tuple(self.prompts[i] for i in index),
            categories=tuple(self.categories[i] for i in index),
            models=self.models,
            score=self.score[index],
            answer=None if self.answer is None else self.answer[index],
            answered=None if self.answered is None else self.answered[index],
            tokens_in=self.tokens_in[index],
            tokens_out=self.tokens_out[index],
        )

    def only(self, models: Sequence[str]) -> Outcomes:
        """The same queries with these models' columns, in this order.

        Raises:
            DataInvalid: a model is not in the outcomes.
        """
        for name in models:
            if name not in self.models:
                raise DataInvalid(f"The outcomes have no model {name!r}.", f"They have: {', '.join(self.models)}.")
        columns = [self.models.index(name) for name in models]
        return replace(
            self,
            models=tuple(models),
            score=self.score[:, columns],
            answer=None if self.answer is None else self.answer[:, columns],
            answered=None if self.answered is None else self.answered[:, columns],
            tokens_out=self.tokens_out[:, columns],
        )

    def cut_off(self, limits: NDArray[Any]) -> Outcomes:
        """The same queries where no model may write more than `limits` [k] tokens: a longer answer ends there, cannot
        be read and is worth nothing, though the answer may have been in what was written by then."""
        cut = self.tokens_out > limits
        whole = np.ones(cut.shape, bool) if self.answered is None else self.answered
        return replace(
            self,
            score=np.where(cut, np.float32(0.0), self.score),
            answer=None if self.answer is None else np.where(cut, "", self.answer),
            answered=whole & ~cut,
            tokens_out=np.minimum(self.tokens_out, limits).astype(np.float32),
        )


@dataclass(frozen=True)
class Trace:
    """n arrivals, in order of time."""

    arrival_s: NDArray[np.float64]
    """Seconds since the first."""
    tokens_in: Floats
    tokens_out: Floats

    def __len__(self) -> int:
        return len(self.arrival_s)


class _Query(msgspec.Struct):
    id: int | str
    prompt: str
    category: str | None = None


def load_outcomes(folder: Path) -> Outcomes:
    """Read an outcomes folder. Models come in the order in which the file first names them.

    Raises:
        DataInvalid: a file is missing or a line cannot be used; names the file, the line and the remedy.
    """
    queries_path, outcomes_path = _one_of(folder, "queries.jsonl"), _one_of(folder, "outcomes.csv")
    queries = list(_queries(queries_path))
    row_of = {str(q.id): row for row, (_, q) in enumerate(queries)}
    if len(row_of) < len(queries):
        seen: set[str] = set()
        line = next(n for n, q in queries if str(q.id) in seen or seen.add(str(q.id)))  # type: ignore[func-returns-value]
        raise DataInvalid(
            "This query's id was there before.", "Give each query its own.", path=str(queries_path), line=line
        )
    models: dict[str, int] = {}
    cells: list[tuple[int, int, float, float, str | None]] = []
    taken: set[tuple[int, int]] = set()
    for line, row in _table(outcomes_path, ("query_id", "model", "correct", "output_chars")):
        where: dict[str, Any] = {"path": str(outcomes_path), "line": line}
        query, name = row_of.get(row["query_id"]), row["model"]
        if query is None:
            raise DataInvalid(
                f"There is no query {row['query_id']!r} in {queries_path.name}.",
                "Add the query or remove this line.", **where,
            )  # fmt: skip
        if not name:
            raise DataInvalid("This outcome names no model.", "Fill the column `model`.", **where)
        model = models.setdefault(name, len(models))
        if (query, model) in taken:
            raise DataInvalid(f"A second outcome of {name} for query {row['query_id']}.", "Keep one of them.", **where)
        taken.add((query, model))
        score = _number(row["correct"], "correct", 0.0, 1.0, where)
        chars = _number(row["output_chars"], "output_chars", 0.0, float("inf"), where)
        cells.append((query, model, score, chars, row.get("answer")))
    if not cells:
        raise DataInvalid(
            "There are no outcomes in this file.", "Give one line a query and model.", path=str(outcomes_path)
        )
    return _assemble([q for _, q in queries], tuple(models), cells)


def load_trace(path: Path) -> Trace:
    """Read an arrival trace; lines may come in any order of time.

    Raises:
        DataInvalid: the file is missing or a line cannot be used; names the file, the line and the remedy.
    """
    at: list[float] = []
    tokens: list[tuple[float, float]] = []
    for line, row in _table(path, ("timestamp", "contexttokens", "generatedtokens")):
        where = {"path": str(path), "line": line}
        at.append(_seconds(row["timestamp"], where))
        tokens.append(
            (
                _number(row["contexttokens"], "ContextTokens", 0.0, float("inf"), where),
                _number(row["generatedtokens"], "GeneratedTokens", 0.0, float("inf"), where),
            )
        )
    if not at:
        raise DataInvalid(
            "There are no arrivals in this trace.", "Give a trace with at least one line.", path=str(path)
        )
    arrival, counts = np.array(at), np.array(tokens, np.float32)
    order = np.argsort(arrival, kind="stable")
    return Trace(arrival[order] - arrival.min(), counts[order, 0], counts[order, 1])


def _assemble(
    queries: list[_Query], models: tuple[str, ...], cells: list[tuple[int, int, float, float, str | None]]
) -> Outcomes:
    shape = (len(queries), len(models))
    rows, columns = np.array([c[0] for c in cells]), np.array([c[1] for c in cells])
    score, tokens_out = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    score[rows, columns] = [c[2] for c in cells]
    tokens_out[rows, columns] = np.array([c[3] for c in cells]) / CHARS_PER_TOKEN
    answer = None
    if any(c[4] for c in cells):  # a column that is there and always empty says nothing
        answer = np.full(shape, "", dtype=f"<U{max(len(c[4] or '') for c in cells)}")
        answer[rows, columns] = [c[4] or "" for c in cells]
    return Outcomes(
        ids=tuple(str(q.id) for q in queries),
        prompts=tuple(q.prompt for q in queries),
        categories=tuple(q.category or None for q in queries),
        models=models,
        score=score,
        answer=answer,
        answered=None if answer is None else answer != "",
        tokens_in=np.array([len(q.prompt) / CHARS_PER_TOKEN for q in queries], np.float32),
        tokens_out=tokens_out,
    )


def _one_of(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataInvalid(f"There is neither {name} nor {name}.gz.", "Name a folder that holds one.", path=str(folder))


@contextmanager
def _open(path: Path) -> Iterator[IO[str]]:
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8", newline="")
            if path.suffix == ".gz"
            else path.open("r", encoding="utf-8", newline="")
        ) as file:
            yield file
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataInvalid(f"It cannot be read ({error}).", "Check the path and the file.", path=str(path)) from None


def _queries(path: Path) -> Iterator[tuple[int, _Query]]:
    """(line number, query), blank lines left out."""
    decoder = msgspec.json.Decoder(_Query)
    with _open(path) as file:
        for line, text in enumerate(file, start=1):
            if text.strip():
                try:
                    yield line, decoder.decode(text)
                except msgspec.DecodeError as error:
                    raise DataInvalid(
                        f"This is no query: {error}.",
                        'Write {"id": ..., "prompt": "...", "category": "..."}, one object a line.',
                        path=str(path), line=line,
                    ) from None  # fmt: skip


def _table(path: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, cells by lower-case column name)."""
    with _open(path) as file:
        reader = csv.reader(file)
        header = [name.strip().lower().lstrip("\ufeff") for name in next(reader, [])]
        for name in required:
            if name not in header:
                raise DataInvalid(
                    f"The column {name!r} is missing.", f"Start with a line of column names: {', '.join(required)}.",
                    path=str(path), line=1,
                )  # fmt: skip
        for cells in reader:
            if cells:
                if len(cells) != len(header):
                    raise DataInvalid(
                        f"{len(cells)} cells where the header names {len(header)}.", "Mend or remove this line.",
                        path=str(path), line=reader.line_num,
                    )  # fmt: skip
                yield reader.line_num, dict(zip(header, cells, strict=True))


def _number(text: str, column: str, low: float, high: float, where: dict[str, Any]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high or value == float("inf"):
        span = f"from {low:g} to {high:g}" if high < float("inf") else f"of at least {low:g}"
        raise DataInvalid(f"`{column}` is {text!r}.", f"Write a number {span}.", **where)
    return value


def _seconds(text: str, where: dict[str, Any]) -> float:
    """A date and time, or plain seconds."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise DataInvalid(
            f"`TIMESTAMP` is {text!r}.", "Write a time such as 2023-11-16 18:15:46.68, or seconds.", **where
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
