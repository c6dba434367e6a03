"""Random access to samples by (shard, row): one positioned read for the picture, everything else from the index."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shards.detect.types import Person
from shards.format.index import index_path, read_index
from shards.format.manifest import Manifest, read_manifest
from shards.format.sample import parse_record
from shards.format.tars import read_json_member
from shards.storage import Place
from uniemox_dist.core.files import sha256_bytes
from uniemox_dist.data.index_rows import PICTURES, Row
from uniemox_dist.data.indexed_reader import DamagedSample as DamagedSample
from uniemox_dist.data.indexed_reader import IndexedReader


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


class ShardReader(IndexedReader[Row]):
    """Random access to the pictures of one data set, local or remote."""

    rows = PICTURES

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
        reader = cls(folder, manifest or read_manifest(folder, field), field=field, verify_hash=verify_hash)
        reader.check_sizes(share, "copy it again or pack again")
        return reader

    def read(self, shard: int, row: int) -> RawSample:
        """Reads the sample in a row of a shard.

        Raises:
            DamagedSample: if its bytes differ from those that were packed.
            Fault: if they cannot be read.
        """
        entry, index = self.find(shard, row)
        image = self.read_intact(
            entry,
            index.key,
            lambda cached: self.origin.read(entry, index.offset, index.length, cached=cached),
            lambda image: self._is_intact(image, index),
        )
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
