"""Figures in Prometheus' text format (version 0.0.4). Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Labels = tuple[tuple[str, str], ...]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper bounds of a latency histogram's buckets."""


@dataclass(frozen=True)
class Family:
    """A metric and its samples: name's suffix, labels, value."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    samples: Sequence[tuple[str, Labels, float]]


@dataclass
class Counter:
    """Counts by label values."""

    name: str
    text: str
    labels: tuple[str, ...]
    values: dict[tuple[str, ...], float] = field(default_factory=dict)

    def add(self, *labels: str, by: float = 1.0) -> None:
        self.values[labels] = self.values.get(labels, 0.0) + by

    def family(self) -> Family:
        samples = [("", tuple(zip(self.labels, key, strict=True)), v) for key, v in sorted(self.values.items())]
        return Family(self.name, "counter", self.text, samples)


@dataclass
class Histogram:
    """Durations in seconds by one label."""

    name: str
    text: str
    label: str
    counts: dict[str, list[int]] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, label: str, seconds: float) -> None:
        counts = self.counts.setdefault(label, [0] * (len(SECONDS) + 1))
        counts[bisect_left(SECONDS, seconds)] += 1
        self.sums[label] = self.sums.get(label, 0.0) + seconds

    def family(self) -> Family:
        samples: list[tuple[str, Labels, float]] = []
        for label, counts in sorted(self.counts.items()):
            own = (self.label, label)
            below = 0
            for bound, count in zip((*SECONDS, None), counts, strict=True):
                below += count
                samples.append(("_bucket", (own, ("le", "+Inf" if bound is None else f"{bound:g}")), below))
            samples += [("_sum", (own,), self.sums[label]), ("_count", (own,), below)]
        return Family(self.name, "histogram", self.text, samples)


def gauge(name: str, text: str, values: Mapping[Labels, float] | float) -> Family:
    """A metric that goes up and down: one value, or one by labels."""
    by_labels: Mapping[Labels, float] = values if isinstance(values, Mapping) else {(): values}
    return Family(name, "gauge", text, [("", labels, value) for labels, value in sorted(by_labels.items())])


def counter(name: str, text: str, values: Mapping[Labels, float]) -> Family:
    """A metric that only grows, counted elsewhere."""
    return Family(name, "counter", text, [("", labels, value) for labels, value in sorted(values.items())])


def render(families: Iterable[Family]) -> str:
    """All of them as text; those without samples only as what they are."""
    lines: list[str] = []
    for family in families:
        lines += [f"# HELP {family.name} {_line(family.text)}", f"# TYPE {family.name} {family.kind}"]
        for suffix, labels, value in family.samples:
            named = ",".join(f'{name}="{_quoted(text)}"' for name, text in labels)
            lines.append(f"{family.name}{suffix}{f'{{{named}}}' if named else ''} {_number(value)}")
    return "\n".join(lines) + "\n"


def _line(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _quoted(text: str) -> str:
    return _line(text).replace('"', '\\"')


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
