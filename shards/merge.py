"""Parts of a parallel pack into one data set: manifests and indexes are written, tars are linked."""

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from shards.duplicates import same_picture
from shards.index import index_path, read_all_rows, rows_sha256, to_rows, write_index
from shards.links import link, publishing
from shards.listing import split_rank
from shards.manifest import Manifest, ShardEntry, manifest_folders, read_manifest
from shards.pack import PART, write_rejected
from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.files import read_json, sha256_file


@dataclass
class MergeResult:
    """What a merge did."""

    packed: dict[str, int]
    refused: Counter[str]
    """Reasons, of the parts and of the merge itself."""
    marked: int
    """Samples that several parts packed, and that count no more."""
    records: int


def merge(out: Path, parts: list[Path]) -> MergeResult:
    """Joins all parts of one pack under `out`. The parts stay as they are, and may be deleted afterwards.

    Of a picture or key that several parts packed one stays: that of the test split before others, then of the
    earlier part. The others are marked in their index, and left out of all counts.

    Raises:
        UserError: if parts are missing, given twice, of other settings or not whole, or `out` exists.
    """
    notes = _check(parts)
    with publishing(out) as partial:
        return _join(partial, notes)


def _check(parts: list[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """The parts in order, with what each says of itself."""
    found: dict[int, tuple[Path, dict[str, Any]]] = {}
    for folder in parts:
        if not (folder / PART).is_file():
            raise UserError(
                f"PARTS={folder}: holds no {PART}; give folders that `shards pack --part I/N` finished"
            )
        try:
            note = read_json(folder / PART)
            number, of = note["part"]
        except (json.JSONDecodeError, KeyError, ValueError):
            raise UserError(f"PARTS={folder}: {PART} cannot be read; pack this part again") from None
        if number in found:
            raise UserError(
                f"PARTS={folder}: is part {number}/{of}, as {found[number][0]} is; give each part once"
            )
        found[number] = (folder, note)
    ordered = [found[number] for number in sorted(found)]
    if not ordered:
        raise UserError("PARTS: none given; name the folders of all parts")
    first, stated = ordered[0]
    for folder, note in ordered[1:]:
        for field in ("settings", "captions", "detector", "source_sha256"):
            if note.get(field) != stated.get(field):
                what = "source" if field == "source_sha256" else field
                raise UserError(f"PARTS={folder}: was packed with another {what} than {first}; pack it again")
    of = stated["part"][1]
    missing = sorted(set(range(1, of + 1)) - set(found))
    if missing or any(note["part"][1] != of for _, note in ordered):
        lacking = ", ".join(f"{number}/{of}" for number in missing) or "parts of another division"
        raise UserError(f"PARTS: missing are {lacking}; give all {of} parts")
    return ordered


def _join(partial: Path, notes: list[tuple[Path, dict[str, Any]]]) -> MergeResult:
    refused: Counter[str] = Counter()
    rejected: list[dict[str, Any]] = []
    for folder, note in notes:
        refused.update(note["rejected"])
        rejected += pq.read_table(folder / "rejected.parquet").to_pylist()
    found = [
        (data.name if data != folder else "", data)
        for folder, _ in notes
        for data in manifest_folders(folder)
    ]
    found.sort(key=lambda item: split_rank(item[0]))  # stable: parts stay in order
    entries: dict[str, list[ShardEntry]] = {}
    marks = _Marks()
    for split, folder in found:
        for entry in read_manifest(folder, "PARTS").shards:
            entries.setdefault(split, []).append(_take(entry, folder, partial / split, split, marks))
    refused.update(row["reason"] for row in marks.rejected)
    records = sum(note["records"] for _, note in notes)
    shared = {k: v for k, v in notes[0][1].items() if k not in ("part", "packed")}
    counts = {"records": records, "rejected": dict(sorted(refused.items()))}
    for split, shards in entries.items():
        Manifest(tuple(shards), {**shared, **counts, "parts": len(notes)}).write(partial / split)
    write_rejected(partial, rejected + marks.rejected)
    packed = {split: sum(entry.samples for entry in shards) for split, shards in entries.items()}
    if not packed:
        raise UserError(
            f"PARTS: nothing was packed in any of the {len(notes)} parts; look at their rejected.parquet"
        )
    return MergeResult(packed, refused, len(marks.rejected), records)


def _take(entry: ShardEntry, folder: Path, target: Path, split: str, marks: "_Marks") -> ShardEntry:
    """Links one shard and its index into `target`; writes the index anew if rows of it are marked."""
    tar, index = folder / entry.name, index_path(folder, entry.name)
    if not tar.is_file() or tar.stat().st_size != entry.bytes:
        raise UserError(f"PARTS={folder}: {entry.name} is missing or cut; pack this part again")
    link(tar, target / entry.name)
    rows = to_rows(read_all_rows(index))
    if not marks.add(rows, split, entry.name):
        link(index, index_path(target, entry.name))
        return entry
    write_index(index_path(target, entry.name), rows)
    return replace(
        entry,
        samples=sum("refused" not in row for row in rows),
        index_sha256=sha256_file(index_path(target, entry.name)),
        rows_sha256=rows_sha256(rows),
    )


class _Marks:
    """Which samples of all parts were met before. About 300 bytes of memory for each."""

    def __init__(self) -> None:
        self.rejected: list[dict[str, Any]] = []
        self._met: dict[int, tuple[str, str | None, str]] = {}  # content -> split, label, where
        self._keys: set[str] = set()

    def add(self, rows: list[dict[str, Any]], split: str, shard: str) -> bool:
        """Marks the rows of a shard that are to go; whether there are any."""
        before = len(self.rejected)
        for row in rows:
            if "refused" in row:
                continue
            content, name = int(row["image_sha256"][:32], 16), f"{shard}/{row['key']}"
            if content in self._met:
                first_split, first_label, first = self._met[content]
                reason, detail = same_picture(split, row["label"], first_split, first_label, first)
            elif row["key"] in self._keys:
                reason, detail = "duplicate_key", f"a sample of another part has the key {row['key']}"
            else:
                self._met[content] = (split, row["label"], name)
                self._keys.add(row["key"])
                continue
            row["refused"] = reason
            self.rejected.append({"source": name, "reason": reason, "detail": detail})
        return len(self.rejected) > before
