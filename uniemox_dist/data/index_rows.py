"""Rows of Parquet indexes, loaded by row group and kept in a form that is fast to read row by row."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from shards.detect.types import Person
from shards.format.entries import ShardEntry
from shards.format.index import index_path, read_group, read_group_ends
from shards.format.members import read_member_group, read_member_group_ends
from shards.storage import Place
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import hide_secrets

COLUMNS = [
    "key",
    "image_offset",
    "image_length",
    "width",
    "height",
    "label",
    "captions",
    "persons",
    "image_sha256",
]


MAX_SHARDS = 1 << 14
"""Shards whose row group boundaries are kept in memory, a few numbers each."""
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True)
class Row:
    """The index row of one sample."""

    key: str
    offset: int
    """Byte position of the encoded picture in the tar."""
    length: int
    width: int
    """Pixels of the upright picture."""
    height: int
    label: str | None
    captions: tuple[str, ...]
    persons: tuple[Person, ...]
    sha256: str


class RowGroup:
    """One row group as columns, about 300 bytes per row."""

    def __init__(self, table: pa.Table) -> None:
        column = {name: table[name].combine_chunks() for name in COLUMNS}
        self._texts = {name: column[name] for name in ("key", "label", "captions", "persons", "image_sha256")}
        self._numbers = {
            name: column[name].to_numpy() for name in ("image_offset", "image_length", "width", "height")
        }
        # Most rows have no persons, so their number is checked before a list is created.
        self._persons = np.diff(column["persons"].offsets.to_numpy())

    def row(self, i: int) -> Row:
        """Returns the i-th row of the group."""
        text, number = self._texts, self._numbers
        people: list[dict[str, Any]] = text["persons"][i].as_py() if self._persons[i] else []
        return Row(
            key=text["key"][i].as_py(),
            offset=int(number["image_offset"][i]),
            length=int(number["image_length"][i]),
            width=int(number["width"][i]),
            height=int(number["height"][i]),
            label=text["label"][i].as_py(),
            captions=tuple(text["captions"][i].as_py() or ()),
            persons=tuple(Person(tuple(p["box"]), p["score"]) for p in people),
            sha256=text["image_sha256"][i].as_py(),
        )


@dataclass(frozen=True)
class PackedRow:
    """The place of one sample that `shards pack` wrote, and of its picture."""

    key: str
    offset: int
    """Position of the sample's first header."""
    length: int
    image_offset: int
    image_length: int
    image_sha256: str


class PackedGroup:
    """One row group of an index of pictures, for reading whole samples."""

    NUMBERS = ("sample_offset", "sample_length", "image_offset", "image_length")
    TEXTS = ("key", "image_sha256")

    def __init__(self, table: pa.Table) -> None:
        self._numbers = [table[name].to_numpy() for name in self.NUMBERS]
        self._key, self._sha256 = (table[name].combine_chunks() for name in self.TEXTS)

    def row(self, i: int) -> PackedRow:
        """Returns the i-th row of the group."""
        offset, length, image_offset, image_length = (int(numbers[i]) for numbers in self._numbers)
        return PackedRow(
            self._key[i].as_py(), offset, length, image_offset, image_length, self._sha256[i].as_py()
        )


@dataclass(frozen=True)
class MemberRow:
    """The index row of one sample with any members."""

    key: str
    """webdataset's `__key__`."""
    names: list[str]
    """webdataset's extensions of its members, in tar order."""
    offsets: list[int]
    """Positions of their contents in the tar, bytes."""
    lengths: list[int]
    sha256: str


class MemberGroup:
    """One row group of an index of members, about 80 bytes per row and 30 per member."""

    def __init__(self, table: pa.Table) -> None:
        key, members, sha256 = (table[name].combine_chunks() for name in ("key", "members", "sha256"))
        flat = members.flatten()
        self._key, self._sha256 = key, sha256
        self._ends = members.offsets.to_numpy() - members.offsets[0].as_py()
        self._names = flat.field("name")
        self._offsets, self._lengths = (flat.field(name).to_numpy() for name in ("offset", "length"))

    def row(self, i: int) -> MemberRow:
        """Returns the i-th row of the group."""
        part = slice(int(self._ends[i]), int(self._ends[i + 1]))
        return MemberRow(
            self._key[i].as_py(),
            self._names[part].to_pylist(),
            self._offsets[part].tolist(),
            self._lengths[part].tolist(),
            self._sha256[i].as_py(),
        )


class Group(Protocol[R_co]):
    """A row group in memory."""

    def row(self, i: int, /) -> R_co:
        """Returns the i-th row of the group."""
        raise NotImplementedError


@dataclass(frozen=True)
class RowSource(Generic[R]):
    """How the indexes of a data set are read."""

    ends: Callable[..., list[int]]
    """Like `read_group_ends`."""
    group: Callable[[Place, int], Group[R]]
    """Reads a row group of an index."""


PICTURES: RowSource[Row] = RowSource(
    read_group_ends, lambda path, number: RowGroup(read_group(path, number, COLUMNS))
)
PACKED: RowSource[PackedRow] = RowSource(
    read_group_ends,
    lambda path, number: PackedGroup(read_group(path, number, [*PackedGroup.TEXTS, *PackedGroup.NUMBERS])),
)
MEMBERS: RowSource[MemberRow] = RowSource(
    read_member_group_ends, lambda path, number: MemberGroup(read_member_group(path, number))
)


class RowCache(Generic[R]):
    """The most recently used row groups of a data set: at most `keep` rows, but always at least one group.

    A stream reads one window of its shards at a time, so few rows are in use, however large the data set is.
    """

    def __init__(self, source: RowSource[R], keep: int) -> None:
        self.source, self.keep = source, keep
        self._ends: dict[int, list[int]] = {}
        self._groups: OrderedDict[tuple[int, int], tuple[Group[R], int]] = OrderedDict()
        self._kept = 0

    def row(self, folder: Place, shard: int, entry: ShardEntry, row: int) -> R:
        """Returns one row of a shard's index.

        Raises:
            UserError: if the index is missing, damaged, or has a different number of rows than the manifest states.
        """
        ends = self._ends.get(shard)
        if ends is None:
            ends = self._ends[shard] = self.source.ends(
                index_path(folder, entry.name), sha256=entry.index_sha256
            )
            if ends[-1] != entry.samples:
                raise UserError(
                    f"{hide_secrets(folder)}: the index of {entry.name} has {ends[-1]} rows instead of "
                    f"{entry.samples}; copy index/ again"
                )
            if len(self._ends) > MAX_SHARDS:
                del self._ends[next(iter(self._ends))]
        number = bisect_right(ends, row)
        start = ends[number - 1] if number else 0
        kept = self._groups.get((shard, number))
        if kept is None:
            group = self.source.group(index_path(folder, entry.name), number)
            self._add((shard, number), group, ends[number] - start)
        else:
            group = kept[0]
            self._groups.move_to_end((shard, number))
        return group.row(row - start)

    def _add(self, name: tuple[int, int], group: Group[R], rows: int) -> None:
        self._groups[name] = group, rows
        self._kept += rows
        while self._kept > self.keep and len(self._groups) > 1:
            _, (_, oldest) = self._groups.popitem(last=False)
            self._kept -= oldest
