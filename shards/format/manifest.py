"""The manifest of a data set: its shards, their hashes, and the identity that runs and releases record."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shards.format.entries import ShardEntry, ShardTable, TableBuilder, is_entry
from shards.format.sample import FORMAT_NAME, FORMAT_VERSION
from shards.storage import Place, is_local, parse_place
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import (
    atomic_path,
    canonical_json,
    describe_missing_folder,
    format_os_error,
    sha256_bytes,
    write_json,
)

MANIFEST, SIZES = "manifest.json", "sizes.json"
_HASHED_AT_ONCE = 1000


@dataclass(frozen=True)
class Manifest:
    """A data set: ordered shards, and provenance. Only the shards determine the identity."""

    shards: Sequence[ShardEntry]
    """A `ShardTable` if the manifest was read from a file."""
    provenance: dict[str, Any]

    @property
    def counts(self) -> Sequence[int]:
        """Number of samples of each shard."""
        return (
            self.shards.samples if isinstance(self.shards, ShardTable) else [s.samples for s in self.shards]
        )

    @property
    def shard_bytes(self) -> Sequence[int]:
        """Size of each tar."""
        return self.shards.bytes if isinstance(self.shards, ShardTable) else [s.bytes for s in self.shards]

    @cached_property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(self.counts)

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the canonical JSON of format version and, per shard, name, samples, bytes and hashes."""
        empty = canonical_json({"format_version": FORMAT_VERSION, "shards": []})
        digest = hashlib.sha256(empty.removesuffix(b"]}"))
        # In pieces, because the whole text would need as much memory as the manifest itself.
        for first in range(0, len(self.shards), _HASHED_AT_ONCE):
            piece = self.shards[first : first + _HASHED_AT_ONCE]
            text = canonical_json([[s.name, s.samples, s.bytes, s.sha256, s.rows_sha256] for s in piece])
            digest.update((b"," if first else b"") + text[1:-1])
        digest.update(b"]}")
        return digest.hexdigest()

    @property
    def bytes(self) -> int:
        """Size of all tars together."""
        return sum(self.shard_bytes)

    @property
    def sizes(self) -> dict[str, int]:
        """The content of sizes.json: shard name -> samples."""
        return {shard.name: shard.samples for shard in self.shards}

    def write(self, folder: Path) -> None:
        """Writes manifest.json, and sizes.json for open_clip's reader: both, or neither if the disk is full."""
        record = {
            "format": FORMAT_NAME,
            "format_version": FORMAT_VERSION,
            "identity": self.identity,
            "samples": self.samples,
            "bytes": self.bytes,
            "shards": [asdict(shard) for shard in self.shards],
            "provenance": self.provenance,
        }
        with atomic_path(folder / MANIFEST) as manifest, atomic_path(folder / SIZES) as sizes:
            write_json(manifest, record)
            write_json(sizes, self.sizes)


def find_manifest(folder: str | Place, field: str = "path") -> Place:
    """Returns the path of a data set's manifest; `field` is the name of the folder in error lines.

    Raises:
        UserError: if the folder or its manifest is missing.
    """
    folder = parse_place(folder, field)
    path = folder / MANIFEST
    if is_local(folder) and not folder.is_dir():  # object stores have no folders
        problem = describe_missing_folder(folder)
        raise UserError(f"{field}={folder}: {problem}; build it with `uniemox shards pack`")
    if not path.is_file():
        splits = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST}"))
        fix = (
            f"name one of its splits: {', '.join(splits)}"
            if splits
            else "build it with `uniemox shards pack`"
        )
        raise UserError(f"{field}={folder}: has no {MANIFEST}; {fix}")
    return path


def read_manifest(folder: str | Place, field: str = "path") -> Manifest:
    """Reads and checks a manifest; `field` is the name of the folder in error lines.

    Raises:
        UserError: if the folder, its manifest or its samples are missing, or the format is newer than this version.
    """
    path = find_manifest(folder, field)
    try:
        manifest, stated = _parse(path.read_text(encoding="utf-8"), path)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a readable manifest ({error!r}); pack again or restore it") from None
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(
            f"{path}: cannot be read ({format_os_error(error)}); pack again or restore it"
        ) from None
    for what, given, actual in zip(("identity", "samples", "bytes"), stated, _sums(manifest)):
        if given != actual:
            raise UserError(
                f"{path}: was edited: {what} {str(given)[:12]} does not match its shards; restore it or pack again"
            )
    if manifest.samples == 0:
        raise UserError(f"{field}={folder}: has no samples; pack a source with pictures")
    return manifest


def _parse(text: str, path: Place) -> tuple[Manifest, tuple[Any, ...]]:
    """A manifest, and the totals that its text states."""
    builder = TableBuilder()

    def entry_or_object(found: dict[str, Any]) -> Any:
        """Moves an object with a shard's fields to the table at once, because the objects of all shards need several
        times its memory. Provenance must not contain such an object."""
        if found.keys() != _FIELDS:
            return found
        entry = ShardEntry(**found)
        if not is_entry(entry):
            raise ValueError(f"{entry} is not a shard")
        builder.add(entry)
        return _Number(len(builder) - 1)

    record = json.loads(text, object_hook=entry_or_object, parse_float=_finite, parse_constant=_finite)
    version = record["format_version"]
    if record["format"] != FORMAT_NAME or not 1 <= version <= FORMAT_VERSION:
        raise UserError(
            f"{path}: format {record['format']} {version} is not readable by this version "
            f"(it reads {FORMAT_NAME} up to {FORMAT_VERSION}); update uniemox-dist"
        )
    listed = record["shards"]
    if strange := [entry for entry in listed if type(entry) is not _Number]:
        raise ValueError(f"{strange[0]} is not a shard")
    if listed != list(range(len(builder))):
        raise ValueError("provenance lists shards")
    table = builder.build()
    manifest = Manifest(table, record["provenance"])
    if not isinstance(manifest.provenance, dict):
        raise ValueError("provenance is not an object")
    if len(set(table.names())) != len(table):
        raise ValueError("a shard is listed twice")
    return manifest, (record["identity"], record["samples"], record["bytes"])


def _sums(manifest: Manifest) -> tuple[Any, ...]:
    return manifest.identity, manifest.samples, manifest.bytes


_FIELDS = ShardEntry.__dataclass_fields__.keys()


class _Number(int):
    """The place in the table of an entry that has been read."""


def _finite(text: str) -> float:
    """Parses a number; raises ValueError for NaN and infinity, which the format does not allow."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a number")
    return value


def find_manifest_folders(folder: Place) -> list[Place]:
    """The folder itself if it has a manifest, otherwise its subfolders (splits) that have one."""
    if (folder / MANIFEST).is_file():
        return [folder]
    return sorted((p.parent for p in folder.glob(f"*/{MANIFEST}")), key=str)


def combined_identity(identities: Sequence[str]) -> str:
    """The identity of a mix: that of its single source, or a hash over all of them in order."""
    if len(identities) == 1:
        return identities[0]
    return sha256_bytes(canonical_json(list(identities)))
