"""What is in these shards, from their indexes alone."""

from collections import Counter
from pathlib import Path

import pyarrow.compute as pc

from shards.index import index_path, read_index
from shards.manifest import manifest_folders, read_manifest


def describe(folder: Path) -> list[str]:
    """One paragraph of text for each data set at or directly below a folder."""
    return [_describe_one(found) for found in manifest_folders(folder)]


def _describe_one(folder: Path) -> str:
    manifest = read_manifest(folder, "DIR")
    labels: Counter[str] = Counter()
    persons: Counter[int] = Counter()
    captions = 0
    for shard in manifest.shards:
        table = read_index(index_path(folder, shard.name), ["label", "captions", "persons"])
        labels.update(label or "(none)" for label in table["label"].to_pylist())
        persons.update(pc.list_value_length(table["persons"]).to_pylist())
        captions += pc.sum(pc.list_value_length(table["captions"])).as_py() or 0
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    lines = [
        f"{folder}: {manifest.samples} samples in {len(manifest.shards)} shards, {megabytes:.1f} MB, "
        f"identity {manifest.identity[:12]}",
        f"  captions: {captions}",
        "  persons per picture: " + ", ".join(f"{n}: {count}" for n, count in sorted(persons.items())),
        "  labels: " + ", ".join(f"{label} {count}" for label, count in labels.most_common()),
    ]
    return "\n".join(lines)
