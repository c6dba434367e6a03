"""`uniemox shards verify`: checks counts, hashes, positions and every picture of a data set, and quarantines bad
shards."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shards.format.entries import ShardEntry
from shards.format.index import index_path, read_all_rows, read_shard_rows, rows_sha256, to_rows
from shards.format.manifest import MANIFEST, SIZES, Manifest, find_manifest_folders, read_manifest
from shards.pack.partial import INSIDE, WORK
from shards.pictures.decode import check_picture
from shards.pictures.formats import BadPicture
from shards.pool import Progress, map_in_order
from shards.storage import Place, file_size, is_local, open_seekable
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import (
    convert_write_errors,
    describe_missing_folder,
    format_os_error,
    sha256_bytes,
)

QUARANTINE = "quarantine"
WORST = 5
"""Damaged samples of one shard that are listed one by one."""


@dataclass(frozen=True)
class Verdict:
    """The problems of one shard, or of another file of a data set."""

    folder: Path
    shard: str
    samples: int
    problems: tuple[str, ...]


def verify(
    folders: list[Path], *, workers: int = 0, check: str = "decode", progress: Progress | None = None
) -> list[Verdict]:
    """Checks every shard of some data sets. Returns one verdict per shard, in order, and one for each other bad file.

    `check` "decode" reads all data of every picture, "header" only hashes it.

    Raises:
        UserError: if a manifest cannot be read.
        Fault: if a worker is killed.
    """
    manifests = {folder: read_manifest(folder, "DIR") for folder in folders}
    jobs = [(folder, entry, check) for folder, manifest in manifests.items() for entry in manifest.shards]
    verdicts = list(map_in_order(_verify_shard, jobs, workers=workers, progress=progress))
    for folder, manifest in manifests.items():
        verdicts += [
            Verdict(folder, tar.name, 0, ("is in the folder, but not in the manifest",))
            for tar in ([] if is_appending(folder) else sorted(folder.glob("*.tar")))
            if tar.name not in manifest.sizes
        ]
        if (problem := _sizes_problem(folder, manifest)) is not None:
            verdicts.append(Verdict(folder, SIZES, 0, (problem,)))
    return verdicts


def count_leaks(folders: Sequence[Place]) -> dict[tuple[str, str], int]:
    """The number of pictures with the same bytes in two splits, by the names of the splits, where it is not 0.

    The first 64 bits of their hashes are compared.

    Raises:
        UserError: if an index does not match its manifest.
    """
    hashes = {}
    for folder in folders:
        tables = [
            read_shard_rows(folder, entry, ["image_sha256"]) for entry in read_manifest(folder, "DIR").shards
        ]
        texts = [text for table in tables for text in table["image_sha256"].to_pylist()]
        hashes[folder.name] = np.unique(np.array([int(text[:16], 16) for text in texts], np.uint64))
    pairs = {(a, b): len(np.intersect1d(hashes[a], hashes[b])) for a, b in combinations(hashes, 2)}
    return {pair: count for pair, count in pairs.items() if count}


def is_appending(folder: Place) -> bool:
    """Whether an append to a data set or its splits is running or was interrupted. Its new shards may be in the folder
    before the manifest lists them."""
    if str(folder).startswith(("http://", "https://")):  # nothing is appended there
        return False
    places = [folder / INSIDE, folder.parent / INSIDE]
    return any(
        file_size(place / name) is not None for place in places for name in ("plan.json", f"{WORK}/plan.json")
    )


def _sizes_problem(folder: Place, manifest: Manifest) -> str | None:
    if file_size(folder / SIZES) is None:
        return "is missing"
    try:
        sizes = json.loads((folder / SIZES).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return "cannot be read"
    return None if sizes == manifest.sizes else "differs from the manifest"


def quarantine(verdicts: list[Verdict]) -> dict[Path, Manifest | None]:
    """Moves bad shards into `quarantine/` of their data set and rewrites its manifest.

    Returns the new manifests by folder; None if no shard is left. The data set's identity changes, and its provenance
    lists the moved shards.

    Raises:
        UserError: if a data set cannot be written; then none of its files is moved.
    """
    written: dict[Path, Manifest | None] = {}
    for folder in sorted({verdict.folder for verdict in verdicts if verdict.problems}):
        if is_appending(folder):
            raise UserError(
                f"--quarantine: an append to {folder} is running or was interrupted; finish it with `shards pack "
                "--append --resume` first"
            )
        named = {verdict.shard for verdict in verdicts if verdict.folder == folder and verdict.problems}
        with convert_write_errors(f"DIR={folder}", "verify a copy in a writable folder"):
            written[folder] = _quarantine_shards(folder, sorted(named - {SIZES}))
    return written


def _quarantine_shards(folder: Path, bad: list[str]) -> Manifest | None:
    manifest = read_manifest(folder, "DIR")
    kept = tuple(entry for entry in manifest.shards if entry.name not in bad)
    before = manifest.provenance.get("quarantined")
    moved = [*(before if isinstance(before, list) else []), *bad]
    if bad:
        (folder / QUARANTINE / "index").mkdir(parents=True, exist_ok=True)
    if kept:  # before the files are moved, so that the manifest never lists missing files
        more = {"quarantined": moved} if moved else {}
        manifest = Manifest(kept, {**manifest.provenance, **more}, manifest.format_version)
        manifest.write(folder)
    else:
        _move(folder / MANIFEST, folder)
    for name in bad:
        _move(folder / name, folder)
        _move(index_path(folder, name), folder)
    return manifest if kept else None


def _move(path: Path, folder: Path) -> None:
    if path.exists():
        shutil.move(path, folder / QUARANTINE / path.relative_to(folder))


def find_data_sets(folder: Path) -> list[Path]:
    """The data sets at or directly below a folder.

    Raises:
        UserError: if there is none.
    """
    found = find_manifest_folders(folder)
    if not found:
        missing = is_local(folder) and not folder.is_dir()
        problem = describe_missing_folder(folder) if missing else "has no manifest.json"
        raise UserError(f"DIR={folder}: {problem}; build it with `uniemox shards pack`")
    return found


def _verify_shard(folder: Path, entry: ShardEntry, check: str) -> Verdict:
    problems: list[str] = []
    try:
        problems += _problems(folder, entry, check)
    except OSError as error:
        if not is_local(folder):  # a server may be unavailable; this is not a fault of the shard
            raise
        problems.append(f"cannot be read ({format_os_error(error)})")
    return Verdict(folder, entry.name, entry.samples, tuple(problems))


def _problems(folder: Path, entry: ShardEntry, check: str) -> Iterator[str]:
    tar, index = folder / entry.name, index_path(folder, entry.name)
    size = file_size(tar)
    if size is None:
        yield "the tar is missing"
        return
    if size != entry.bytes:
        yield f"has {size} bytes instead of {entry.bytes}"
    elif _sha256(tar) != entry.sha256:
        yield "its bytes have changed since packing (SHA-256)"
    if file_size(index) is None:
        yield "its index is missing"
        return
    if _sha256(index) != entry.index_sha256:
        yield "its index is not the one that was written (SHA-256)"
    try:
        rows = to_rows(read_all_rows(index))
    except UserError as error:
        yield f"its index cannot be read: {error}"
        return
    live = [row for row in rows if "refused" not in row]
    if len(live) != entry.samples:
        yield f"its index has {len(live)} samples instead of {entry.samples}"
    if rows_sha256(rows) != entry.rows_sha256:
        yield "the rows of its index do not match the manifest's hash"
    with open_seekable(tar) as file:
        damaged = [damage for row in live if (damage := _damage(file, row, size, check))]
    yield from damaged[:WORST]
    if len(damaged) > WORST:
        yield f"and {len(damaged) - WORST} more damaged samples"


def _sha256(path: Place) -> str:
    digest = hashlib.sha256()
    with open_seekable(path) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _damage(file: BinaryIO, row: dict[str, Any], size: int, check: str) -> str | None:
    """The damage of one sample in a tar of `size` bytes; None if it is intact."""
    if row["image_offset"] + row["image_length"] > size:
        return f"{row['key']}: its picture is beyond the end of the tar"
    file.seek(row["image_offset"])
    data = file.read(row["image_length"])
    if sha256_bytes(data) != row["image_sha256"]:
        return f"{row['key']}: the picture's bytes do not match the index (SHA-256)"
    try:
        picture = check_picture(data, check=check)
    except BadPicture as bad:
        return f"{row['key']}: {bad.reason}: {bad.detail}"
    if (picture.width, picture.height) != (row["width"], row["height"]):
        return f"{row['key']}: is {picture.width} x {picture.height}, not {row['width']} x {row['height']}"
    return None
