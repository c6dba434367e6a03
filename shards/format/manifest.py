"""The manifest of a data set: its shards, their hashes, and the identity that runs and releases record."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, slots=True)  # a data set may have a hundred thousand
class ShardEntry:
    """One shard, as listed in the manifest."""

    name: str
    samples: int
    bytes: int
    sha256: str
    """SHA-256 of the tar file."""
    index_sha256: str
    """SHA-256 of the index file."""
    rows_sha256: str
    """Hash of the index's rows; independent of the Parquet library that wrote it."""


@dataclass(frozen=True)
class Manifest:
    """A data set: ordered shards, and provenance. Only the shards determine the identity."""

    shards: tuple[ShardEntry, ...]
    provenance: dict[str, Any]

    @cached_property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

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
        return sum(shard.bytes for shard in self.shards)

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


def read_manifest(folder: str | Place, field: str = "path") -> Manifest:
    """Reads and checks a manifest; `field` is the name of the folder in error lines.

    Raises:
        UserError: if the folder, its manifest or its samples are missing, or the format is newer than this version.
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
    record = json.loads(text, object_hook=_entry_or_object, parse_float=_finite, parse_constant=_finite)
    version = record["format_version"]
    if record["format"] != FORMAT_NAME or not 1 <= version <= FORMAT_VERSION:
        raise UserError(
            f"{path}: format {record['format']} {version} is not readable by this version "
            f"(it reads {FORMAT_NAME} up to {FORMAT_VERSION}); update uniemox-dist"
        )
    manifest = Manifest(tuple(record["shards"]), record["provenance"])
    if strange := [entry for entry in manifest.shards if not _is_entry(entry)]:
        raise ValueError(f"{strange[0]} is not a shard")
    if not isinstance(manifest.provenance, dict):
        raise ValueError("provenance is not an object")
    if len(manifest.sizes) != len(manifest.shards):
        raise ValueError("a shard is listed twice")
    return manifest, (record["identity"], record["samples"], record["bytes"])


def _sums(manifest: Manifest) -> tuple[Any, ...]:
    return manifest.identity, manifest.samples, manifest.bytes


_FIELDS = ShardEntry.__dataclass_fields__.keys()
# Checks three hashes and a name at once; a billion samples have 100,000 entries.
_TEXTS = re.compile(r"(?:[0-9a-f]{64}/){3}[^/\0]+\.tar")


def _entry_or_object(found: dict[str, Any]) -> ShardEntry | dict[str, Any]:
    """Hook of the JSON reader: converts an object with a shard's fields at once, because the dictionaries of all shards
    need as much memory as the rest of startup. Provenance must not contain such an object."""
    return ShardEntry(**found) if found.keys() == _FIELDS else found


def _is_entry(entry: Any) -> bool:
    """Whether an entry has legal values; raises TypeError if a text field is not a text."""
    return (
        type(entry) is ShardEntry
        and type(entry.samples) is type(entry.bytes) is int
        and 0 <= entry.samples < 1 << 63
        and 0 <= entry.bytes < 1 << 63
        and _TEXTS.fullmatch("/".join((entry.sha256, entry.index_sha256, entry.rows_sha256, entry.name)))
        is not None
    )


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
