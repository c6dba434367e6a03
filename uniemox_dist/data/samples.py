"""Random access to the samples of any tars in webdataset's form, through an index of members or the index of a data set
that `shards pack` wrote."""

from pathlib import Path
from typing import Any, TypeVar

from shards.format.entries import TableBuilder
from shards.format.manifest import (
    MANIFEST,
    MEMBERS,
    Manifest,
    find_manifest_folders,
    is_indexed,
    read_manifest,
)
from shards.format.members import sample_sha256
from shards.format.sample import MEMBERS_NAME
from shards.format.tar_headers import BadTar
from shards.format.tar_names import split_tars
from shards.format.webdataset_samples import Grouped, load_webdataset, read_piece
from shards.storage import Place, file_size, is_local, parse_place
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import describe_missing_folder, hide_secrets, sha256_bytes
from uniemox_dist.core.formatting import cut
from uniemox_dist.data import index_rows
from uniemox_dist.data.index_rows import MemberRow, PackedRow
from uniemox_dist.data.indexed_reader import IndexedReader
from uniemox_dist.data.origin import ShardOrigin

R = TypeVar("R")
MAX_GAP = 1 << 16
"""Bytes between two members of a sample, headers and padding mostly, that are read rather than skipped."""

Sample = dict[str, Any]
"""A sample in webdataset's form: `__key__`, `__url__`, and each member's bytes by extension, in tar order."""


class SampleReader(IndexedReader[R]):
    """Random access to samples in webdataset's form."""

    def read(self, shard: int, row: int) -> Sample:
        """Reads the sample in a row of a shard.

        Raises:
            DamagedSample: if its bytes differ from the index.
            UserError: if the index does not match the manifest, or does not list all members.
            Fault: if the bytes cannot be read.
        """
        raise NotImplementedError

    def tar_url(self, shard: int) -> str:
        """Path or URL of a shard's tar: `__url__` of its samples."""
        return self._join(self.manifest.shards[shard].name)

    def _join(self, name: str) -> str:
        return name if self.url == "." else f"{self.url.rstrip('/')}/{name}"


class MemberReader(SampleReader[MemberRow]):
    """Reads tars by an index of members."""

    rows = index_rows.MEMBERS

    def read(self, shard: int, row: int) -> Sample:
        """As `SampleReader.read`."""
        entry, index = self.find(shard, row)
        spans = join_spans(index.offsets, index.lengths)

        def read(cached: bool) -> list[bytes]:
            pieces = [
                self.origin.read(entry, first, end - first, cached=cached) if end > first else b""
                for first, end, _ in spans
            ]
            return [
                piece[index.offsets[i] - first : index.offsets[i] - first + index.lengths[i]]
                for piece, (first, _, members) in zip(pieces, spans)
                for i in members
            ]

        def is_intact(contents: list[bytes]) -> bool:
            if not self.verify_hash:
                return [len(content) for content in contents] == index.lengths
            return sample_sha256(zip(index.names, contents)) == index.sha256

        contents = self.read_intact(entry, index.key, read, is_intact)
        return {"__key__": index.key, "__url__": self._join(entry.name), **dict(zip(index.names, contents))}


class PackedReader(SampleReader[PackedRow]):
    """Reads a data set of pictures: the range of each sample in its tar, with the picture's hash."""

    rows = index_rows.PACKED

    def read(self, shard: int, row: int) -> Sample:
        """As `SampleReader.read`."""
        entry, index = self.find(shard, row)

        def read(cached: bool) -> tuple[bytes, list[Grouped] | None]:
            data = self.origin.read(entry, index.offset, index.length, cached=cached)
            try:
                return data, read_piece(data)
            except BadTar:
                return data, None

        def is_intact(piece: tuple[bytes, list[Grouped] | None]) -> bool:
            data, found = piece
            first = index.image_offset - index.offset
            if found is None or not self.verify_hash:
                return found is not None
            if not 0 <= first <= len(data) - index.image_length:
                return True  # the picture is elsewhere in the tar
            return sha256_bytes(data[first : first + index.image_length]) == index.image_sha256

        _, found = self.read_intact(entry, index.key, read, is_intact)
        assert found is not None
        if len(found) != 1 or not self._is_whole(found[0], index):
            where = hide_secrets(self.url)
            raise UserError(
                f"{self.origin.field}={where}: {entry.name}: {cut(index.key)}: the index of pictures does not list all "
                f"members of this sample; {describe_command(self.url, self.is_local)}"
            )
        members = {name: content.data for name, content in found[0].members.items()}
        return {"__key__": found[0].key, "__url__": self._join(entry.name), **members}

    def _is_whole(self, sample: Grouped, index: PackedRow) -> bool:
        """Whether a range holds all members of its sample. If those of others lie between, `shards index` states the
        range of a single member."""
        first = index.image_offset - index.offset
        has_picture = any(content.offset == first for content in sample.members.values())
        return has_picture and (len(sample.members) > 1 or not is_indexed(self.manifest.provenance))


def join_spans(offsets: list[int], lengths: list[int]) -> list[tuple[int, int, list[int]]]:
    """The ranges of a tar that hold members: first byte, end, and the numbers of their members. Members with at most
    `MAX_GAP` bytes between them share a range."""
    spans: list[tuple[int, int, list[int]]] = []
    for i, (offset, length) in enumerate(zip(offsets, lengths)):
        if spans and 0 <= offset - spans[-1][1] <= MAX_GAP:
            first, _, members = spans[-1]
            members.append(i)
            spans[-1] = first, offset + length, members
        else:
            spans.append((offset, offset + length, [i]))
    return spans


def describe_command(url: str, local: bool) -> str:
    """The advice to index the tars of a folder."""
    where = hide_secrets(url)
    if local:
        return f"run `uniemox shards index {where} --members`"
    return f"run `uniemox shards index {where} --members --index FOLDER`, and name that folder as the index"


def open_samples(
    data: str | Path,
    *,
    index: str | Path | None = None,
    field: str,
    retry_s: float = 0.0,
    verify_hash: bool = True,
    share: tuple[int, int] = (0, 1),
) -> MemberReader | PackedReader:
    """Opens tars and checks that each exists with the size in the index.

    Args:
        data: a folder, a URL, one tar, or a pattern such as `s3://bucket/x/{00000..01234}.tar`, which selects some
            tars of the index.
        index: the folder that `uniemox shards index --members` wrote. By default the manifest in the folder of the
            tars if that is a data set of pictures, otherwise its folder `members`.
        field: the name of `data` in error lines.
        retry_s: seconds for which a failing read is retried.
        verify_hash: whether samples are compared with the hashes in the index.
        share: (rank, ranks): checks this rank's part of the tars only.

    Raises:
        UserError: if there is no index, it lacks a tar, or a tar is missing or has another size than the index states.
        Fault: if a store does not answer for `retry_s`.
    """
    url, names = split_tars(str(data), field)
    origin = ShardOrigin(url, field)
    origin.retry_s = retry_s
    reader = _open(origin, None if index is None else str(index), verify_hash)
    reader.origin.retry_s = retry_s
    if names is not None:
        where = hide_secrets(reader.index_origin.url)
        reader.manifest = _choose(reader.manifest, names, f"{field}={hide_secrets(str(data))}", where)
    if isinstance(reader, PackedReader):
        load_webdataset()
        fix = "copy it again or pack again"
    else:
        fix = (
            "it is not the tar that was indexed; copy it again, or delete the index "
            f"({hide_secrets(reader.index_origin.url)}) and {describe_command(url, reader.is_local)}"
        )
    origin.retry("the sizes of its tars", lambda: reader.check_sizes(share, fix))
    return reader


def name_index(field: str) -> str:
    """What errors call the folder of the index: an argument of ElasticShards, or an attribute of a Source."""
    return "index" if field == "data" else f"{field}.index"


def has_index(data: str, index: str | None, field: str) -> bool:
    """Whether tars have an index, in the folder that is given or beside them."""
    url, _ = split_tars(data, field)
    origin = ShardOrigin(url, field)
    places = (
        [origin.folder, origin.folder / MEMBERS] if index is None else [parse_place(index, name_index(field))]
    )
    return any(_has_manifest(origin, place) for place in places)


def _open(origin: ShardOrigin, index: str | None, verify_hash: bool) -> MemberReader | PackedReader:
    """The reader of the index that is given, or found in the folder of the tars."""
    url, field, folder = origin.url, origin.field, origin.folder
    if is_local(folder) and not folder.is_dir():
        raise UserError(f"{field}={url}: {describe_missing_folder(folder)}; give a folder of tars")
    if index is None and _has_manifest(origin, folder):
        manifest = origin.retry("its manifest", lambda: read_manifest(url, field))
        # Of other programs' tars an index of members lists more.
        if not is_indexed(manifest.provenance) or not _has_manifest(origin, folder / MEMBERS):
            return PackedReader(url, manifest, field=field, verify_hash=verify_hash)
    elif index is None and not _has_manifest(origin, folder / MEMBERS):
        splits = [path.name for path in origin.retry("its folders", lambda: find_manifest_folders(folder))]
        fix = (
            f"name one of its splits: {', '.join(splits)}"
            if splits
            else describe_command(url, is_local(folder))
        )
        raise UserError(f"{field}={hide_secrets(url)}: has no index; {fix}")
    place, name = (index, name_index(field)) if index is not None else (str(folder / MEMBERS), field)
    manifest = origin.retry("its index", lambda: read_manifest(place, name, format=MEMBERS_NAME))
    return MemberReader(url, manifest, field=field, verify_hash=verify_hash, index=place)


def _has_manifest(origin: ShardOrigin, folder: Place) -> bool:
    return origin.retry("its manifest", lambda: file_size(folder / MANIFEST)) is not None


def _choose(manifest: Manifest, names: list[str], data: str, index: str) -> Manifest:
    """The manifest of some tars, in its own order."""
    wanted = set(names)
    entries = [entry for entry in manifest.shards if entry.name in wanted]
    if len(entries) < len(wanted):
        known = {entry.name for entry in entries}
        missing = next(name for name in names if name not in known)
        fix = (
            "give the folder, or braces such as {000..012}.tar instead of *"
            if "*" in missing
            else "index it too, or correct the pattern"
        )
        raise UserError(f"{data}: {missing} is not in the index ({index}); {fix}")
    chosen = TableBuilder(entries).build()
    return Manifest(chosen, manifest.provenance, manifest.format_version, manifest.format)
