"""The manifest of a data set: its shards, their hashes, and the identity that runs and releases record."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.format import FORMAT_NAME, FORMAT_VERSION
from shards.storage import Place, is_local, place
from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.files import canonical_json, sha256_bytes, write_json

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ShardEntry:
    """One shard as the manifest knows it."""

    name: str
    samples: int
    bytes: int
    sha256: str
    """Of the tar file."""
    index_sha256: str
    """Of the index file."""
    rows_sha256: str
    """Of the index's logical rows: equal for equal content, whatever Parquet library wrote it."""


@dataclass(frozen=True)
class Manifest:
    """A data set: ordered shards plus provenance. Only the shards enter the identity."""

    shards: tuple[ShardEntry, ...]
    provenance: dict[str, Any]

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def identity(self) -> str:
        """SHA-256 of the canonical JSON of format version and, per shard, name, samples, bytes and hashes."""
        shards = [[s.name, s.samples, s.bytes, s.sha256, s.rows_sha256] for s in self.shards]
        return sha256_bytes(canonical_json({"format_version": FORMAT_VERSION, "shards": shards}))

    def write(self, folder: Path) -> None:
        """Writes manifest.json, and sizes.json for open_clip's reader."""
        write_json(folder / "sizes.json", {shard.name: shard.samples for shard in self.shards})
        write_json(
            folder / MANIFEST,
            {
                "format": FORMAT_NAME,
                "format_version": FORMAT_VERSION,
                "identity": self.identity,
                "samples": self.samples,
                "bytes": sum(shard.bytes for shard in self.shards),
                "shards": [asdict(shard) for shard in self.shards],
                "provenance": self.provenance,
            },
        )


def read_manifest(folder: str | Place, field: str = "path") -> Manifest:
    """Reads and checks a manifest; `field` is what error lines call the folder.

    Raises:
        UserError: if the folder, its manifest or its samples are missing, or the format is newer than ours.
    """
    folder = place(folder, field)
    path = folder / MANIFEST
    if is_local(folder) and not folder.is_dir():  # object stores have no folders
        raise UserError(f"{field}={folder}: no such folder; build it with `uniemox shards pack`")
    if not path.is_file():
        splits = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST}"))
        fix = (
            f"name one of its splits: {', '.join(splits)}"
            if splits
            else "build it with `uniemox shards pack`"
        )
        raise UserError(f"{field}={folder}: holds no {MANIFEST}; {fix}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["format_version"]
        if record["format"] != FORMAT_NAME or version > FORMAT_VERSION:
            raise UserError(
                f"{path}: format {record['format']} {version} is not one this version reads "
                f"({FORMAT_NAME} up to {FORMAT_VERSION}); update uniemox-dist"
            )
        manifest = Manifest(tuple(ShardEntry(**s) for s in record["shards"]), record["provenance"])
        stated = record["identity"]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a readable manifest ({error!r}); pack again or restore it") from None
    if manifest.identity != stated:
        raise UserError(
            f"{path}: was edited: identity {stated[:12]} does not fit its shards; restore or pack again"
        )
    if manifest.samples == 0:
        raise UserError(f"{field}={folder}: holds no samples; pack a source with pictures")
    return manifest


def manifest_folders(folder: Place) -> list[Place]:
    """The folder itself if it has a manifest, otherwise its splits that have one."""
    if (folder / MANIFEST).is_file():
        return [folder]
    return sorted((p.parent for p in folder.glob(f"*/{MANIFEST}")), key=str)


def combined_identity(identities: Sequence[str]) -> str:
    """The identity of a mix: one source's own, or a hash over all in order."""
    if len(identities) == 1:
        return identities[0]
    return sha256_bytes(canonical_json(list(identities)))
