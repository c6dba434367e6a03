"""Reads tars of any origin as groups of members, as webdataset does, but members of a sample need not be neighbours.
Tars are read by position, never extracted."""

import io
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np

from shards.format.tar_headers import BLOCK, BadTar, Entry, Kind, read_entries
from shards.storage import Place, open_seekable
from uniemox_dist.core.errors import UserError

PICTURES = frozenset(
    ("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif",
     "heic", "heif", "hif", "jp2", "j2k", "jpf", "jpx", "ppm", "pgm", "pbm", "pnm", "pfm")
)  # fmt: skip
"""Extensions of pictures. Only the content decides whether a picture can be packed."""
_USUAL = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "webp"})

_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_KINDS = tuple(Kind)
_END = bytes(2 * BLOCK)
"""The end mark of a tar."""


@dataclass(frozen=True)
class Member:
    """One member of a tar that is not a folder."""

    extension: str
    """The part of the base name after the first dot, in lower case."""
    offset: int
    """Position of its content, bytes. That of a hard link is the content of the file that it leads to."""
    length: int
    header: int
    """Position of its first header, extended headers included."""
    end: int
    """Position of the header after it."""
    kind: Kind = Kind.FILE

    @property
    def is_file(self) -> bool:
        """Whether its content can be read by position; that of links, sparse files and devices cannot."""
        return self.kind is Kind.FILE


@dataclass(frozen=True)
class Group:
    """A sample: the members of a tar whose names agree up to the first dot. A second member of one name begins another
    sample."""

    name: str
    members: tuple[Member, ...]
    is_together: bool = True
    """False if members of other samples lie between its own."""

    @property
    def offset(self) -> int:
        """First byte of the tar that belongs to the sample. If its members are not neighbours, the range from here to
        `end` is its `.json`, or else its picture, or else its first member."""
        return self._range[0].header

    @property
    def end(self) -> int:
        """Position of the header after the sample."""
        return self._range[-1].end

    @property
    def _range(self) -> tuple[Member, ...]:
        if self.is_together:
            return self.members
        return ((self.find("json") or (self.pictures or self.members)[0]),)

    def find(self, extension: str) -> Member | None:
        """The first member with this extension; prefers one that shares more of the first picture's name."""
        first = self.pictures[0].extension if self.pictures else ""
        inner = first[: first.rfind(".") + 1]  # `v2.` of photo.v2.jpg
        named = {member.extension: member for member in reversed(self.members)}
        return named.get(f"{inner}{extension}", named.get(extension))

    @cached_property
    def pictures(self) -> list[Member]:
        """Members with a picture's extension: files before links, usual formats before others, and those with more
        dots (`photo.v2.jpg`) last."""
        found = [m for m in self.members if m.extension.rpartition(".")[2] in PICTURES]
        return sorted(found, key=lambda m: (not m.is_file, "." in m.extension, m.extension not in _USUAL))

    @property
    def is_unsafe(self) -> bool:
        """Whether extracting its members would write outside the folder."""
        return self.name.startswith("/") or ".." in self.name.split("/")


def read_groups(path: Place, field_name: str = "SOURCE") -> Iterator[Group]:
    """The samples of an uncompressed tar, in the order of their first members.

    All headers are read first, because a sample's members may be anywhere; that takes about 100 bytes of memory a
    member, and 500 more a sample in a tar whose members are not neighbours.

    Raises:
        UserError: if the file is compressed, damaged, or not a tar.
    """
    try:
        with open_seekable(path) as raw:
            refuse_compressed(raw, path, field_name)
            members = _Members(read_entries(raw))
    except (BadTar, EOFError) as error:
        raise UserError(
            f"{field_name}={path}: not a complete tar ({error}); copy it again or remove it"
        ) from None
    yield from members.groups()


def read_json_member(data: bytes) -> dict[str, Any]:
    """The `.json` of one sample's range of a tar; {} if it has none that holds an object.

    Raises:
        ValueError: if it is not JSON, or the range is not made of tar members.
    """
    raw = io.BytesIO(data + _END)
    for entry in read_entries(raw):
        if entry.kind is Kind.FILE and entry.name.lower().endswith(b".json"):
            record = json.loads(data[entry.offset : entry.offset + entry.length])
            return record if isinstance(record, dict) else {}
    return {}


class _Members:
    """The members of a tar in few bytes each, and how they form groups."""

    def __init__(self, entries: Iterator[Entry]) -> None:
        self._names = bytearray()
        self._name_ends = array("Q")
        self._headers, self._offsets, self._lengths = array("Q"), array("Q"), array("Q")
        self._ends = array("Q")
        self._kinds = bytearray()
        self._runs = array("Q")  # number of the first member of each run of neighbours with one key
        keys = array("q")  # of the runs, hashed
        links: list[tuple[int, bytes]] = []
        last = None
        for entry in entries:
            if entry.kind is Kind.FOLDER:
                continue
            name = _remove_dot(entry.name)
            if (key := _split(name)[0]) != last:
                self._runs.append(len(self))
                keys.append(hash(key))
                last = key
            if entry.kind is Kind.HARD_LINK:
                links.append((len(self), _remove_dot(entry.link)))
            self._names += name
            self._name_ends.append(len(self._names))
            self._headers.append(entry.header)
            self._offsets.append(entry.offset)
            self._lengths.append(entry.length)
            self._ends.append(entry.end)
            self._kinds.append(_KINDS.index(entry.kind))
        self._is_sorted = len(np.unique(np.frombuffer(keys, np.int64))) == len(keys)
        self._resolve(links)

    def __len__(self) -> int:
        return len(self._kinds)

    def groups(self) -> Iterator[Group]:
        """The groups in the order of their first members."""
        if self._is_sorted:
            for run, first in enumerate(self._runs):
                last = self._runs[run + 1] if run + 1 < len(self._runs) else len(self)
                yield from map(self._group, self._gather(range(first, last)))
        else:
            yield from map(self._group, self._gather(range(len(self))))

    def _gather(self, numbers: Iterable[int]) -> list[list[int]]:
        """The numbers of each group's members."""
        found: list[list[int]] = []
        latest: dict[bytes, tuple[list[int], set[bytes]]] = {}
        for number in numbers:
            key, extension = _split(self._name(number))
            extension = extension.lower()
            if key not in latest or extension in latest[key][1]:
                latest[key] = ([], set())
                found.append(latest[key][0])
            latest[key][0].append(number)
            latest[key][1].add(extension)
        return found

    def _group(self, numbers: list[int]) -> Group:
        name = _split(self._name(numbers[0]))[0].decode("utf-8", "surrogateescape")
        is_together = numbers[-1] - numbers[0] + 1 == len(numbers)
        return Group(name, tuple(map(self._member, numbers)), is_together)

    def _member(self, number: int) -> Member:
        extension = _split(self._name(number))[1].decode("utf-8", "surrogateescape").lower()
        places = self._offsets[number], self._lengths[number], self._headers[number], self._ends[number]
        return Member(extension, *places, _KINDS[self._kinds[number]])

    def _name(self, number: int) -> bytes:
        return bytes(self._names[self._name_ends[number - 1] if number else 0 : self._name_ends[number]])

    def _resolve(self, links: list[tuple[int, bytes]]) -> None:
        """Gives hard links the content of the files that they lead to."""
        if not links:
            return
        wanted = {target for _, target in links}
        numbers = {name: i for i in range(len(self)) if (name := self._name(i)) in wanted}
        for number, target in links:
            other = numbers.get(target, number)
            if other < number:  # the target may be a resolved link
                self._kinds[number] = self._kinds[other]
                self._offsets[number], self._lengths[number] = self._offsets[other], self._lengths[other]


def _remove_dot(name: bytes) -> bytes:
    """A name without the `./` in front, which `tar cf a.tar .` writes."""
    while name.startswith(b"./"):
        name = name[2:]
    return name


def _split(name: bytes) -> tuple[bytes, bytes]:
    """The key of a member, and its extension: both parts of the name at the first dot of its base name."""
    start = name.rfind(b"/") + 1
    while name[start : start + 1] == b".":  # leading dots belong to the key
        start += 1
    dot = name.find(b".", start)
    return (name, b"") if dot < 0 else (name[:dot], name[dot + 1 :])


def refuse_compressed(raw: BinaryIO, path: Place, field_name: str) -> None:
    """Leaves a file at its start if it is not compressed.

    Raises:
        UserError: if it is.
    """
    start = raw.read(6)
    raw.seek(0)
    for magic, tool in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"{field_name}={path}: a compressed tar cannot be read by position; decompress it first ({tool})"
            )
