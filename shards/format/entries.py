"""The shards of a manifest: one entry, and a table of many in one block of memory.

A data set may have a hundred thousand shards. As objects they need 500 bytes each; in a table, 120 and the name. The
block is plain bytes, so that ranks can send it to each other and map one copy of it.
"""

import mmap
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any, overload

_HASH_BYTES = 32
_AT_ONCE = 1000
"""Entries that an iterator decodes at once."""


@dataclass(frozen=True, slots=True)
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


# No control characters, which could rewrite a terminal's lines, and no halves of surrogate pairs, which UTF-8 lacks.
_NAME = r"[^/\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]+\.tar"
# Checks three hashes and a name at once.
_TEXTS = re.compile(rf"(?:[0-9a-f]{{64}}/){{3}}{_NAME}")


def is_entry(entry: ShardEntry) -> bool:
    """Whether an entry has legal values; raises TypeError if a text field is not a text."""
    return (
        type(entry.samples) is type(entry.bytes) is int
        and 0 <= entry.samples < 1 << 63
        and 0 <= entry.bytes < 1 << 63
        and _TEXTS.fullmatch("/".join((entry.sha256, entry.index_sha256, entry.rows_sha256, entry.name)))
        is not None
    )


def find_wrong_field(entry: ShardEntry) -> tuple[str, Any, str]:
    """The first field with an illegal value, the value, and the legal values, of an entry for which `is_entry` is not
    true."""
    for field in ("samples", "bytes"):
        value = getattr(entry, field)
        if type(value) is not int or not 0 <= value < 1 << 63:
            return field, value, "a whole number of at least 0 and below 2^63"
    for field in ("sha256", "index_sha256", "rows_sha256"):
        value = getattr(entry, field)
        if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
            return field, value, "64 hexadecimal digits"
    return "name", entry.name, "a file name that ends with .tar, without / and control characters"


class ShardTable(Sequence[ShardEntry]):
    """Entries in a block of bytes: their number, three arrays of int64 (samples, bytes, ends of the names), hashes,
    and names in UTF-8. Makes an entry when it is asked for one."""

    def __init__(self, content: Any) -> None:
        """`content` is an object with the buffer interface, as `TableBuilder.build` makes it. It is not copied."""
        self.content = memoryview(content).cast("B")
        self._count = int.from_bytes(self.content[:8], "little")
        hashes = 8 + 3 * 8 * self._count
        numbers = self.content[8:hashes].cast("q")
        self.samples: memoryview[int] = numbers[: self._count]
        """Number of samples of each shard."""
        self.bytes: memoryview[int] = numbers[self._count : 2 * self._count]
        """Size of each tar."""
        self._ends = numbers[2 * self._count :]
        names = hashes + 3 * _HASH_BYTES * self._count
        self._hashes, self._names = self.content[hashes:names], self.content[names:]

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ShardEntry, ...]: ...
    def __getitem__(self, index: int | slice) -> ShardEntry | tuple[ShardEntry, ...]:
        if isinstance(index, slice):
            first, last, step = index.indices(self._count)
            if step == 1:
                return tuple(starmap(ShardEntry, self._rows(first, last)))
            return tuple(self[i] for i in range(first, last, step))
        number = range(self._count)[index]
        return ShardEntry(*next(self._rows(number, number + 1)))

    def __iter__(self) -> Iterator[ShardEntry]:
        for first in range(0, self._count, _AT_ONCE):
            yield from starmap(ShardEntry, self._rows(first, min(first + _AT_ONCE, self._count)))

    def names(self) -> Iterator[str]:
        """The names of all shards."""
        start = 0
        for end in self._ends:
            yield str(self._names[start:end], "utf-8")
            start = end

    def _rows(self, first: int, last: int) -> Iterator[tuple[str, int, int, str, str, str]]:
        """The fields of consecutive entries."""
        digits = 2 * _HASH_BYTES
        hashes = self._hashes[3 * _HASH_BYTES * first : 3 * _HASH_BYTES * last].hex()
        start = self._ends[first - 1] if first else 0
        for number in range(first, last):
            end, at = self._ends[number], 3 * digits * (number - first)
            yield (
                str(self._names[start:end], "utf-8"),
                self.samples[number],
                self.bytes[number],
                hashes[at : at + digits],
                hashes[at + digits : at + 2 * digits],
                hashes[at + 2 * digits : at + 3 * digits],
            )
            start = end

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ShardTable):
            return self.content == other.content
        if isinstance(other, Sequence):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardTable, (bytes(self.content),)


class TableBuilder:
    """Collects entries for a table."""

    def __init__(self, entries: Iterable[ShardEntry] = ()) -> None:
        self._samples, self._bytes, self._ends = array("q"), array("q"), array("q")
        self._hashes, self._names = bytearray(), bytearray()
        for entry in entries:
            self.add(entry)

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, entry: ShardEntry) -> None:
        """Adds a legal entry."""
        self._samples.append(entry.samples)
        self._bytes.append(entry.bytes)
        self._hashes += bytes.fromhex(entry.sha256 + entry.index_sha256 + entry.rows_sha256)
        self._names += entry.name.encode()
        self._ends.append(len(self._names))

    def build(self) -> ShardTable:
        """Makes the table, in pages of its own, which return to the system with it."""
        count = len(self).to_bytes(8, "little")
        parts: list[Any] = [count, self._samples, self._bytes, self._ends, self._hashes, self._names]
        views = [memoryview(part).cast("B") for part in parts if len(part)]
        content = mmap.mmap(-1, sum(map(len, views)))
        for view in views:
            content.write(view)
        return ShardTable(content)
