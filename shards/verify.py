"""`uniemox shards verify`: is what lies there what was packed? Counts, hashes, places and every picture."""

import hashlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from shards.index import index_path, read_all_rows, rows_sha256, to_rows
from shards.manifest import MANIFEST, Manifest, ShardEntry, manifest_folders, read_manifest
from shards.pack import Progress
from shards.pictures import BadPicture, inspect
from shards.storage import Place, open_seekable, size_of
from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.files import sha256_bytes

QUARANTINE = "quarantine"
WORST = 5
"""Damaged samples of one shard that are told one by one."""


@dataclass(frozen=True)
class Verdict:
    """What is wrong with one shard."""

    folder: Path
    shard: str
    samples: int
    problems: tuple[str, ...]


def verify(
    folders: list[Path], *, workers: int = 0, check: str = "decode", progress: Progress | None = None
) -> list[Verdict]:
    """Checks every shard of some data sets; one verdict each, in order.

    `check` "decode" goes through the data of every picture, "header" only hashes it.

    Raises:
        UserError: if a manifest cannot be read.
    """
    jobs = [(folder, entry) for folder in folders for entry in read_manifest(folder, "DIR").shards]
    if progress is not None:
        progress.total = len(jobs)
    verdicts = []
    for verdict in _map(jobs, check, workers):
        verdicts.append(verdict)
        if progress is not None:
            progress.update(1)
    for folder in folders:
        named = {entry.name for found, entry in jobs if found == folder}
        verdicts += [
            Verdict(folder, tar.name, 0, ("lies there, but the manifest does not name it",))
            for tar in sorted(folder.glob("*.tar"))
            if tar.name not in named
        ]
    return verdicts


def quarantine(verdicts: list[Verdict]) -> dict[Path, Manifest | None]:
    """Moves bad shards into `quarantine/` of their data set and writes its manifest anew; None where none is left.

    The data set gets another identity, and its provenance names what was moved.
    """
    written: dict[Path, Manifest | None] = {}
    for folder in sorted({verdict.folder for verdict in verdicts if verdict.problems}):
        bad = {
            verdict.shard: verdict.problems
            for verdict in verdicts
            if verdict.folder == folder and verdict.problems
        }
        manifest = read_manifest(folder, "DIR")
        kept = tuple(entry for entry in manifest.shards if entry.name not in bad)
        moved = [*manifest.provenance.get("quarantined", []), *sorted(bad)]
        written[folder] = None
        if kept:  # before the files go: a manifest that names what is not there cannot be read
            smaller = Manifest(kept, {**manifest.provenance, "quarantined": moved})
            smaller.write(folder)
            written[folder] = smaller
        else:
            _move(folder / MANIFEST, folder)
        for name in bad:
            _move(folder / name, folder)
            _move(index_path(folder, name), folder)
    return written


def _move(path: Path, folder: Path) -> None:
    if path.exists():
        target = folder / QUARANTINE / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)


def folders_of(folder: Path) -> list[Path]:
    """The data sets at or directly below a folder.

    Raises:
        UserError: if there is none.
    """
    found = manifest_folders(folder)
    if not found:
        raise UserError(f"DIR={folder}: holds no manifest.json; build it with `uniemox shards pack`")
    return found


def _map(jobs: list[tuple[Path, ShardEntry]], check: str, workers: int) -> Iterator[Verdict]:
    if not jobs:
        return
    arguments = (*zip(*jobs), repeat(check))
    if not workers:
        yield from map(_verify_shard, *arguments)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_verify_shard, *arguments)


def _verify_shard(folder: Path, entry: ShardEntry, check: str) -> Verdict:
    return Verdict(folder, entry.name, entry.samples, tuple(_problems(folder, entry, check)))


def _problems(folder: Path, entry: ShardEntry, check: str) -> Iterator[str]:
    tar, index = folder / entry.name, index_path(folder, entry.name)
    size = size_of(tar)
    if size is None:
        yield "the tar is missing"
        return
    if size != entry.bytes:
        yield f"has {size} bytes instead of {entry.bytes}"
    elif _sha256(tar) != entry.sha256:
        yield "its bytes are not those that were packed (SHA-256)"
    if size_of(index) is None:
        yield "its index is missing"
        return
    if _sha256(index) != entry.index_sha256:
        yield "its index is not the one that was written (SHA-256)"
    try:
        rows = to_rows(read_all_rows(index))
    except (UserError, pa.ArrowException) as error:
        yield f"its index cannot be read: {error}"
        return
    live = [row for row in rows if "refused" not in row]
    if len(live) != entry.samples:
        yield f"its index has {len(live)} samples instead of {entry.samples}"
    if rows_sha256(rows) != entry.rows_sha256:
        yield "its index says other things than the manifest's hash of its rows"
    with open_seekable(tar) as file:
        damaged = [damage for row in live if (damage := _damage(file, row, check))]
    yield from damaged[:WORST]
    if len(damaged) > WORST:
        yield f"and {len(damaged) - WORST} more damaged samples"


def _sha256(path: Place) -> str:
    digest = hashlib.sha256()
    with open_seekable(path) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _damage(file: BinaryIO, row: dict[str, Any], check: str) -> str | None:
    """What is wrong with one sample."""
    file.seek(row["image_offset"])
    data = file.read(row["image_length"])
    if len(data) != row["image_length"]:
        return f"{row['key']}: lies beyond the end of the tar"
    if sha256_bytes(data) != row["image_sha256"]:
        return f"{row['key']}: the picture's bytes are not where or what the index says (SHA-256)"
    try:
        picture = inspect(data, check=check)
    except BadPicture as bad:
        return f"{row['key']}: {bad.reason}: {bad.detail}"
    if (picture.width, picture.height) != (row["width"], row["height"]):
        return f"{row['key']}: is {picture.width} x {picture.height}, not {row['width']} x {row['height']}"
    return None
