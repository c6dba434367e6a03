"""`uniemox shards index`: an index and a manifest for tars that others wrote. The tars stay as they are."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO

from shards.format.encode import index_fields
from shards.format.index import index_path, read_index, rows_sha256, write_index
from shards.format.manifest import MANIFEST, SIZES, Manifest, ShardEntry
from shards.format.rejected import NAME as REJECTED_NAME
from shards.format.sample import Sample, make_key
from shards.format.tars import Group, groups
from shards.pack.pipeline import write_rejected
from shards.pack.prepare import Rejected
from shards.pack.settings import checked_licence
from shards.pack.walk import Progress
from shards.pictures import BadPicture, check_picture
from shards.pool import in_order
from shards.sources import Record, Slice
from shards.sources.wds import sample_records, table_rows
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import fsync_dir, sha256_bytes, sha256_file
from uniemox_dist.core.os_errors import reading, writing

_GROWING = ".index.tmp"
"""Below the folder of the tars: what becomes index/, the manifest and the lists once all of it is there."""


@dataclass(frozen=True)
class Indexed:
    """One tar that was looked through."""

    entry: ShardEntry | None
    """None if nothing in it can be used; the tar is then left out."""
    rejected: list[Rejected]


def index_folder(
    folder: Path,
    *,
    workers: int = 0,
    check: str = "decode",
    licence: str | None = None,
    progress: Progress | None = None,
) -> tuple[Manifest, list[Rejected]]:
    """Writes index/, manifest.json, sizes.json and rejected.parquet beside the tars of a folder: all, or nothing.

    A key that an earlier tar has, too, gets the tar's name in front, and is hashed as all such names are.

    Raises:
        UserError: if there is a manifest already, no tar, a tar that is not whole, nothing that can be used, or the
            folder cannot be written.
        Fault: if a worker is killed.
    """
    checked_licence(licence)
    if (folder / MANIFEST).exists():
        raise UserError(
            f"DIR={folder}: has a {MANIFEST} already; delete it and index/ to index the tars anew"
        )
    tars = _tars(folder)
    if progress is not None:
        progress.total = len(tars)
    entries: list[ShardEntry] = []
    rejected: list[Rejected] = []
    keys: set[str] = set()
    elsewhere = "index the tars where they can have files beside them"
    with writing(f"DIR={folder}", elsewhere), _publishing(folder) as made:
        for one in in_order(_index_tar, tars, repeat(made), repeat(check), workers=workers):
            rejected += one.rejected
            if one.entry is not None:
                entries.append(_with_keys_of_its_own(one.entry, made, keys))
            if progress is not None:
                progress.update(1)
        if not entries:
            first = f"; the first: {rejected[0].source}: {rejected[0].detail}" if rejected else ""
            raise UserError(f"DIR={folder}: no sample with a picture in {len(tars)} tars{first}")
        reasons = Counter(refused.reason for refused in rejected)
        provenance: dict[str, Any] = {
            "indexed": {"check": check},
            "records": sum(entry.samples for entry in entries) + len(rejected),
            "rejected": dict(sorted(reasons.items())),
        }
        if licence is not None:
            provenance["licence"] = licence
        write_rejected(made, [asdict(refused) for refused in rejected])
        manifest = Manifest(tuple(entries), provenance)
        manifest.write(made)
    return manifest, rejected


def _tars(folder: Path) -> list[Path]:
    tars = [tar for tar in sorted(folder.glob("*.tar")) if not tar.is_dir()] if folder.is_dir() else []
    if not tars:
        raise UserError(f"DIR={folder}: holds no .tar files")
    for tar in tars:
        if not tar.name.isprintable():  # bytes that are no UTF-8 among them: no manifest could name it
            raise UserError(f"DIR={folder}: the file name {tar.name!a} cannot be written down; rename it")
    return tars


@contextmanager
def _publishing(folder: Path) -> Iterator[Path]:
    """Yields a folder whose files move to `folder` on success, the manifest last; it is deleted in any case."""
    made = folder / _GROWING
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    try:
        yield made
        (folder / "index").mkdir(exist_ok=True)
        indexes = sorted(path.relative_to(made) for path in (made / "index").iterdir())
        for name in (*indexes, *map(Path, (REJECTED_NAME, SIZES, MANIFEST))):
            os.replace(made / name, folder / name)
        fsync_dir(folder / "index")
        fsync_dir(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _index_tar(tar: Path, made: Path, check: str) -> Indexed:
    """Reads one tar from end to end; writes its index into `made` if anything in it can be used."""
    with reading(f"DIR={tar}", "copy it again or take it away"):
        rows, rejected = _look_through(tar, check)
        if not rows:
            return Indexed(None, rejected)
        size, sha256 = tar.stat().st_size, sha256_file(tar)
    rows, doubled = _first_of_each_key(rows, tar.name)
    return Indexed(_entry(made, tar.name, size, sha256, rows), rejected + doubled)


def _entry(made: Path, name: str, size: int, sha256: str, rows: list[dict[str, Any]]) -> ShardEntry:
    """Writes the index of a tar."""
    index = index_path(made, name)
    write_index(index, rows)
    return ShardEntry(name, len(rows), size, sha256, sha256_file(index), rows_sha256(rows))


def _with_keys_of_its_own(entry: ShardEntry, made: Path, taken: set[str]) -> ShardEntry:
    """The entry of a tar after all keys that are taken were changed in its index; adds them to `taken`, which needs
    about 100 bytes a sample."""
    index = index_path(made, entry.name)
    keys: list[str] = read_index(index, ["key"])["key"].to_pylist()
    if taken.isdisjoint(keys):
        taken.update(keys)
        return entry
    rows = read_index(index).to_pylist()
    for row in rows:
        while row["key"] in taken:
            row["key"] = make_key(f"{entry.name}/{row['key']}")
        taken.add(row["key"])
    return _entry(made, entry.name, entry.bytes, entry.sha256, rows)


def _look_through(tar: Path, check: str) -> tuple[list[dict[str, Any]], list[Rejected]]:
    """The rows of a tar's samples, and what cannot be used."""
    table = table_rows(tar)
    rows: list[dict[str, Any]] = []
    rejected: list[Rejected] = []
    with open(tar, "rb") as file:
        for group in groups(tar, "DIR"):
            for record in sample_records(tar, group, None, table):
                if record.refused is not None:
                    rejected.append(Rejected(record.name, *record.refused))
                    continue
                try:
                    rows.append(_row(file, record, group, check))
                except BadPicture as bad:
                    rejected.append(Rejected(record.name, bad.reason, bad.detail))
    return rows, rejected


def _row(file: BinaryIO, record: Record, group: Group, check: str) -> dict[str, Any]:
    """The index row of a sample of an open tar.

    Raises:
        BadPicture: as `check_picture` does.
    """
    image = record.image
    assert isinstance(image, Slice)
    file.seek(image.offset)
    fields = _fields(record, file.read(image.length), check)
    places = {
        "sample_offset": group.offset,
        "sample_length": group.end - group.offset,
        "image_offset": image.offset,
        "image_length": image.length,
    }
    return {"key": fields["key"], **places, **fields}


def _fields(record: Record, data: bytes, check: str) -> dict[str, Any]:
    """What the index says of a sample besides its place.

    Raises:
        BadPicture: as `check_picture` does.
    """
    picture = check_picture(data, check=check)
    sample = Sample(
        key=make_key(record.name),
        image=data,
        extension=picture.extension,
        width=picture.width,
        height=picture.height,
        source=record.name,
        captions=record.captions,
        label=record.label,
        persons=record.persons or (),
        image_sha256=sha256_bytes(data),
    )
    return index_fields(sample)


def _first_of_each_key(rows: list[dict[str, Any]], tar: str) -> tuple[list[dict[str, Any]], list[Rejected]]:
    """Rows with keys of their own; webdataset's rule that a sample's members are neighbours was broken by others."""
    first = {row["key"]: row for row in reversed(rows)}
    doubled = [row for row in rows if first[row["key"]] is not row]
    refused = [
        Rejected(
            f"{tar}/byte {row['sample_offset']}",
            "duplicate_key",
            f"an earlier sample has the key {row['key']}",
        )
        for row in doubled
    ]
    return [row for row in rows if first[row["key"]] is row], refused
