"""`uniemox shards index`: an index and a manifest for tars that others wrote. The tars stay as they are."""

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from shards.encode import index_fields
from shards.format import Sample, make_key
from shards.index import index_path, rows_sha256, write_index
from shards.manifest import MANIFEST, Manifest, ShardEntry
from shards.pack import Progress, write_rejected
from shards.pictures import BadPicture, inspect
from shards.prepare import Rejected
from shards.sources import Record, Slice
from shards.sources.wds import sample_records, table_rows
from shards.tars import groups
from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.files import sha256_bytes, sha256_file


@dataclass(frozen=True)
class Indexed:
    """One tar that was looked through."""

    entry: ShardEntry | None
    """None if nothing in it can be used; the tar is then left out."""
    rejected: list[Rejected]


def index_folder(
    folder: Path, *, workers: int = 0, check: str = "decode", progress: Progress | None = None
) -> tuple[Manifest, list[Rejected]]:
    """Writes index/, manifest.json, sizes.json and rejected.parquet beside the tars of a folder.

    Keys that occur in several tars, as img2dataset's and many others' do, get the tar's name in front.

    Raises:
        UserError: if there is a manifest already, no tar, a tar that is not whole, or nothing that can be used.
    """
    if (folder / MANIFEST).exists():
        raise UserError(
            f"DIR={folder}: has a {MANIFEST} already; delete it and index/ to index the tars anew"
        )
    tars = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if not tars:
        raise UserError(f"DIR={folder}: holds no .tar files")
    if progress is not None:
        progress.total = len(tars)
    found: list[Indexed] = []
    arguments = (tars, repeat(check))
    if workers:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            found = [_told(one, progress) for one in pool.map(_index_tar, *arguments)]
    else:
        found = [_told(one, progress) for one in map(_index_tar, *arguments)]
    rejected = [refused for one in found for refused in one.rejected]
    entries = tuple(one.entry for one in found if one.entry is not None)
    if not entries:
        first = f"; the first: {rejected[0].source}: {rejected[0].detail}" if rejected else ""
        raise UserError(f"DIR={folder}: no sample with a picture in {len(tars)} tars{first}")
    reasons = Counter(refused.reason for refused in rejected)
    provenance: dict[str, Any] = {
        "indexed": {"check": check},
        "records": sum(entry.samples for entry in entries) + len(rejected),
        "rejected": dict(sorted(reasons.items())),
    }
    write_rejected(folder, [asdict(refused) for refused in rejected])
    manifest = Manifest(entries, provenance)
    manifest.write(folder)
    return manifest, rejected


def _told(one: Indexed, progress: Progress | None) -> Indexed:
    if progress is not None:
        progress.update(1)
    return one


def _index_tar(tar: Path, check: str) -> Indexed:
    """Reads one tar from end to end; writes its index if anything in it can be used."""
    table = table_rows(tar)
    rows: list[dict[str, Any]] = []
    rejected: list[Rejected] = []
    with open(tar, "rb") as file:
        for group in groups(tar, "DIR"):
            for record in sample_records(tar, group, None, table):
                if record.refused is not None:
                    rejected.append(Rejected(record.name, *record.refused))
                    continue
                image = record.image
                assert isinstance(image, Slice)
                file.seek(image.offset)
                data = file.read(image.length)
                try:
                    fields = _fields(record, data, check)
                except BadPicture as bad:
                    rejected.append(Rejected(record.name, bad.reason, bad.detail))
                    continue
                places = {
                    "sample_offset": group.offset,
                    "sample_length": group.end - group.offset,
                    "image_offset": image.offset,
                    "image_length": image.length,
                }
                rows.append({"key": fields["key"], **places, **fields})
    if not rows:
        return Indexed(None, rejected)
    rows, doubled = _first_of_each_key(rows, tar.name)
    index = index_path(tar.parent, tar.name)
    write_index(index, rows)
    entry = ShardEntry(
        name=tar.name,
        samples=len(rows),
        bytes=tar.stat().st_size,
        sha256=sha256_file(tar),
        index_sha256=sha256_file(index),
        rows_sha256=rows_sha256(rows),
    )
    return Indexed(entry, rejected + doubled)


def _fields(record: Record, data: bytes, check: str) -> dict[str, Any]:
    """What the index says of a sample besides its place.

    Raises:
        BadPicture: as `inspect` does.
    """
    picture = inspect(data, check=check)
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
