"""`uniemox shards merge`: joins the parts of a parallel pack. Links tars; writes manifests and indexes."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from shards.edit.links import link_file, publish_on_success
from shards.format.encode import BLOCK
from shards.format.entries import ShardEntry
from shards.format.index import check_tar, index_path, read_all_shard_rows, rows_sha256, to_rows, write_index
from shards.format.manifest import Manifest, find_manifest_folders, read_manifest
from shards.format.rejected import REJECTED, read_rejected, write_rejected
from shards.format.tars import read_json_member
from shards.pack.duplicates import describe_duplicate
from shards.pack.listing import split_rank
from shards.pack.partial import PART
from shards.storage import read_range
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import convert_read_errors, convert_write_errors, read_json, sha256_file


@dataclass
class MergeResult:
    """The result of a merge."""

    packed: dict[str, int]
    refused: Counter[str]
    """Refused records by reason, of the parts and of the merge itself."""
    marked: int
    """Copies of samples that several parts packed; they no longer count."""
    records: int


def merge(out: Path, parts: list[Path]) -> MergeResult:
    """Joins all parts of one pack under `out`. The parts stay unchanged. They may be deleted afterwards unless the
    tars in `out` are symbolic links, as on another file system.

    If several parts packed the same picture or key, one sample stays: that of the test split, or else of the earliest
    part. The others are marked in their index and do not count. Shards that have only marked samples are left out.

    Raises:
        UserError: if parts are missing, given twice, incomplete or have different settings, or `out` exists or cannot
            be written.
    """
    notes = check_parts(parts)
    with convert_write_errors(f"OUT={out}"), publish_on_success(out) as partial:
        return _join(partial, notes)


def check_parts(parts: list[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """The parts in order, each with its part.json.

    Raises:
        UserError: as `merge` for its parts.
    """
    found: dict[int, tuple[Path, dict[str, Any]]] = {}
    for folder in parts:
        note = _read_part(folder)
        number, of = note["part"]
        if number in found:
            raise UserError(
                f"PARTS={folder}: is part {number}/{of}, but so is {found[number][0]}; give each part once"
            )
        found[number] = (folder, note)
    ordered = [found[number] for number in sorted(found)]
    if not ordered:
        raise UserError("PARTS: none given; give the folders of all parts")
    first, stated = ordered[0]
    for folder, note in ordered[1:]:
        for field in ("settings", "captions", "detector", "licence", "source_sha256"):
            if note.get(field) != stated.get(field):
                what = "source" if field == "source_sha256" else field
                raise UserError(
                    f"PARTS={folder}: was packed with a different {what} than {first}; pack it again"
                )
    of = stated["part"][1]
    missing = sorted(set(range(1, of + 1)) - set(found))
    if missing or any(note["part"][1] != of for _, note in ordered):
        lacking = ", ".join(f"{number}/{of}" for number in missing) or "parts with another total"
        raise UserError(f"PARTS: {lacking} are missing; give all {of} parts")
    return ordered


def _read_part(folder: Path) -> dict[str, Any]:
    """The part.json of a part: its number, and how many records it packed and refused."""
    if not (folder / PART).is_file():
        raise UserError(
            f"PARTS={folder}: has no {PART}; give folders that `shards pack --part I/N` completed"
        )
    try:
        with convert_read_errors(f"PARTS={folder}: {PART}", "pack this part again"):
            note: dict[str, Any] = read_json(folder / PART)
        (number, of), records = note["part"], note["records"]
        packed, rejected = list(note["packed"].values()), list(note["rejected"].values())
        is_sound = all(type(value) is int for value in (number, of, records, *packed, *rejected))
        if not is_sound or not 1 <= number <= of or records != sum(packed) + sum(rejected):
            raise ValueError("its numbers do not add up")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"PARTS={folder}: {PART} cannot be read; pack this part again") from None
    return note


def _join(partial: Path, notes: list[tuple[Path, dict[str, Any]]]) -> MergeResult:
    rejected: list[dict[str, str]] = []
    found: list[tuple[str, Path, Manifest]] = []
    for folder, note in notes:
        of_part, listed = _contents(folder, note)
        found += of_part
        rejected += listed
    found.sort(key=lambda item: split_rank(item[0]))  # stable: parts stay in order
    entries: dict[str, list[ShardEntry]] = {}
    marks = _Marks()
    for split, folder, manifest in found:
        for entry in manifest.shards:
            linked = _link_shard(entry, folder, partial / split, split, marks)
            if linked is not None:
                entries.setdefault(split, []).append(linked)
    if not entries:
        raise UserError(f"PARTS: none of the {len(notes)} parts has a sample; see their {REJECTED}")
    rejected += marks.rejected
    refused = Counter(row["reason"] for row in rejected)
    records = sum(note["records"] for _, note in notes)
    shared = {k: v for k, v in notes[0][1].items() if k not in ("part", "packed")}
    counts = {"records": records, "rejected": dict(sorted(refused.items()))}
    for split, shards in entries.items():
        Manifest(tuple(shards), {**shared, **counts, "parts": len(notes)}).write(partial / split)
    write_rejected(partial, rejected)
    packed = {split: sum(entry.samples for entry in shards) for split, shards in entries.items()}
    return MergeResult(packed, refused, len(marks.rejected), records)


def _contents(
    folder: Path, note: dict[str, Any]
) -> tuple[list[tuple[str, Path, Manifest]], list[dict[str, str]]]:
    """(split, folder, manifest) of a part's data sets, and its refused records.

    Raises:
        UserError: if they do not match the counts in part.json.
    """
    found = [
        (data.name if data != folder else "", data, read_manifest(data, "PARTS"))
        for data in find_manifest_folders(folder)
    ]
    rejected = read_rejected(folder)
    if rejected is None:
        raise UserError(f"PARTS={folder}: {REJECTED} is missing; pack this part again")
    reasons = Counter(row["reason"] for row in rejected)
    if {split: manifest.samples for split, _, manifest in found} != note["packed"]:
        raise UserError(f"PARTS={folder}: has other samples than its {PART} counts; pack this part again")
    if reasons != Counter(note["rejected"]):
        raise UserError(
            f"PARTS={folder}: {REJECTED} lists other records than {PART} counts; pack this part again"
        )
    return found, rejected


def _link_shard(
    entry: ShardEntry, folder: Path, target: Path, split: str, marks: "_Marks"
) -> ShardEntry | None:
    """Links one shard and its index into `target`; rewrites the index if some of its rows are marked. Returns None and
    links nothing if all rows are."""
    tar, index = folder / entry.name, index_path(folder, entry.name)
    check_tar(folder, entry, "PARTS")
    rows = to_rows(read_all_shard_rows(folder, entry))
    is_marked = marks.add(rows, split, tar)
    samples = sum("refused" not in row for row in rows)
    if not samples:
        return None
    link_file(tar, target / entry.name)
    if not is_marked:
        link_file(index, index_path(target, entry.name))
        return entry
    write_index(index_path(target, entry.name), rows)
    return replace(
        entry,
        samples=samples,
        index_sha256=sha256_file(index_path(target, entry.name)),
        rows_sha256=rows_sha256(rows),
    )


class _Sample(NamedTuple):
    """A sample of an earlier shard: enough to compare another one with it and to find its name."""

    split: str
    label: str | None
    tar: Path
    key: str
    begin: int
    """Position of the first tar member after the picture, bytes."""
    end: int

    @classmethod
    def from_row(cls, row: dict[str, Any], split: str, tar: Path) -> "_Sample":
        begin = row["image_offset"] + row["image_length"]
        end = row["sample_offset"] + row["sample_length"]
        return cls(split, row["label"], tar, row["key"], begin + -begin % BLOCK, end)

    @property
    def name(self) -> str:
        """The record's name in its source, from its `.json`; `tar/key` if that cannot be read."""
        try:
            data = read_range(self.tar, self.begin, self.end - self.begin)
            return str(read_json_member(data)["source"])
        except (OSError, ValueError, KeyError):
            return f"{self.tar.name}/{self.key}"


class _Marks:
    """Marks samples that occurred in an earlier shard; needs about 400 bytes of memory per sample."""

    def __init__(self) -> None:
        self.rejected: list[dict[str, str]] = []
        self._earlier: dict[int, _Sample] = {}  # by content
        self._keys: set[str] = set()

    def add(self, rows: list[dict[str, Any]], split: str, tar: Path) -> bool:
        """Marks the repeated samples among a shard's rows; returns whether there are any."""
        before = len(self.rejected)
        for row in rows:
            if "refused" in row:
                continue
            content, sample = int(row["image_sha256"][:32], 16), _Sample.from_row(row, split, tar)
            first = self._earlier.get(content)
            if first is not None:
                reason, detail = describe_duplicate(split, sample.label, first.split, first.label, first.name)
            elif sample.key in self._keys:
                reason, detail = "duplicate_key", f"a sample of another part has the same key {sample.key}"
            else:
                self._earlier[content] = sample
                self._keys.add(sample.key)
                continue
            row["refused"] = reason
            self.rejected.append({"source": sample.name, "reason": reason, "detail": detail})
        return len(self.rejected) > before
