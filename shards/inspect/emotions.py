"""Statistics of what data sets state about emotions beside labels: distributions over labels, valence, arousal and
dominance, and the labels of single persons."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.format.sample import DIMENSIONS

LABELS_SHOWN = 30
COLUMNS = ("label_distribution", *DIMENSIONS, "persons")
DIGITS = 3
"""Significant digits of counted values, which bound their number."""


@dataclass
class Values:
    """Counts the values of a dimension."""

    counts: Counter[float] = field(default_factory=Counter)
    """By the value, rounded to DIGITS."""
    total: float = 0.0
    least: float = np.inf
    most: float = -np.inf

    def add(self, found: Iterable[tuple[float, int]]) -> None:
        """Counts more values, each with the number of its occurrences."""
        for value, count in found:
            self.counts[float(f"{value:.{DIGITS}g}")] += count
            self.total += count * value
            self.least, self.most = min(self.least, value), max(self.most, value)

    @property
    def count(self) -> int:
        """How many values were counted."""
        return self.counts.total()

    @property
    def mean(self) -> float:
        """The mean of the values counted."""
        return self.total / self.count

    def to_json(self) -> dict[str, Any]:
        """The numbers that `shards stats --json` writes."""
        return {"samples": self.count, "least": self.least, "mean": self.mean, "most": self.most}


def _of_each_dimension() -> dict[str, Values]:
    return {name: Values() for name in DIMENSIONS}


@dataclass
class Emotions:
    """Statistics of one data set."""

    distributions: int = 0
    """Samples with a distribution over labels."""
    shares: Counter[str] = field(default_factory=Counter)
    """Sums of the shares of each label."""
    values: dict[str, Values] = field(default_factory=_of_each_dimension)
    """Of the samples."""
    labelled_persons: int = 0
    """Persons with labels or categories of their own."""
    person_labels: Counter[str] = field(default_factory=Counter)
    """Persons with each label or category."""
    person_values: dict[str, Values] = field(default_factory=_of_each_dimension)

    @property
    def mean_shares(self) -> dict[str, float]:
        """The mean share of each label in the distributions, the largest first."""
        return {label: total / self.distributions for label, total in self.shares.most_common()}

    @property
    def dimensions(self) -> dict[str, Values]:
        """The values of the dimensions that samples have."""
        return {name: values for name, values in self.values.items() if values.count}

    @property
    def person_dimensions(self) -> dict[str, Values]:
        """The values of the dimensions that persons have."""
        return {name: values for name, values in self.person_values.items() if values.count}

    def add(self, table: pa.Table) -> None:
        """Counts the rows of an index, of which COLUMNS are needed."""
        for text, count in _count(table["label_distribution"]):
            self.distributions += count
            for label, share in json.loads(text).items():
                self.shares[label] += count * share
        for name, values in self.values.items():
            values.add(_count(table[name]))
        labels = pc.struct_field(pc.list_flatten(table["persons"]), "labels")
        for text, count in _count(labels):
            if text != "{}":
                self._add_person(json.loads(text), count)

    def _add_person(self, own: Mapping[str, Any], count: int) -> None:
        names = list_person_labels(own)
        self.labelled_persons += count * bool(names)
        for name in names:
            self.person_labels[name] += count
        for name, values in self.person_values.items():
            value = own.get(name)
            if isinstance(value, int | float) and np.isfinite(value):
                values.add([(value, count)])

    def describe(self) -> list[str]:
        """The lines of `shards stats`."""
        lines = []
        if self.distributions:
            means = _list((f"{label} {share:.3f}" for label, share in self.mean_shares.items()))
            lines.append(f"distributions: {self.distributions}; mean shares {means}")
        lines += [f"{name}: {_range(values)}" for name, values in self.dimensions.items()]
        if self.labelled_persons:
            counts = _list(f"{label} {count}" for label, count in self.person_labels.most_common())
            lines.append(f"labels of persons: {self.labelled_persons} persons; {counts}")
        lines += [
            f"{name} of persons: {_range(values, 'persons')}"
            for name, values in self.person_dimensions.items()
        ]
        return lines

    def to_json(self) -> dict[str, Any]:
        """The numbers that `shards stats --json` writes."""
        return {
            "distributions": self.distributions,
            "mean_shares": self.mean_shares,
            "dimensions": {name: values.to_json() for name, values in self.dimensions.items()},
            "labelled_persons": self.labelled_persons,
            "person_labels": dict(self.person_labels.most_common()),
            "person_dimensions": {name: values.to_json() for name, values in self.person_dimensions.items()},
        }


def list_person_labels(own: Mapping[str, Any]) -> list[str]:
    """The label or the categories among a person's own labels."""
    label, categories = own.get("label"), own.get("categories")
    names = [label] if isinstance(label, str) else categories if isinstance(categories, list) else []
    return [str(name) for name in names]


def _count(column: pa.ChunkedArray | pa.Array) -> list[tuple[Any, int]]:
    """Each value of a column and its number; null is none."""
    found = pc.value_counts(column.drop_null())
    return list(zip(found.field("values").to_pylist(), found.field("counts").to_pylist()))


def _list(texts: Iterable[str]) -> str:
    every = list(texts)
    more = f" and {len(every) - LABELS_SHOWN} more" if len(every) > LABELS_SHOWN else ""
    return ", ".join(every[:LABELS_SHOWN]) + more


def _range(values: Values, of: str = "samples") -> str:
    return f"{values.count} {of}, {values.least:g} to {values.most:g} (mean {values.mean:.3f})"
