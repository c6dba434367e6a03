"""Checks the labels, distributions and dimensions of records against those that are declared, and spells them so."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shards.sources import Record
from shards.sources.presets import Labels, Preset
from shards.sources.values import most_likely
from uniemox_dist.core.errors import UserError

MANY = 10
"""Share of records with undeclared labels, 1 in so many, above which the preset is doubtful."""
MOST_NEAREST = 20
"""Undeclared labels for which the nearest declared one is searched."""


@dataclass(frozen=True)
class DeclaredLabels:
    """The labels that records may have, and a count of those that they do have."""

    labels: Labels
    shares: Labels
    """Labels of distributions."""
    kept: Labels
    """Those that are packed."""
    ranges: Mapping[str, tuple[float, float]]
    """Lowest and highest value of dimensions."""
    unknown: Counter[str | None] = field(default_factory=Counter)
    """Labels that are not declared; None for records without one."""
    known: Counter[str | None] = field(default_factory=Counter)

    @classmethod
    def of(
        cls, preset: Preset, keep_labels: tuple[str, ...], ranges: Mapping[str, tuple[float, float]]
    ) -> "DeclaredLabels":
        return cls(
            Labels(preset.labels, preset.synonyms),
            Labels(preset.distribution_labels or preset.labels, preset.synonyms),
            Labels(keep_labels),
            ranges,
        )

    def refuse(self, record: Record, label: str | None) -> Record:
        """A record with a label that is not declared."""
        self.unknown[label] += 1
        near = self.labels.nearest(label) if label is not None and len(self.unknown) <= MOST_NEAREST else None
        meant = f"; the nearest is {near}" if near else ""
        what = "it has no label; the labels are" if label is None else f"label {label!r} is not one of"
        detail = f"{what} {', '.join(self.labels.declared)}{meant}"
        return replace(record, refused=("label", detail))

    def describe_unknown(self) -> str | None:
        """A line about the labels that are not declared; None if there are none."""
        found = [(label, count) for label, count in self.unknown.most_common() if label is not None]
        if not found or not self.known:
            return None
        some = ", ".join(f"{label} ({count:,})" for label, count in found[:8])
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        doubt = "; is it the preset of this set?" if self.unknown.total() * MANY > self.known.total() else ""
        return f"refused for labels that the preset does not have: {some}{more}{doubt}"

    def check(self) -> None:
        """Raises UserError if records have labels, and none is declared."""
        if not self.unknown or self.known or not self.labels.declared:
            return
        found = [label for label, _ in self.unknown.most_common() if label is not None]
        names = ", ".join(map(repr, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        pairs = ((label, self.labels.nearest(label)) for label in found[:MOST_NEAREST])
        near = ", ".join(f"{label!r}: {name}" for label, name in pairs if name)
        raise UserError(
            f"SOURCE: none of its labels is one of the preset's: it has {names or 'no labels'}; the preset has "
            f"{', '.join(self.labels.declared)}{f'; nearest: {near}' if near else ''}; {_fix(found)}"
        )


def _fix(found: list[str]) -> str:
    """What to do if no label is declared."""
    if found and all(label.isdecimal() for label in found):
        return (
            "they are numbers without names: name a column of texts with --column label=NAME, or state the names in a "
            "--preset FILE.yaml (`synonyms: {0: NAME}`), as the set's document lists them"
        )
    return "give the folder that holds the label folders, or another --preset"


def check_labels(record: Record, declared: DeclaredLabels) -> Record:
    """A record with the declared spelling of its labels, refused if one is not declared or not kept. Without a label it
    gets the most likely one of its distribution, unless several are, or that one is not declared. Refused, too, if a
    dimension is beyond its range."""
    if record.refused is None and (problem := _find_beyond(record, declared.ranges)):
        return replace(record, refused=("annotation", problem))
    if record.distribution is not None and record.refused is None:
        spelled = {
            name: share
            for label, share in record.distribution.items()
            if (name := declared.shares.canonical(label)) is not None
        }
        if len(spelled) < len(record.distribution):
            names = ", ".join(record.distribution)
            detail = f"labels of its distribution ({names}) are not all different ones of "
            return replace(record, refused=("label", detail + ", ".join(declared.shares.declared)))
        record = replace(record, distribution=spelled)
        if record.label is None and spelled:
            declared.known[None] += 1
            label = declared.labels.canonical(most_likely(record.distribution or {}))
            return _keep(replace(record, label=label), declared.kept)
    of_persons = [person.labels["label"] for person in record.persons or () if "label" in person.labels]
    if of_persons and record.label is None and record.refused is None:
        return _with_person_labels(record, declared, of_persons)
    label = declared.labels.canonical(record.label)
    if record.refused is None and declared.labels.declared:
        if label is None:
            return declared.refuse(record, record.label)
        declared.known[label] += 1
    return _keep(record if label == record.label else replace(record, label=label), declared.kept)


def _find_beyond(record: Record, ranges: Mapping[str, tuple[float, float]]) -> str | None:
    """Describes the first number of a picture or person that is beyond the range of its dimension."""
    for name, (low, high) in ranges.items():
        of_persons = ((f"persons.{i}.", person.labels) for i, person in enumerate(record.persons or ()))
        for place, values in (("", record.attributes), *of_persons):
            value = values.get(name)
            if isinstance(value, int | float) and not low <= value <= high:
                return f"{place}{name}: {value:g} is beyond {low:g} to {high:g}"
    return None


def _with_person_labels(record: Record, declared: DeclaredLabels, labels: list[Any]) -> Record:
    """A record whose persons have labels of their own, which differ."""
    spelled = {label: declared.labels.canonical(str(label)) for label in labels}
    for label, name in spelled.items():
        if name is None:
            return declared.refuse(record, str(label))
    declared.known.update(spelled.values())
    persons = tuple(
        replace(person, labels={**person.labels, "label": spelled[person.labels["label"]]})
        if "label" in person.labels
        else person
        for person in record.persons or ()
    )
    record = replace(
        record,
        persons=persons,
        label=next(iter(spelled.values())) if len(set(spelled.values())) == 1 else None,
    )
    kept = declared.kept
    if (
        record.label is None
        and kept.declared
        and any(kept.canonical(name) is not None for name in spelled.values())
    ):
        return record
    return _keep(record, kept)


def _keep(record: Record, kept: Labels) -> Record:
    if (
        record.refused is None
        and kept.declared
        and (record.label is None or kept.canonical(record.label) is None)
    ):
        return replace(record, refused=("label", f"label {record.label!r} is not selected by --keep-label"))
    return record
