"""Samples by (shard, row): one positioned read of the picture, everything else from the index."""

import io
import json
import os
import tarfile
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from shards.index import index_path, read_index
from shards.manifest import Manifest, read_manifest
from shards.persons import Person
from shards.storage import Place, is_local, place, read_range, size_of
from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.files import sha256_bytes


class DamagedSample(ValueError):
    """A sample whose bytes do not have the hash of the index, or cannot be decoded."""


@dataclass(frozen=True)
class RawSample:
    """A sample as it was stored."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    persons: tuple[Person, ...]
    label: str | None


class ShardReader:
    """Random access to one data set, local or remote. Cheap to pickle: files are opened where they are used."""

    OPEN_SHARDS = 64
    """Shards whose file handle and index are kept; a loader process walks few at a time."""

    def __init__(self, folder: str | Place, manifest: Manifest, *, verify_hash: bool = True) -> None:
        self.url = str(folder)
        self.manifest = manifest
        self.verify_hash = verify_hash
        self._open: OrderedDict[int, tuple[int | Place, dict[str, Any]]] = OrderedDict()
        self._place: tuple[int, Place] | None = None

    @classmethod
    def from_folder(cls, folder: str | Place, field: str, *, verify_hash: bool = True) -> "ShardReader":
        """Opens a data set, checking that each tar and index is there with the stated size.

        Raises:
            UserError: naming the folder, or the first shard that is missing or cut.
        """
        manifest = read_manifest(folder, field)
        for shard in manifest.shards:
            size = size_of(place(folder, field) / shard.name)
            if size != shard.bytes:
                state = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
                raise UserError(f"{field}={folder}: shard {shard.name} {state}; copy it again or pack again")
        return cls(folder, manifest, verify_hash=verify_hash)

    @property
    def folder(self) -> Place:
        """Where the data set lies; a connection of this process, since none survives a fork."""
        if self._place is None or self._place[0] != os.getpid():
            if self._place is not None and not is_local(self._place[1]):
                self._open.clear()  # what was opened before a fork speaks through its parent's connection
            self._place = (os.getpid(), place(self.url))
        return self._place[1]

    @property
    def is_local(self) -> bool:
        """Whether the data set lies in the local file tree."""
        return is_local(self.folder)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_place": None}

    def close(self) -> None:
        """Closes the files that are open; the reader opens them again where it needs them."""
        while self._open:
            _close(self._open.popitem()[1][0])

    def read(self, shard: int, row: int) -> RawSample:
        """The sample at a place.

        Raises:
            DamagedSample: if its bytes are not what was packed.
        """
        handle, columns = self._shard(shard)
        key = columns["key"][row].as_py()
        length = columns["image_length"][row].as_py()
        image = _bytes(handle, columns["image_offset"][row].as_py(), length)
        if len(image) != length or (
            self.verify_hash and sha256_bytes(image) != columns["image_sha256"][row].as_py()
        ):
            raise DamagedSample(f"{self.manifest.shards[shard].name}: {key}: bytes differ from the index")
        persons = tuple(Person(tuple(p["box"]), p["score"]) for p in columns["persons"][row].as_py() or ())
        captions = tuple(columns["captions"][row].as_py() or ())
        return RawSample(key, image, captions, persons, columns["label"][row].as_py())

    def record(self, shard: int, row: int) -> dict[str, Any]:
        """The sample's `.json` member, which also holds what the index leaves out (attributes, source)."""
        handle, columns = self._shard(shard)
        offset, length = columns["sample_offset"][row].as_py(), columns["sample_length"][row].as_py()
        with tarfile.open(fileobj=io.BytesIO(_bytes(handle, offset, length))) as tar:
            for member in tar:
                if member.name.endswith(".json") and (file := tar.extractfile(member)):
                    record: dict[str, Any] = json.loads(file.read())
                    return record
        raise DamagedSample(f"{self.manifest.shards[shard].name}: row {row} has no .json")

    def captions(self, shard: int) -> list[list[str]]:
        """The captions of a shard's rows."""
        name = self.manifest.shards[shard].name
        rows: list[list[str]] = read_index(index_path(self.folder, name), ["captions"])[
            "captions"
        ].to_pylist()
        return rows

    def _shard(self, shard: int) -> tuple[int | Place, dict[str, Any]]:
        folder = self.folder
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        entry = self.manifest.shards[shard]
        table = read_index(index_path(folder, entry.name))
        if table.num_rows != entry.samples:
            raise UserError(
                f"{self.url}: the index of {entry.name} has {table.num_rows} rows instead of "
                f"{entry.samples}; copy index/ again"
            )
        tar = folder / entry.name
        handle = os.open(tar, os.O_RDONLY) if is_local(tar) else tar
        self._open[shard] = (handle, {name: table[name] for name in table.column_names})
        if len(self._open) > self.OPEN_SHARDS:
            _close(self._open.popitem(last=False)[1][0])
        return self._open[shard]


def _bytes(handle: int | Place, offset: int, length: int) -> bytes:
    return os.pread(handle, length, offset) if isinstance(handle, int) else read_range(handle, offset, length)


def _close(handle: int | Place) -> None:
    if isinstance(handle, int):
        os.close(handle)
