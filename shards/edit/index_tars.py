"""`uniemox shards index`: writes an index and a manifest for existing tars, which stay unchanged."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shards.format.encode import index_fields
from shards.format.entries import ShardEntry
from shards.format.index import index_path, read_index, rows_sha256, write_index
from shards.format.manifest import MANIFEST, SIZES, Manifest
from shards.format.rejected import REJECTED, write_rejected
from shards.format.sample import EXTENSIONS, make_key
from shards.format.tars import Group
from shards.pack.prepare import Rejected, make_sample
from shards.pack.settings import check_licence
from shards.pictures.decode import check_picture
from shards.pictures.formats import BadPicture
from shards.pool import Progress, map_in_order
from shards.sources import Record, Slice
from shards.sources.layouts.wds import read_tar
from shards.sources.tars import TARS
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import (
    convert_read_errors,
    convert_write_errors,
    describe_missing_folder,
    fsync_dir,
    sha256_file,
)

_UNFINISHED = ".index.tmp"
"""Subfolder for the index files, the manifest and the lists until all of them are complete."""


@dataclass(frozen=True)
class Indexed:
    """The result for one tar."""

    entry: ShardEntry | None
    """None if the tar has no usable sample; it is then left out."""
    rejected: list[Rejected]


def index_folder(
    folder: Path,
    *,
    workers: int = 0,
    check: str = "decode",
    licence: str | None = None,
    progress: Progress | None = None,
) -> tuple[Manifest, list[Rejected]]:
    """Writes index/, manifest.json, sizes.json and rejected.parquet beside the tars of a folder: all or none of them.

    A key that an earlier tar has too is replaced by the key of `TAR/KEY`.

    Raises:
        UserError: if there is a manifest already, no tar, an incomplete tar or no usable sample, or the folder cannot
            be written.
        Fault: if a worker is killed.
    """
    check_licence(licence)
    if (folder / MANIFEST).exists():
        raise UserError(
            f"DIR={folder}: has a {MANIFEST} already; delete it and index/ to index the tars again"
        )
    tars = find_tars(folder)
    entries: list[ShardEntry] = []
    rejected: list[Rejected] = []
    keys: set[str] = set()
    fix = "copy the tars to a folder that can be written"
    with convert_write_errors(f"DIR={folder}", fix), _open_unfinished(folder) as made:
        jobs = [(tar, made, check) for tar in tars]
        for result in map_in_order(_index_tar, jobs, workers=workers, progress=progress):
            rejected += result.rejected
            if result.entry is not None:
                entries.append(_with_unique_keys(result.entry, made, keys))
        if not entries:
            first = f"; the first: {rejected[0].source}: {rejected[0].detail}" if rejected else ""
            raise UserError(f"DIR={folder}: no usable sample in {len(tars)} tars{first}")
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


def find_tars(folder: Path) -> list[Path]:
    """The tars of a folder.

    Raises:
        UserError: if there are none, one is compressed, or one has a name that a manifest cannot hold.
    """
    names = sorted(path.name for path in folder.iterdir() if not path.is_dir()) if folder.is_dir() else []
    problem = "has no .tar files" if folder.is_dir() else describe_missing_folder(folder)
    return [folder / name for name in choose_tars(names, f"DIR={folder}", problem)]


def choose_tars(names: list[str], source: str, problem: str) -> list[str]:
    """Those of a folder's names that are tars. `source` is the argument with its value in error lines, `problem` the
    reason why there may be none.

    Raises:
        UserError: as `find_tars`.
    """
    for name in names:
        if name.lower().endswith(TARS) and not name.endswith(".tar"):
            fix = (
                "rename it to .tar" if name.lower().endswith(".tar") else "decompress it to a .tar beside it"
            )
            raise UserError(
                f"{source}: {_show(name)}: only files called .tar can be indexed; {fix}, or pack it with "
                "`uniemox shards pack --layout wds`"
            )
    tars = [name for name in names if name.endswith(".tar")]
    if not tars:
        raise UserError(f"{source}: {problem}; give a folder with .tar files")
    for tar in tars:
        if not tar.isprintable():  # for example bytes that are not UTF-8, which a manifest cannot hold
            raise UserError(f"{source}: the file name {tar!a} cannot be written into a manifest; rename it")
    return tars


def find_folders_below(folder: Path) -> list[str]:
    """Folders directly below one that have tars, too; they are data sets of their own."""
    return sorted({tar.parent.name for tar in folder.glob("*/*.tar") if tar.parent.name != "quarantine"})


def _show(name: str) -> str:
    return name if name.isprintable() else ascii(name)


@contextmanager
def _open_unfinished(folder: Path) -> Iterator[Path]:
    """Yields a subfolder whose files move to `folder` on success, the manifest last. Always deletes the subfolder."""
    made = folder / _UNFINISHED
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    try:
        yield made
        (folder / "index").mkdir(exist_ok=True)
        indexes = sorted(path.relative_to(made) for path in (made / "index").iterdir())
        for name in (*indexes, *map(Path, (REJECTED, SIZES, MANIFEST))):
            os.replace(made / name, folder / name)
        fsync_dir(folder / "index")
        fsync_dir(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _index_tar(tar: Path, made: Path, check: str) -> Indexed:
    """Reads one tar; writes its index into `made` if it has a usable sample."""
    with convert_read_errors(f"DIR={tar}", "copy it again or remove it"):
        rows, rejected = _read_samples(tar, check)
        if not rows:
            return Indexed(None, rejected)
        size, sha256 = tar.stat().st_size, sha256_file(tar)
    rows, repeated = _drop_repeated_keys(rows, tar.name)
    return Indexed(_entry(made, tar.name, size, sha256, rows), rejected + repeated)


def _entry(made: Path, name: str, size: int, sha256: str, rows: list[dict[str, Any]]) -> ShardEntry:
    """Writes the index of a tar; returns its manifest entry."""
    index = index_path(made, name)
    write_index(index, rows)
    return ShardEntry(name, len(rows), size, sha256, sha256_file(index), rows_sha256(rows))


def _with_unique_keys(entry: ShardEntry, made: Path, taken: set[str]) -> ShardEntry:
    """Replaces the keys in a tar's index that are in `taken`, and adds the tar's keys to it (about 100 bytes per
    sample)."""
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


def _read_samples(tar: Path, check: str) -> tuple[list[dict[str, Any]], list[Rejected]]:
    """The index rows of a tar's samples, and the refused ones."""
    rows: list[dict[str, Any]] = []
    rejected: list[Rejected] = []
    with open(tar, "rb") as file:
        for group, record in read_tar(tar, "DIR"):
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
        BadPicture: as `check_picture`.
    """
    image = record.image
    assert isinstance(image, Slice)
    file.seek(image.offset)
    data = file.read(image.length)
    picture = check_picture(data, check=check)
    extension = EXTENSIONS.get(picture.format, picture.format.lower())
    fields = index_fields(make_sample(record, data, extension, picture.width, picture.height))
    positions = {
        "sample_offset": group.offset,
        "sample_length": group.end - group.offset,
        "image_offset": image.offset,
        "image_length": image.length,
    }
    return {"key": fields["key"], **positions, **fields}


def _drop_repeated_keys(rows: list[dict[str, Any]], tar: str) -> tuple[list[dict[str, Any]], list[Rejected]]:
    """(rows with unique keys, the others as refused). Keys repeat if a sample's members are not neighbours in the
    tar."""
    first = {row["key"]: row for row in reversed(rows)}
    repeated = [row for row in rows if first[row["key"]] is not row]
    refused = [
        Rejected(
            f"{tar}/byte {row['sample_offset']}",
            "duplicate_key",
            f"an earlier sample has the key {row['key']}",
        )
        for row in repeated
    ]
    return [row for row in rows if first[row["key"]] is row], refused
