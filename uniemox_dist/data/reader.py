"""Samples by (shard, row): one positioned read of the picture, everything else from the index."""

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shards.detect.types import Person
from shards.format.index import index_path, read_index
from shards.format.manifest import Manifest, read_manifest
from shards.storage import Place, is_local, place, sizes_of
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import sha256_bytes
from uniemox_dist.data.index_rows import Row, RowCache
from uniemox_dist.data.origin import ShardOrigin


class DamagedSample(ValueError):
    """A sample whose bytes do not have the hash of the index, or cannot be decoded."""


@dataclass(frozen=True)
class RawSample:
    """A sample as it was stored."""

    key: str
    image: bytes
    width: int
    """Pixels, of the upright picture."""
    height: int
    captions: tuple[str, ...]
    persons: tuple[Person, ...]
    label: str | None
    image_sha256: str


class ShardReader:
    """Random access to one data set, local or remote. Cheap to pickle: files are opened where they are used."""

    KEEP_ROWS = 1 << 16
    """Rows of indexes that are kept, some 300 bytes each; who walks many streams at once asks for more."""

    def __init__(
        self, folder: str | Place, manifest: Manifest, *, field: str = "path", verify_hash: bool = True
    ) -> None:
        self.url = str(folder)
        self.manifest = manifest
        self.verify_hash = verify_hash
        self.origin = ShardOrigin(self.url, field)
        self.keep_rows = self.KEEP_ROWS
        self._rows: RowCache | None = None

    @classmethod
    def from_folder(
        cls, folder: str | Place, field: str, *, verify_hash: bool = True, share: tuple[int, int] = (0, 1)
    ) -> "ShardReader":
        """Opens a data set, checking that each tar is there with the stated size.

        `share` (rank, ranks) checks one part of the shards only, where every rank checks its own.

        Raises:
            UserError: naming the folder, or the first shard that is missing or cut.
        """
        manifest = read_manifest(folder, field)
        shards = manifest.shards[share[0] :: share[1]]
        for shard, size in zip(shards, sizes_of(place(folder, field), [shard.name for shard in shards])):
            if size != shard.bytes:
                state = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
                raise UserError(f"{field}={folder}: shard {shard.name} {state}; copy it again or pack again")
        return cls(folder, manifest, field=field, verify_hash=verify_hash)

    @property
    def folder(self) -> Place:
        """Where the data set lies."""
        return self.origin.folder

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return tuple(shard.samples for shard in self.manifest.shards)

    @property
    def samples(self) -> int:
        """Samples of the data set."""
        return sum(self.counts)

    @property
    def is_local(self) -> bool:
        """Whether the data set lies in the local file tree."""
        return is_local(self.folder)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    def close(self) -> None:
        """Closes the files that are open; the reader opens them again where it needs them."""
        self.origin.close()

    def read(self, shard: int, row: int) -> RawSample:
        """The sample at a place.

        Raises:
            DamagedSample: if its bytes are not what was packed.
            Fault: if they cannot be read.
        """
        if self._rows is None:
            self._rows = RowCache(self.keep_rows)
        entry = self.manifest.shards[shard]
        rows = self._rows
        found = self.origin.persistent(
            f"the index of {entry.name}", lambda: rows.row(self.folder, shard, entry, row)
        )
        image = self.origin.read(entry, found.offset, found.length)
        whole = self._is_whole(image, found)
        if not whole:
            # Neither a damaged copy in a cache nor a fault on the way may change the data: it is what the origin holds.
            if self.origin.cache is not None:
                self.origin.cache.discard(entry)
            image = self.origin.read(entry, found.offset, found.length, cached=False)
            whole = self._is_whole(image, found)
        if not whole:
            raise DamagedSample(f"{entry.name}: {found.key}: bytes differ from the index")
        return RawSample(
            found.key,
            image,
            found.width,
            found.height,
            found.captions,
            found.persons,
            found.label,
            found.sha256,
        )

    def record(self, shard: int, row: int) -> dict[str, Any]:
        """The sample's `.json` member, which also holds what the index leaves out (attributes, source)."""
        return self.records(shard, [row])[0]

    def records(self, shard: int, rows: Sequence[int]) -> list[dict[str, Any]]:
        """`record` of several rows of one shard.

        Raises:
            DamagedSample: if one of them has none.
        """
        entry = self.manifest.shards[shard]
        table = read_index(index_path(self.folder, entry.name), ["sample_offset", "sample_length"])
        places = [(table["sample_offset"][row].as_py(), table["sample_length"][row].as_py()) for row in rows]
        return [self._record(shard, row, *found) for row, found in zip(rows, places)]

    def captions(self, shard: int) -> list[list[str]]:
        """The captions of a shard's rows.

        Raises:
            UserError: if the index is not the one that the manifest states.
        """
        rows: list[list[str]] = self.columns(shard, ["captions"])[0]
        return rows

    def pictures(self, shard: int) -> list[list[Any]]:
        """What tells the pictures of a shard's rows from others: their hashes, widths and heights.

        Raises:
            UserError: if the index is not the one that the manifest states.
        """
        return self.columns(shard, ["image_sha256", "width", "height"])

    def columns(self, shard: int, names: list[str]) -> list[list[Any]]:
        """Columns of a shard's index.

        Raises:
            UserError: if the index is not the one that the manifest states.
        """
        entry = self.manifest.shards[shard]
        path = index_path(self.folder, entry.name)
        table = self.origin.persistent(
            f"the index of {entry.name}", lambda: read_index(path, names, sha256=entry.index_sha256)
        )
        return [table[name].to_pylist() for name in names]

    def _is_whole(self, image: bytes, row: Row) -> bool:
        return len(image) == row.length and (not self.verify_hash or sha256_bytes(image) == row.sha256)

    def _record(self, shard: int, row: int, offset: int, length: int) -> dict[str, Any]:
        entry = self.manifest.shards[shard]
        data = self.origin.read(entry, offset, length)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                if member.name.endswith(".json") and (file := tar.extractfile(member)):
                    record: dict[str, Any] = json.loads(file.read())
                    return record
        raise DamagedSample(f"{entry.name}: row {row} has no .json")
