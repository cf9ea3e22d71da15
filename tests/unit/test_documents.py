"""Documents that must agree with the code."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from shared import describe, messages, subjects

ROOT = Path(__file__).parents[2]


def test_the_reference_of_subjects_is_current() -> None:
    """docs/subjects.md is what the code says; after a change run `python -m shared.describe > docs/subjects.md`."""
    assert (ROOT / "docs" / "subjects.md").read_text() == describe.document()


def test_every_versioned_message_is_in_the_catalogue_or_inside_one() -> None:
    """A message with a version tag travels on some subject of the catalogue."""
    travelling = {kind for entry in subjects.CATALOGUE for kind in entry.message}
    tagged = {k for k in describe.kinds() if describe.tag(k) and k.__struct_config__.tag_field == "type"}
    assert tagged - travelling - {messages.Ok} == set()


def test_golden_queries_still_decode() -> None:
    """What clients of the first version send is understood, field by field; examples are only ever added."""
    golden = (ROOT / "tests" / "golden" / "query.v1.jsonl").read_text().splitlines()
    for line in golden:
        query = msgspec.json.decode(line, type=messages.Query)
        assert query.prompt or query.messages


def test_no_host_of_a_registry_and_no_path_of_a_machine_is_named() -> None:
    """The project speaks of the product alone."""
    forbidden = ("/" + "home/", "/" + "root/", "pypi" + ".org", "pythonhosted" + ".org", "registry." + "npmjs")
    for folder in ("services", "shared", "bench", "docs", "fleets", "examples", "tests"):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and file.suffix in (".py", ".md", ".toml", ".yaml"):
                text = file.read_text()
                assert not [word for word in forbidden if word in text], file


def test_the_readme_s_commands_are_those_that_ci_runs() -> None:
    """`.ci/run` calls the test line of the README, word for word."""
    line = 'python3 -m venv .venv && .venv/bin/pip install -q -e ".[cpu,dev]" && .venv/bin/python -m tests'
    assert line in (ROOT / "README.md").read_text()
    assert line in (ROOT / ".ci" / "run").read_text()


def test_every_decision_that_is_named_is_there() -> None:
    """Code and documents refer to decisions by number: each is recorded, once."""
    recorded = [file.name[:4] for file in (ROOT / "docs" / "decisions").glob("*.md")]
    assert len(recorded) == len(set(recorded))
    for folder in ("services", "shared", "bench", "docs", "tests", "profiles"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".md", ".toml"):
                named = re.findall(r"decisions/(\d{4})", file.read_text())
                assert set(named) <= set(recorded), file
