"""Random access to samples by (shard, row): one positioned read for the picture, everything else from the index."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shards.detect.types import Person
from shards.format.index import index_path, read_index
from shards.format.manifest import Manifest, read_manifest
from shards.format.sample import parse_record
from shards.format.tars import read_json_member
from shards.storage import Place, file_sizes, is_local, parse_place
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import sha256_bytes
from uniemox_dist.data.index_rows import Row, RowCache
from uniemox_dist.data.origin import ShardOrigin


class DamagedSample(ValueError):
    """A sample whose bytes do not match the hash in the index, or cannot be decoded."""


@dataclass(frozen=True)
class RawSample:
    """A sample as stored, not decoded."""

    key: str
    image: bytes
    width: int
    """Pixels of the upright picture."""
    height: int
    captions: tuple[str, ...]
    persons: tuple[Person, ...]
    label: str | None
    image_sha256: str


class ShardReader:
    """Random access to one data set, local or remote. Cheap to pickle: each process opens files on first use."""

    KEEP_ROWS = 1 << 16
    """Index rows kept in memory, about 300 bytes each. A process that reads many streams sets more."""

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
        cls,
        folder: str | Place,
        field: str,
        *,
        verify_hash: bool = True,
        share: tuple[int, int] = (0, 1),
        manifest: Manifest | None = None,
    ) -> "ShardReader":
        """Opens a data set and checks that each tar exists with the size in the manifest.

        With `share` (rank, ranks) it checks this rank's part of the shards only. It reads the manifest unless that is
        given.

        Raises:
            UserError: naming the folder, or the first shard that is missing or truncated.
        """
        manifest = manifest or read_manifest(folder, field)
        shards = manifest.shards[share[0] :: share[1]]
        for shard, size in zip(
            shards, file_sizes(parse_place(folder, field), [shard.name for shard in shards])
        ):
            if size != shard.bytes:
                state = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
                raise UserError(f"{field}={folder}: shard {shard.name} {state}; copy it again or pack again")
        return cls(folder, manifest, field=field, verify_hash=verify_hash)

    @property
    def folder(self) -> Place:
        """Folder of the data set."""
        return self.origin.folder

    @property
    def counts(self) -> Sequence[int]:
        """Number of samples of each shard."""
        return self.manifest.counts

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(self.counts)

    @property
    def is_local(self) -> bool:
        """True if the data set is in the local file system."""
        return is_local(self.folder)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    def close(self) -> None:
        """Closes open files; the next read opens them again."""
        self.origin.close()

    def read(self, shard: int, row: int) -> RawSample:
        """Reads the sample in a row of a shard.

        Raises:
            DamagedSample: if its bytes differ from those that were packed.
            Fault: if they cannot be read.
        """
        if self._rows is None:
            self._rows = RowCache(self.keep_rows)
        entry = self.manifest.shards[shard]
        rows = self._rows
        index = self.origin.retry(
            f"the index of {entry.name}", lambda: rows.row(self.folder, shard, entry, row)
        )
        image = self.origin.read(entry, index.offset, index.length)
        intact = self._is_intact(image, index)
        if not intact:
            # The cached copy or the transfer may be damaged; the bytes at the origin decide.
            if self.origin.cache is not None:
                self.origin.cache.discard(entry)
            image = self.origin.read(entry, index.offset, index.length, cached=False)
            intact = self._is_intact(image, index)
        if not intact:
            raise DamagedSample(f"{entry.name}: {index.key}: bytes differ from the index")
        return RawSample(
            index.key,
            image,
            index.width,
            index.height,
            index.captions,
            index.persons,
            index.label,
            index.sha256,
        )

    def record(self, shard: int, row: int) -> dict[str, Any]:
        """Reads a sample's `.json` member, which has more fields than the index (attributes, source)."""
        return self.records(shard, [row])[0]

    def records(self, shard: int, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Reads the `.json` members of several rows of one shard; a sample of an indexed tar may have none: {}."""
        entry = self.manifest.shards[shard]
        table = read_index(index_path(self.folder, entry.name), ["sample_offset", "sample_length"])
        places = [(table["sample_offset"][row].as_py(), table["sample_length"][row].as_py()) for row in rows]
        return [self._record(shard, *place) for place in places]

    def captions(self, shard: int) -> list[list[str]]:
        """Reads the captions of a shard's rows.

        Raises:
            UserError: if the index does not match the manifest.
        """
        rows: list[list[str]] = self.columns(shard, ["captions"])[0]
        return rows

    def pictures(self, shard: int) -> list[list[Any]]:
        """Reads hashes, widths and heights of a shard's pictures.

        Raises:
            UserError: if the index does not match the manifest.
        """
        return self.columns(shard, ["image_sha256", "width", "height"])

    def columns(self, shard: int, names: list[str]) -> list[list[Any]]:
        """Reads columns of a shard's index.

        Raises:
            UserError: if the index does not match the manifest.
        """
        entry = self.manifest.shards[shard]
        path = index_path(self.folder, entry.name)
        table = self.origin.retry(
            f"the index of {entry.name}", lambda: read_index(path, names, sha256=entry.index_sha256)
        )
        return [table[name].to_pylist() for name in names]

    def _is_intact(self, image: bytes, row: Row) -> bool:
        return len(image) == row.length and (not self.verify_hash or sha256_bytes(image) == row.sha256)

    def _record(self, shard: int, offset: int, length: int) -> dict[str, Any]:
        entry = self.manifest.shards[shard]
        return parse_record(read_json_member(self.origin.read(entry, offset, length)))
