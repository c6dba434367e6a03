"""What is in a data set, counted from its indexes one shard at a time: memory stays flat for any number of rows."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.format.manifest import Manifest, manifest_folders, read_manifest
from shards.format.rejected import read_rejected
from shards.format.trusted import rows_of
from shards.storage import Place

COLUMNS = ["width", "height", "image_length", "label", "captions", "persons"]
QUANTITIES = {
    "short": "shorter side, pixels",
    "long": "longer side, pixels",
    "aspect": "longer over shorter side, hundredths",
    "kilobytes": "encoded picture, kB",
    "caption": "first caption, characters",
    "persons": "persons in a picture",
}


@dataclass
class Tally:
    """How often each whole number occurs."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    def add(self, values: np.ndarray) -> None:
        """Counts some more numbers, 0 or larger."""
        more = np.bincount(values.astype(np.int64), minlength=len(self.counts))
        more[: len(self.counts)] += self.counts
        self.counts = more

    @property
    def total(self) -> int:
        """How many numbers were counted."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> int:
        """The smallest number with at least that share of all at or below it; 0 where nothing was counted."""
        if not self.total:
            return 0
        return int(np.searchsorted(self.counts.cumsum(), max(1, np.ceil(share * self.total))))

    @property
    def values(self) -> np.ndarray:
        """Numbers that occur."""
        return np.flatnonzero(self.counts)


@dataclass
class Summary:
    """One data set in numbers."""

    folder: Place
    manifest: Manifest
    labels: Counter[str | None] = field(default_factory=Counter)
    tallies: dict[str, Tally] = field(default_factory=lambda: {name: Tally() for name in QUANTITIES})
    captions: int = 0
    captionless: int = 0
    """Samples without any caption."""

    @property
    def with_person(self) -> int:
        """Samples with at least one person."""
        return int(self.tallies["persons"].counts[1:].sum())


def summarise(folder: Place) -> Summary:
    """Counts what is in one data set.

    Raises:
        UserError: if its manifest or an index cannot be read, or they do not fit each other.
    """
    summary = Summary(folder, read_manifest(folder, "DIR"))
    for shard in summary.manifest.shards:
        _add(summary, rows_of(folder, shard, COLUMNS))
    return summary


def summarise_all(folder: Place) -> list[Summary]:
    """The summaries of the data sets at or directly below a folder."""
    return [summarise(found) for found in manifest_folders(folder)]


def refusals(folder: Place) -> dict[str, list[dict[str, str]]] | None:
    """What rejected.parquet says, by reason, the most frequent first; None where there is no such file.

    Raises:
        UserError: if it cannot be read.
    """
    rows = read_rejected(folder)
    if rows is None:
        return None
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault(row["reason"], []).append(row)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def _add(summary: Summary, table: pa.Table) -> None:
    width, height = (table[name].to_numpy().astype(np.int64) for name in ("width", "height"))
    short, long = np.minimum(width, height), np.maximum(width, height)
    per_picture = pc.fill_null(pc.list_value_length(table["captions"]), 0).to_numpy()
    first = pc.list_element(table["captions"].filter(pa.array(per_picture > 0)), 0)
    values = {
        "short": short,
        "long": long,
        "aspect": np.minimum(np.round(100 * long / np.maximum(short, 1)), 10_000),
        "kilobytes": table["image_length"].to_numpy() // 1000,
        "caption": pc.utf8_length(first).to_numpy(),
        "persons": pc.fill_null(pc.list_value_length(table["persons"]), 0).to_numpy(),
    }
    for name, numbers in values.items():
        summary.tallies[name].add(numbers)
    summary.labels.update(table["label"].to_pylist())
    summary.captions += int(per_picture.sum())
    summary.captionless += int((per_picture == 0).sum())
