"""Counts what the records of a source have, for the summary of a pack: pictures, labels, splits, persons."""

from collections.abc import Iterable, Sequence

from shards.format.sample import DIMENSIONS
from shards.sources import Record


class Contents:
    """What the records that may be packed have."""

    def __init__(self) -> None:
        self.pictures = self.captions = self.distributions = self.persons = 0
        self.labels: set[str] = set()
        self.dimensions: set[str] = set()
        self.person_labels: set[str] = set()
        self.categories: set[str] = set()
        self.person_dimensions: set[str] = set()

    def add(self, record: Record) -> None:
        """Counts a record, unless it is refused."""
        if record.refused is not None:
            return
        self.pictures += 1
        self.captions += len(record.captions)
        self.distributions += record.distribution is not None
        if record.label is not None:
            self.labels.add(record.label)
        self.dimensions.update(name for name in DIMENSIONS if name in record.attributes)
        for person in record.persons or ():
            self.persons += 1
            labels = person.labels
            if isinstance(label := labels.get("label"), str):
                self.person_labels.add(label)
            if isinstance(names := labels.get("categories"), list):
                self.categories.update(map(str, names))
            self.person_dimensions.update(name for name in DIMENSIONS if name in labels)

    def describe(self, splits: int, drawn: Sequence[str] = ()) -> str:
        """One line, such as `1,234 pictures, 6 labels, 3 splits, 2,345 persons with 26 categories and VAD`.

        Args:
            drawn: how splits were drawn that the source does not have.
        """
        parts = [_count(self.pictures, "picture")]
        if self.labels:
            parts.append(_count(len(self.labels), "label"))
        if self.distributions:
            parts.append(_count(self.distributions, "distribution"))
        if self.dimensions:
            parts.append(_names(self.dimensions))
        if self.captions:
            parts.append(_count(self.captions, "caption"))
        if splits:
            parts.append(_count(splits, "split") + (f" ({'; '.join(drawn)})" if drawn else ""))
        if self.persons:
            own = [
                *([_count(len(self.person_labels), "label")] if self.person_labels else []),
                *([_count(len(self.categories), "category")] if self.categories else []),
                *([_names(self.person_dimensions)] if self.person_dimensions else []),
            ]
            parts.append(_count(self.persons, "person") + (f" with {' and '.join(own)}" if own else ""))
        return ", ".join(parts)


def _count(number: int, what: str) -> str:
    plural = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{number:,} {what if number == 1 else plural}"


def _names(dimensions: Iterable[str]) -> str:
    known = [name for name in DIMENSIONS if name in set(dimensions)]
    return "VAD" if len(known) == len(DIMENSIONS) else " and ".join(known)
