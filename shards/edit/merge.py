"""`uniemox shards merge`: joins the parts of a parallel pack, or unrelated data sets. Links or copies tars; writes
manifests and indexes."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from shards.edit.merge_inputs import Input, open_inputs
from shards.edit.output import Note, Output, ignore, open_output
from shards.format.encode import BLOCK
from shards.format.entries import ShardEntry
from shards.format.index import check_tar, index_path, read_all_shard_rows, rows_sha256, to_rows, write_index
from shards.format.manifest import Manifest
from shards.format.rejected import REJECTED, write_rejected
from shards.format.sample import make_key
from shards.format.tars import read_json_member
from shards.pack.append import combine_licences
from shards.pack.duplicates import describe_duplicate
from shards.pack.listing import split_rank
from shards.storage import Place, read_range
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import (
    convert_write_errors,
    hide_secrets,
    sha256_file,
)

SAME_KEY = ("refuse", "rename", "drop")
"""What happens to a sample whose key a sample of an earlier data set has, with another picture."""


@dataclass
class MergeResult:
    """The result of a merge."""

    packed: dict[str, int]
    refused: Counter[str]
    """Refused records by reason, of the parts and of the merge itself."""
    marked: int
    """Copies of samples that several parts packed; they no longer count."""
    records: int
    renamed: int = 0
    """Samples that got another key."""


def merge(
    out: Place, parts: Sequence[Place], *, same_key: str = "refuse", note: Note = ignore
) -> MergeResult:
    """Joins all parts of one pack, or unrelated data sets, under `out`. They stay unchanged. On one disk they may be
    deleted afterwards unless the tars in `out` are symbolic links, as on another file system.

    If several packed the same picture, one sample stays: that of the test split, or else of the earliest. The others
    are marked in their index and do not count, and so are samples with a key that occurred before, with another
    picture. Between unrelated data sets `same_key` "refuse" makes that an error, and "rename" gives them another key in
    their index. Shards that have only marked samples are left out. `note` receives a line if a command was interrupted
    there, and this one starts again.

    Raises:
        UserError: if parts are missing, given twice, incomplete or have different settings, data sets have the same
            keys, or splits in some only, or `out` exists or cannot be written.
    """
    inputs = open_inputs(parts)
    target = f"OUT={hide_secrets(out)}"
    source = [manifest.identity for given in inputs for _, _, manifest in given.found]
    opened = open_output(out, "merge", {"same_key": same_key}, source, note)
    with convert_write_errors(target), opened as output:
        return _join(output, inputs, same_key)


def _join(output: Output, inputs: list[Input], same_key: str) -> MergeResult:
    are_parts = bool(inputs[0].note)
    found = [(split, given, folder, manifest) for given in inputs for split, folder, manifest in given.found]
    found.sort(key=lambda item: split_rank(item[0]))  # stable: the order of the inputs stays
    entries: dict[str, list[ShardEntry]] = {}
    marks = _Marks("drop" if are_parts else same_key)
    for split, given, folder, manifest in found:
        for entry in manifest.shards:
            linked = _add_shard(output, entry, given, folder, split, marks)
            if linked is not None:
                entries.setdefault(split, []).append(linked)
    marks.check_keys()
    if not entries:
        raise UserError(f"PARTS: none of the {len(inputs)} parts has a sample; see their {REJECTED}")
    rejected = [
        {**row, "source": f"{given.name}/{row['source']}" if given.name else row["source"]}
        for given in inputs
        for row in given.rejected
    ]
    rejected += marks.rejected
    refused = Counter(row["reason"] for row in rejected)
    records = sum(given.records for given in inputs)
    counts = {"records": records, "rejected": dict(sorted(refused.items())), **_sum_counts(inputs, marks)}
    for split, shards in entries.items():
        shared = _part_provenance(inputs) if are_parts else _merged_provenance(inputs, split)
        Manifest(tuple(shards), {**shared, **counts, **_count_parts(inputs)}).write(output.folder / split)
    write_rejected(output.folder, rejected)
    packed = {split: sum(entry.samples for entry in shards) for split, shards in entries.items()}
    return MergeResult(packed, refused, len(marks.rejected), records, marks.renamed)


def _sum_counts(inputs: list[Input], marks: "_Marks") -> dict[str, dict[str, int]]:
    """The counts of all inputs together that only some packs have. Pictures that are marked are not `converted` any
    more; parts of one pack have the same `not_pictures`."""
    packs = [given.note or given.found[0][2].provenance for given in inputs]
    converted = sum((Counter(pack.get("converted") or {}) for pack in packs), Counter()) - marks.converted
    others = packs[:1] if inputs[0].note else packs
    not_pictures: Counter[str] = sum((Counter(pack.get("not_pictures") or {}) for pack in others), Counter())
    counts = {"converted": converted, "not_pictures": not_pictures}
    return {name: dict(sorted(count.items())) for name, count in counts.items() if count}


def _count_parts(inputs: list[Input]) -> dict[str, Any]:
    return {"parts": len(inputs)} if inputs[0].note else {}


def _part_provenance(inputs: list[Input]) -> dict[str, Any]:
    """What all parts of a pack state alike."""
    return {k: v for k, v in inputs[0].note.items() if k not in ("part", "packed", "converted")}


def _merged_provenance(inputs: list[Input], split: str) -> dict[str, Any]:
    """The provenance of each data set, and what it means for all."""
    of_split = [(given, manifest) for given in inputs for name, _, manifest in given.found if name == split]
    provenance: dict[str, Any] = {
        "merged": [
            {
                "name": given.name,
                "shards": f"{given.prefix}*.tar",
                "identity": manifest.identity,
                "samples": manifest.samples,
                "provenance": manifest.provenance,
            }
            for given, manifest in of_split
        ]
    }
    labels = [label for _, manifest in of_split for label in manifest.provenance.get("labels") or []]
    if labels:
        provenance["labels"] = list(dict.fromkeys(labels))
    licence = combine_licences([manifest.provenance.get("licence") for _, manifest in of_split])
    return provenance if licence is None else {**provenance, "licence": licence}


def _add_shard(
    output: Output, entry: ShardEntry, given: Input, folder: Place, split: str, marks: "_Marks"
) -> ShardEntry | None:
    """Adds one shard and its index to the output; rewrites the index if some of its rows are marked or have another
    key. Returns None and adds nothing if all rows are marked."""
    tar, index = folder / entry.name, index_path(folder, entry.name)
    check_tar(folder, entry, "PARTS")
    rows = to_rows(read_all_shard_rows(folder, entry))
    name = f"{given.prefix}{entry.name}"
    is_changed = marks.add(rows, split, tar, given.name, name)
    samples = sum("refused" not in row for row in rows)
    if not samples:
        return None
    before = f"{split}/" if split else ""
    index_name = f"{before}index/{name.removesuffix('.tar')}.parquet"
    output.add(tar, f"{before}{name}")
    if not is_changed:
        output.add(index, index_name)
        return replace(entry, name=name)
    path = output.folder / index_name
    write_index(path, rows)
    changed = replace(
        entry, name=name, samples=samples, index_sha256=sha256_file(path), rows_sha256=rows_sha256(rows)
    )
    output.finish([index_name])
    return changed


class _Sample(NamedTuple):
    """A sample of an earlier shard: enough to compare another one with it and to find its name."""

    split: str
    label: str | None
    part: str
    """Name of its data set; "" for parts of one pack."""
    tar: Place
    key: str
    begin: int
    """Position of the first tar member after the picture, bytes."""
    end: int

    @classmethod
    def from_row(cls, row: dict[str, Any], split: str, tar: Place, part: str) -> "_Sample":
        begin = row["image_offset"] + row["image_length"]
        end = row["sample_offset"] + row["sample_length"]
        return cls(split, row["label"], part, tar, row["key"], begin + -begin % BLOCK, end)

    @property
    def name(self) -> str:
        """The record's name in its source, after the name of its data set."""
        return f"{self.part}/{self.source}" if self.part else self.source

    @property
    def source(self) -> str:
        """The record's name in its source, from its `.json`; `tar/key` if that cannot be read."""
        try:
            return str(self._read_json()["source"])
        except (OSError, ValueError, KeyError):
            return f"{self.tar.name}/{self.key}"

    @property
    def original_format(self) -> str | None:
        """The format from which the picture was converted, from its `.json`."""
        try:
            found = json.loads(self._read_json()["attributes"])["original_format"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return str(found)

    def _read_json(self) -> dict[str, Any]:
        return read_json_member(read_range(self.tar, self.begin, self.end - self.begin))


class _Marks:
    """Marks samples that occurred in an earlier shard; needs about 500 bytes of memory per sample."""

    def __init__(self, same_key: str) -> None:
        self.rejected: list[dict[str, str]] = []
        self.renamed = 0
        self.converted = Counter[str]()
        """The original formats of marked pictures that were converted."""
        self._same_key = same_key
        self._earlier: dict[int, _Sample] = {}  # by content
        self._keys: dict[str, Place] = {}
        self._clashes: list[str] = []  # the first one, described
        self._count = 0

    def add(self, rows: list[dict[str, Any]], split: str, tar: Place, part: str, name: str) -> bool:
        """Marks or renames the repeated samples among the rows of a shard, which gets a name in the output; returns
        whether there are any."""
        is_changed = False
        for row in rows:
            if "refused" in row:
                continue
            content, sample = int(row["image_sha256"][:32], 16), _Sample.from_row(row, split, tar, part)
            first = self._earlier.get(content)
            if first is not None:
                reason, detail = describe_duplicate(split, sample.label, first.split, first.label, first.name)
            elif sample.key in self._keys and self._same_key == "drop":
                reason, detail = "duplicate_key", f"a sample of another part has the same key {sample.key}"
            else:
                if sample.key in self._keys:
                    self._count_clash(sample)
                    row["key"] = self._new_key(name, sample.key)
                    is_changed = True
                self._earlier[content] = sample
                self._keys[row["key"]] = tar
                continue
            row["refused"] = reason
            is_changed = True
            if (converted := sample.original_format) is not None:
                self.converted[converted] += 1
            self.rejected.append({"source": sample.name, "reason": reason, "detail": detail})
        return is_changed

    def check_keys(self) -> None:
        """
        Raises:
            UserError: if keys name different pictures, and this is to be refused.
        """
        if self._same_key == "refuse" and self._count:
            keys = "1 key names" if self._count == 1 else f"{self._count} keys name"
            raise UserError(
                f"PARTS: {keys} different pictures, such as {self._clashes[0]}; give --same-key rename (the later "
                "sample gets another key) or --same-key drop (it is refused and counted)"
            )

    def _count_clash(self, sample: "_Sample") -> None:
        self._count += 1
        if self._same_key == "rename":
            self.renamed += 1
        elif not self._clashes:
            places = hide_secrets(self._keys[sample.key]), hide_secrets(sample.tar)
            self._clashes.append(f"{sample.key} in {places[0]} and {places[1]}")

    def _new_key(self, name: str, key: str) -> str:
        new = make_key(f"{name}/{key}")
        while new in self._keys:
            new = make_key(f"{name}/{new}")
        return new
