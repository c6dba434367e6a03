"""Statistics of data sets, counted from their indexes one shard at a time, so that memory stays flat.

`describe` and `describe_json` report them; `shards/inspect/page.py` draws them.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.format.index import read_shard_rows
from shards.format.manifest import Manifest, find_manifest_folders, read_manifest
from shards.format.rejected import read_rejected
from shards.inspect.emotions import COLUMNS as EMOTION_COLUMNS
from shards.inspect.emotions import LABELS_SHOWN, Emotions
from shards.storage import Place
from uniemox_dist.core.formatting import size

COLUMNS = [
    *("width", "height", "image_length", "label", "captions"),
    *EMOTION_COLUMNS,
]
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
    """Counts how often each whole number occurs."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    def add(self, values: np.ndarray) -> None:
        """Counts more numbers (0 or larger)."""
        more = np.bincount(values.astype(np.int64), minlength=len(self.counts))
        more[: len(self.counts)] += self.counts
        self.counts = more

    @property
    def total(self) -> int:
        """The number of values counted."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> int:
        """The smallest number with at least `share` of all values at or below it; 0 if nothing was counted."""
        if not self.total:
            return 0
        return int(np.searchsorted(self.counts.cumsum(), max(1, np.ceil(share * self.total))))

    @property
    def values(self) -> np.ndarray:
        """The numbers that occur, ascending."""
        return np.flatnonzero(self.counts)


@dataclass
class Summary:
    """Statistics of one data set."""

    folder: Place
    manifest: Manifest
    labels: Counter[str | None] = field(default_factory=Counter)
    tallies: dict[str, Tally] = field(default_factory=lambda: {name: Tally() for name in QUANTITIES})
    captions: int = 0
    captionless: int = 0
    """Samples without any caption."""
    emotions: Emotions = field(default_factory=Emotions)

    @property
    def with_person(self) -> int:
        """Samples with at least one person."""
        return int(self.tallies["persons"].counts[1:].sum())


def summarise(folder: Place) -> Summary:
    """Computes the statistics of one data set.

    Raises:
        UserError: if its manifest or an index cannot be read, or they do not match.
    """
    summary = Summary(folder, read_manifest(folder, "DIR"))
    for shard in summary.manifest.shards:
        _add(summary, read_shard_rows(folder, shard, COLUMNS))
    return summary


def summarise_folder(folder: Place) -> list[Summary]:
    """The summaries of the data sets at or directly below a folder: train, val and test first, then by name."""
    found = find_manifest_folders(folder)
    order = {name: place for place, name in enumerate(("train", "val", "test"))}
    return [summarise(each) for each in sorted(found, key=lambda each: order.get(each.name, len(order)))]


def group_rejected(folder: Place) -> dict[str, list[dict[str, str]]] | None:
    """The rows of rejected.parquet by reason, the most frequent first; None if there is no such file.

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
    summary.emotions.add(table)


# ---- text and JSON


def describe(folder: Place) -> list[str]:
    """One paragraph of text for each data set at or directly below a folder, and one about refused records."""
    refused = _refused(folder)
    texts = [_describe_one(summary) for summary in summarise_folder(folder)]
    if refused:
        texts.append("refused: " + ", ".join(f"{reason} {count}" for reason, count in refused.items()))
    return texts


def describe_json(folder: Place) -> dict[str, Any]:
    """The same numbers as JSON values, one object per data set."""
    return {
        "data_sets": [_numbers(summary) for summary in summarise_folder(folder)],
        "refused": _refused(folder),
    }


def _refused(folder: Place) -> dict[str, int]:
    return {reason: len(rows) for reason, rows in (group_rejected(folder) or {}).items()}


def _describe_one(summary: Summary) -> str:
    manifest, tallies = summary.manifest, summary.tallies
    people = tallies["persons"]
    labels = summary.labels.most_common(LABELS_SHOWN)
    more = len(summary.labels) - len(labels)
    return "\n".join(
        [
            f"{summary.folder}: {manifest.samples} samples in {len(manifest.shards)} shards, "
            f"{size(summary.manifest.bytes)}, identity {manifest.identity[:12]}",
            f"  captions: {summary.captions}, {_range(summary, 'caption')} characters; "
            f"{summary.captionless} pictures without",
            "  persons per picture: " + ", ".join(f"{n}: {people.counts[n]}" for n in people.values),
            f"  sides: {_range(summary, 'short')} by {_range(summary, 'long')} pixels; "
            f"pictures of {_range(summary, 'kilobytes')} kB (smallest to largest, median)",
            "  labels: "
            + ", ".join(f"{'(none)' if label is None else label} {count}" for label, count in labels)
            + (f" and {more} more" if more > 0 else ""),
            *(f"  {line}" for line in summary.emotions.describe()),
        ]
    )


def _range(summary: Summary, name: str) -> str:
    low, median, high = _quantiles(summary, name)
    return f"{low} to {high} ({median})" if high > low else f"{low}"


def _quantiles(summary: Summary, name: str) -> tuple[int, int, int]:
    tally = summary.tallies[name]
    return tally.quantile(0), tally.quantile(0.5), tally.quantile(1)


def _numbers(summary: Summary) -> dict[str, Any]:
    return {
        "folder": str(summary.folder),
        "identity": summary.manifest.identity,
        "samples": summary.manifest.samples,
        "shards": len(summary.manifest.shards),
        "bytes": summary.manifest.bytes,
        "captions": summary.captions,
        "without_caption": summary.captionless,
        "with_person": summary.with_person,
        "labels": {"" if label is None else label: count for label, count in summary.labels.most_common()},
        **summary.emotions.to_json(),
        "least_median_most": {name: list(_quantiles(summary, name)) for name in summary.tallies},
    }
