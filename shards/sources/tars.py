"""The tars that a source names, and the samples of each that belong to the data set.

SOURCE is a tar, a folder, a pattern (`*`), braces as webdataset's users write them (`{000000..000012}.tar`), or several
of these joined by `::`. In a folder, tars are found at any depth. If none is at the top, the top folders are splits.
Where a folder has a manifest of ours, its index decides which samples of its tars count: tars of a selection or a
split may be links to tars that hold others, too.
"""

import bz2
import gzip
import json
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from shards.format.entries import ShardEntry
from shards.format.index import check_tar, read_shard_rows
from shards.format.manifest import MANIFEST, read_manifest
from shards.format.sample import FORMAT_NAME
from shards.format.tar_names import expand_braces
from shards.format.tars import PICTURES
from shards.pictures.formats import identify_format
from shards.sources import Record
from shards.sources.files import SPLITS, is_clutter, name_below, read_head, split_name
from shards.sources.values import BAD_VALUE
from shards.storage import Place, find_files, match_pattern, open_seekable, parse_place
from uniemox_dist.core.errors import UserError

TARS = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""Ends of the names of tars. Whether a tar is compressed depends on its content."""
_ARCHIVES = (
    ".zip",
    ".7z",
    ".rar",
    ".tar.lz4",
    ".tar.lzma",
    ".tar.lz",
    ".tar.z",
    ".tar.lzo",
    ".tar.br",
    ".cpio",
)
_SIDE_FILES = (".parquet", ".json", ".jsonl", ".csv", ".tsv", ".txt", ".md")
"""Ends of the names of files beside tars that hold no pictures."""
_MAGIC_AT, _MAGIC = 257, b"ustar"
_OWN_FOLDERS = ("index", "cache", "quarantine")
"""Folders inside a data set of ours that hold none of its tars."""
_UNFINISHED = ".partial"
"""A folder of an append that is not complete; tars that the manifest does not list may belong to it."""


@dataclass(frozen=True)
class SourceTar:
    """A tar of a source."""

    place: Place
    name: str
    """Its path below SOURCE, unique in the source."""
    split: str | None = None
    entry: ShardEntry | None = None
    """What the manifest beside it states; None without a manifest of ours."""

    def read_chosen(self) -> frozenset[int] | None:
        """The positions of the pictures in its index; None if it has none, so that all of its samples count.

        Raises:
            UserError: if the tar or its index does not match the manifest.
        """
        if self.entry is None:
            return None
        check_tar(self.place.parent, self.entry, "SOURCE")
        table = read_shard_rows(self.place.parent, self.entry, ["image_offset"])
        return frozenset(table["image_offset"].to_pylist())


def find_tars(source: str) -> tuple[list[SourceTar], list[Record]]:
    """The tars of a source in the order of their names, and refused records for pictures and archives beside them, and
    for tars in hidden folders.

    Raises:
        UserError: if there is no tar, one is missing, or a folder has a tar that its manifest does not list.
    """
    parts = _expand(source)
    tars: list[SourceTar] = []
    others: list[Record] = []
    for part in parts:
        found, refused = _find(part, source)
        tars += found
        others += refused
    if not tars:
        raise UserError(
            f"SOURCE={source}: has no tars; give a folder of .tar files, or a pattern"
            + (f"; {others[0].name} is {others[0].refused[1]}" if others and others[0].refused else "")
        )
    if len(parts) > 1:
        tars = _name_below_common(tars, source)
    return _add_entries(tars, source), others


def stands_for_several(source: str) -> bool:
    """Whether a source has braces or `::`, so that it is not the name of one file or folder.

    Raises:
        UserError: for a shell command, and for more names than can be listed.
    """
    return _expand(source) != [source]


# ---- names


def _expand(source: str) -> list[str]:
    """The names that a source with `::` and braces stands for."""
    if os.path.exists(source):
        return [source]
    found: list[str] = []
    for part in source.split("::"):
        if part.startswith("pipe:"):
            raise UserError(f"SOURCE={source}: pipe: runs a shell command; give the path or URL of the tar")
        if not part:
            raise UserError(f"SOURCE={source}: has an empty name beside ::; give tars joined by ::")
        found += expand_braces(part, f"SOURCE={source}")
    return found


def _name_below_common(tars: list[SourceTar], source: str) -> list[SourceTar]:
    """Tars of several places, named by their paths below the folder that holds all of them."""
    places = [str(tar.place) for tar in tars]
    if (
        repeated := {place for place in places if places.count(place) > 1}
        if len(set(places)) < len(places)
        else ()
    ):
        raise UserError(f"SOURCE={source}: {min(repeated)} is listed twice; list each tar once")
    above = [place.split("/")[:-1] for place in places]
    common = 0
    while all(len(parts) > common and parts[common] == above[0][common] for parts in above):
        common += 1
    names = ["/".join(place.split("/")[common:]) for place in places]
    return [replace(tar, name=name) for tar, name in zip(tars, names)]


# ---- files


def _find(part: str, source: str) -> tuple[list[SourceTar], list[Record]]:
    if (named := match_pattern(part, "SOURCE")) is not None and not os.path.exists(part):
        return [SourceTar(tar, name_below(tar, part)) for tar in named if tar.is_file()], []
    root = parse_place(part, "SOURCE")
    if root.is_file():
        return [SourceTar(root, name_below(root, part))], []
    if not root.is_dir():
        what = f"{part}: " if part != source else ""
        raise UserError(
            f"SOURCE={source}: {what}no such file or folder; give a tar, a folder of tars, or a pattern"
        )
    every = sorted(find_files(root))
    paths = _without_clutter(every)
    splits = _splits([path for path in paths if path.lower().endswith(TARS)], source)
    reasons = {path: _refuse(root, path) for path in paths} | _find_hidden_tars(every)
    others = [
        Record(os.fsencode(path).decode("utf-8", "backslashreplace"), b"", refused=refused)
        for path, refused in sorted(reasons.items())
        if refused is not None
    ]
    return [SourceTar(root / path, path, split) for path, split in splits.items()], others


def _refuse(root: Place, path: str) -> tuple[str, str] | None:
    """Why a file in a folder of tars is not read, if it holds pictures by its name or content."""
    name = path.lower()
    if name.endswith((*TARS, *_SIDE_FILES)):
        return None
    if name.endswith(_ARCHIVES):
        return "format", "an archive that is no tar; unpack it, or make a tar of it"
    is_picture = name.rpartition(".")[2] in PICTURES
    if not is_picture:
        try:
            head = read_head(root / path)
        except ValueError:
            return None
        if head[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] == _MAGIC:
            return "format", "a tar by its content; give it a name that ends with .tar"
        is_picture = identify_format(head) is not None
    if is_picture:
        return "unreadable", "a picture beside the tars, not in one; pack such pictures with --layout folder"
    return None


def _find_hidden_tars(paths: list[str]) -> dict[str, tuple[str, str]]:
    """Tars in hidden folders, apart from those of an append that is not complete."""
    refused = ("unreadable", "a tar in a hidden folder; move it, or give it as SOURCE")
    return {
        path: refused
        for path in paths
        if path.lower().endswith(TARS)
        and any(part.startswith(".") and part != _UNFINISHED for part in path.split("/")[:-1])
    }


def _splits(tars: list[str], source: str) -> dict[str, str | None]:
    """The split of each tar of a folder: its top folder if no tar is at the top."""
    tops = {path: path.split("/")[0] for path in tars if "/" in path}
    if len(tops) == len(tars):
        return {path: split_name(top) for path, top in tops.items()}
    named = sorted({top for top in tops.values() if top.lower() in SPLITS})
    if named:
        raise UserError(
            f"SOURCE={source}: has tars beside folders of splits ({', '.join(named)}); move them into the folder "
            "of their split, or give the folders one by one"
        )
    return dict.fromkeys(tars)


def _without_clutter(paths: list[str]) -> list[str]:
    own = {path.removesuffix(MANIFEST) for path in paths if path.endswith(f"/{MANIFEST}") or path == MANIFEST}
    hidden = tuple(f"{folder}{name}/" for folder in own for name in _OWN_FOLDERS)
    return [
        path
        for path in paths
        if not path.startswith(hidden) and not any(map(is_clutter, path.split("/")[:-1]))
    ]


# ---- data sets of ours


def _add_entries(tars: list[SourceTar], source: str) -> list[SourceTar]:
    """Tars with their entries in the manifests beside them, where there is one of ours."""
    manifests: dict[str, dict[str, ShardEntry] | None] = {}
    found: list[SourceTar] = []
    for tar in tars:
        folder = str(tar.place.parent)
        if folder not in manifests:
            manifests[folder] = _read_own_entries(tar.place.parent)
        entries = manifests[folder]
        if entries is None:
            found.append(tar)
        elif (entry := entries.get(tar.place.name)) is not None:
            found.append(replace(tar, entry=entry))
        elif not any((above / _UNFINISHED).is_dir() for above in (tar.place.parent, tar.place.parent.parent)):
            raise UserError(
                f"SOURCE={source}: {tar.name} is not in the {MANIFEST} beside it; move it away, or delete {MANIFEST} "
                "and index/ to read all tars of that folder"
            )
    return found


def _read_own_entries(folder: Place) -> dict[str, ShardEntry] | None:
    """The entries of a data set by name; None for a folder without a manifest of ours."""
    try:
        text = (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if f'"{FORMAT_NAME}"'.encode() not in text:  # the manifest of another program
        return None
    return {entry.name: entry for entry in read_manifest(folder, "SOURCE").shards}


def are_one_pack(tars: list[SourceTar]) -> bool:
    """Whether all tars belong to data sets that this project packed from one listing; the names of their samples are
    then unique."""
    listings = {_listing(folder) for folder in {str(t.place.parent): t.place.parent for t in tars}.values()}
    return len(listings) == 1 and None not in listings


def _listing(folder: Place) -> str | None:
    """The hash of the listing that a data set was packed from; None if its manifest has none."""
    try:
        return str(json.loads((folder / MANIFEST).read_bytes())["provenance"]["source_sha256"])
    except (OSError, *BAD_VALUE):
        return None


# ---- compressed tars


def _open_zstd(raw: BinaryIO) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(raw, "zstd")


_COMPRESSED: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": _open_zstd,
}
_REFUSED = {b"\x04\x22\x4d\x18": "lz4 -d", b"\x1f\x9d": "uncompress", b"LZIP": "lzip -d", b"PK\3\4": "unzip"}
_AT_ONCE = 1 << 20


@contextmanager
def decompressed(tar: Place, scratch: Path | None) -> Iterator[Place]:
    """Yields the tar itself, or a temporary copy in the folder `scratch` if it is compressed (gzip, bzip2, xz, zstd).

    Raises:
        UserError: if it is compressed otherwise, damaged, or `scratch` is None.
    """
    with open_seekable(tar) as raw:
        start = raw.read(6)
        raw.seek(0)
        for magic, tool in _REFUSED.items():
            if start.startswith(magic):
                raise UserError(f"SOURCE={tar}: not a tar that can be read; convert it first ({tool})")
        opener = next((opener for magic, opener in _COMPRESSED.items() if start.startswith(magic)), None)
        if opener is None or scratch is None:
            yield tar
            return
        with tempfile.NamedTemporaryFile(dir=scratch, suffix=".tar") as copy:
            _decompress(tar, opener(raw), copy)
            yield Path(copy.name)


def _decompress(tar: Place, source: Any, target: Any) -> None:
    while True:
        try:
            piece = source.read(_AT_ONCE)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"SOURCE={tar}: not a complete compressed tar ({reason}); copy it again or remove it"
            ) from None
        if not piece:
            target.flush()
            return
        target.write(piece)
