"""The manifest of a data set: its shards, their hashes, and the identity that runs and releases record."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shards.format.entries import ShardEntry, ShardTable, TableBuilder, find_wrong_field, is_entry
from shards.format.sample import FORMAT_NAME, FORMAT_VERSION, MEMBERS_NAME, MEMBERS_VERSION
from shards.storage import Place, is_local, parse_place
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import (
    atomic_path,
    canonical_json,
    describe_missing_folder,
    format_os_error,
    hide_secrets,
    sha256_bytes,
    write_json,
)
from uniemox_dist.core.formatting import cut

MANIFEST, SIZES = "manifest.json", "sizes.json"
MEMBERS = "members"
"""Default folder of an index of members, beside the tars."""
_HASHED_AT_ONCE = 1000
_VERSIONS = {FORMAT_NAME: FORMAT_VERSION, MEMBERS_NAME: MEMBERS_VERSION}
_BUILD = {
    FORMAT_NAME: "build it with `uniemox shards pack`",
    MEMBERS_NAME: "write it with `uniemox shards index DIR --members`",
}
_OTHER = {
    FORMAT_NAME: "is an index of members, not a data set of pictures; name a folder that `uniemox shards pack` or "
    "`uniemox shards index` made",
    MEMBERS_NAME: "is a data set of pictures, not an index of members; write one with `uniemox shards index DIR "
    "--members`",
}
"""The errors of a manifest of the other format."""


@dataclass(frozen=True)
class Manifest:
    """A data set: ordered shards, and provenance. Only the shards determine the identity."""

    shards: Sequence[ShardEntry]
    """A `ShardTable` if the manifest was read from a file."""
    provenance: dict[str, Any]
    format_version: int = FORMAT_VERSION
    """The newest form of the samples in its tars. FORMAT.md states the differences."""
    format: str = FORMAT_NAME
    """`uniemox-shards` for pictures, `uniemox-members` for an index of any members."""

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
        empty = canonical_json({"format_version": self.format_version, "shards": []})
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
        """Writes manifest.json and, for a data set of pictures, sizes.json for open_clip's reader: both, or neither if
        the disk is full."""
        record = {
            "format": self.format,
            "format_version": self.format_version,
            "identity": self.identity,
            "samples": self.samples,
            "bytes": self.bytes,
            "shards": [asdict(shard) for shard in self.shards],
            "provenance": self.provenance,
        }
        with ExitStack() as files:
            write_json(files.enter_context(atomic_path(folder / MANIFEST)), record)
            if self.format == FORMAT_NAME:
                write_json(files.enter_context(atomic_path(folder / SIZES)), self.sizes)


def find_manifest(folder: str | Place, field: str = "path", *, format: str = FORMAT_NAME) -> Place:
    """Returns the path of the manifest in a folder; `field` is the name of the folder in error lines.

    Raises:
        UserError: if the folder or its manifest is missing.
    """
    folder = parse_place(folder, field)
    path = folder / MANIFEST
    if is_local(folder) and not folder.is_dir():  # object stores have no folders
        problem = describe_missing_folder(folder)
        raise UserError(f"{field}={hide_secrets(folder)}: {problem}; {_BUILD[format]}")
    if not path.is_file():
        splits = [path.name for path in find_manifest_folders(folder)]
        fix = f"name one of its splits: {', '.join(splits)}" if splits else _BUILD[format]
        raise UserError(f"{field}={hide_secrets(folder)}: has no {MANIFEST}; {fix}")
    return path


def read_manifest(folder: str | Place, field: str = "path", *, format: str = FORMAT_NAME) -> Manifest:
    """Reads and checks a manifest of a format; `field` is the name of the folder in error lines.

    Raises:
        UserError: if the folder, its manifest or its samples are missing, the manifest has the other format, or the
            format is newer than this version.
    """
    path = find_manifest(folder, field, format=format)
    try:
        manifest, stated = _parse(path.read_text(encoding="utf-8"), path, format)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}"
        raise UserError(
            f"{hide_secrets(path)}: not a readable manifest ({reason}); pack again or restore it"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "its JSON is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(
            f"{hide_secrets(path)}: not a readable manifest ({cut(reason)}); pack again or restore it"
        ) from None
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(
            f"{hide_secrets(path)}: cannot be read ({format_os_error(error)}); pack again or restore it"
        ) from None
    for what, given, actual in zip(("identity", "samples", "bytes"), stated, _sums(manifest)):
        if given != actual:
            raise UserError(
                f"{hide_secrets(path)}: was edited: {what} {cut(str(given), 12)} does not match its shards; restore "
                "it or pack again"
            )
    if manifest.samples == 0:
        raise UserError(f"{field}={hide_secrets(folder)}: has no samples; pack a source with pictures")
    return manifest


def _parse(text: str, path: Place, format: str) -> tuple[Manifest, tuple[Any, ...]]:
    """A manifest, and the totals that its text states."""
    builder = TableBuilder()

    def entry_or_object(found: dict[str, Any]) -> Any:
        """Moves an object with a shard's fields to the table at once, because the objects of all shards need several
        times its memory. Provenance must not contain such an object."""
        if found.keys() != _FIELDS:
            return found
        entry = ShardEntry(**found)
        try:
            legal = is_entry(entry)
        except TypeError:  # a text field is not a text
            legal = False
        if not legal:
            field, value, expected = find_wrong_field(entry)
            raise ValueError(f"shards[{len(builder)}].{field}={_show(value)} is not {expected}")
        builder.add(entry)
        return _Number(len(builder) - 1)

    record = json.loads(text, object_hook=entry_or_object, parse_float=_finite, parse_constant=_finite)
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    version = record.get("format_version")
    if type(version) is not int:
        raise ValueError(f"format_version={_show(version)} is not a whole number")
    stated = record.get("format")
    if stated != format and stated in (FORMAT_NAME, MEMBERS_NAME):
        raise UserError(f"{hide_secrets(path)}: {_OTHER[format]}")
    if stated != format or not 1 <= version <= _VERSIONS[format]:
        raise UserError(
            f"{hide_secrets(path)}: format {_show(stated)} {_show(version)} is not readable by this version "
            f"(it reads {format} up to {_VERSIONS[format]}); update uniemox-dist"
        )
    if lacking := [field for field in _RECORD if field not in record]:
        raise ValueError(f"it lacks {lacking[0]}")
    listed = record["shards"]
    if not isinstance(listed, list):
        raise ValueError(f"shards={_show(listed)} is not a list")
    for number, entry in enumerate(listed):
        if type(entry) is not _Number:
            raise ValueError(f"shards[{number}] {_why_no_shard(entry)}")
    if listed != list(range(len(builder))):
        raise ValueError("it has shards outside of the list shards, such as in provenance")
    table = builder.build()
    manifest = Manifest(table, record["provenance"], version, format)
    if not isinstance(manifest.provenance, dict):
        raise ValueError(f"provenance={_show(manifest.provenance)} is not an object")
    if len(set(table.names())) != len(table):
        name, _ = Counter(table.names()).most_common(1)[0]
        raise ValueError(f"the shard {_show(name)} is listed twice")
    for what, total in (("samples", manifest.samples), ("bytes", manifest.bytes)):
        if total > _MOST:
            raise ValueError(f"the {what} of all shards are {total}, more than 2^53")
    return manifest, (record["identity"], record["samples"], record["bytes"])


def _why_no_shard(entry: object) -> str:
    """The reason why an element of the list is not a shard."""
    if not isinstance(entry, dict):
        return f"is not a shard: {_show(entry)} is not an object"
    if lacking := [field for field in _FIELDS if field not in entry]:
        return f"is not a shard: it lacks {lacking[0]}"
    unknown = next(key for key in entry if key not in _FIELDS)
    return f"is not a shard: it has the unknown field {_show(unknown)}"


def _show(value: object) -> str:
    return cut(json.dumps(value, ensure_ascii=False), 80)


def _sums(manifest: Manifest) -> tuple[Any, ...]:
    return manifest.identity, manifest.samples, manifest.bytes


_RECORD = ("identity", "samples", "bytes", "shards", "provenance")
_MOST = 1 << 53
"""The largest total; larger whole numbers are not exact in all JSON readers, and overflow in the stream."""
_FIELDS = ShardEntry.__dataclass_fields__.keys()


class _Number(int):
    """The place in the table of an entry that has been read."""


def _finite(text: str) -> float:
    """Parses a number; raises ValueError for NaN and infinity, which the format does not allow."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{cut(text, 80)} is not a number")
    return value


def find_manifest_folders(folder: Place) -> list[Place]:
    """The folder itself if it has a manifest, otherwise its subfolders (splits) that have one. Hidden ones belong to
    packs that are not complete, and `members` may be an index of the folder's own tars."""
    if (folder / MANIFEST).is_file():
        return [folder]
    found = (path.parent for path in folder.glob(f"*/{MANIFEST}"))
    splits = (path for path in found if not path.name.startswith("."))
    return sorted((path for path in splits if path.name != MEMBERS or not is_members(path)), key=str)


def is_members(folder: Place) -> bool:
    """Whether the manifest of a folder begins as that of an index of members."""
    with (folder / MANIFEST).open("rb") as file:
        return f'"format": "{MEMBERS_NAME}"'.encode() in file.read(200)


def is_indexed(provenance: dict[str, Any]) -> bool:
    """Whether a data set has tars that `shards index` indexed, so that their samples may have members that the index
    does not list."""
    return any("indexed" in stated for stated in _stated_parts(provenance))


def combined_identity(identities: Sequence[str]) -> str:
    """The identity of a mix: that of its single source, or a hash over all of them in order."""
    if len(identities) == 1:
        return identities[0]
    return sha256_bytes(canonical_json(list(identities)))


def stated_ranges(provenance: dict[str, Any], dimension: str) -> list[tuple[float, float]]:
    """The different ranges (lowest and highest value) that a data set and the parts in it state for a dimension."""
    found: dict[tuple[float, float], None] = {}
    for stated in _stated_parts(provenance):
        ranges = stated.get("dimension_ranges")
        if isinstance(ranges, dict) and dimension in ranges:
            low, high = ranges[dimension]
            found[float(low), float(high)] = None
    return list(found)


def _stated_parts(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """The provenance of a data set, and that of the parts in it, which may be merged themselves."""
    found = [provenance]
    for name in ("merged", "appended"):
        for part in provenance.get(name) or ():
            if isinstance(part, dict):
                found += _stated_parts(part.get("provenance", part))
    return found
