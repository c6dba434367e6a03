"""What is in these shards, in words for the terminal and in numbers for programs; from their indexes alone."""

from typing import Any

from shards.inspect.summary import Summary, refusals, summarise_all
from shards.storage import Place
from uniemox_dist.core.formatting import size

LABELS_SHOWN = 30


def describe(folder: Place) -> list[str]:
    """One paragraph of text for each data set at or directly below a folder, and one about what was refused."""
    refused = _refused(folder)
    texts = [_describe_one(summary) for summary in summarise_all(folder)]
    if refused:
        texts.append("refused: " + ", ".join(f"{reason} {count}" for reason, count in refused.items()))
    return texts


def describe_json(folder: Place) -> dict[str, Any]:
    """The same as JSON values, data set by data set."""
    return {
        "data_sets": [_numbers(summary) for summary in summarise_all(folder)],
        "refused": _refused(folder),
    }


def _refused(folder: Place) -> dict[str, int]:
    return {reason: len(rows) for reason, rows in (refusals(folder) or {}).items()}


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
            f"pictures of {_range(summary, 'kilobytes')} kB (least to most, median)",
            "  labels: "
            + ", ".join(f"{'(none)' if label is None else label} {count}" for label, count in labels)
            + (f" and {more} more" if more > 0 else ""),
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
        "least_median_most": {name: list(_quantiles(summary, name)) for name in summary.tallies},
    }
