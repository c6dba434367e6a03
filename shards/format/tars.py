"""Reads tars of any origin as groups of members, as webdataset does. Tars are read by position, never extracted."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import BinaryIO

from shards.storage import Place, open_seekable
from uniemox_dist.core.errors import UserError

PICTURES = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"})
"""Extensions of pictures. Only the content decides whether a picture can be packed."""

_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


@dataclass(frozen=True)
class Member:
    """One member of a tar that is not a folder."""

    extension: str
    """The part of the base name after the first dot, in lower case."""
    offset: int
    """Position of its content, bytes."""
    length: int
    is_file: bool = True
    """False for links, sparse files and devices, whose content cannot be read by position."""


@dataclass
class Group:
    """A sample: neighbouring members whose names agree up to the first dot."""

    name: str
    offset: int
    """Position of the first member's first header, extended headers included."""
    members: list[Member] = field(default_factory=list)
    end: int = 0
    """Byte at which the next group may begin."""

    def find(self, extension: str) -> Member | None:
        """The first member with this extension; prefers one that shares more of the picture's name."""
        first = self.pictures[0].extension if self.pictures else ""
        inner = first[: first.rfind(".") + 1]  # `v2.` of photo.v2.jpg
        named = {member.extension: member for member in reversed(self.members)}
        return named.get(f"{inner}{extension}", named.get(extension))

    @cached_property
    def pictures(self) -> list[Member]:
        """Members with a picture's extension; if there are none, those with more dots (`photo.v2.jpg`)."""
        plain = [member for member in self.members if member.extension in PICTURES]
        return plain or [m for m in self.members if m.extension.rpartition(".")[2] in PICTURES]

    @property
    def is_unsafe(self) -> bool:
        """Whether extracting its members would write outside the folder."""
        return self.name.startswith("/") or ".." in self.name.split("/")


def read_groups(path: Place, field_name: str = "SOURCE") -> Iterator[Group]:
    """The samples of an uncompressed tar, in tar order.

    Raises:
        UserError: if the file is compressed, damaged, or not a tar.
    """
    try:
        with open_seekable(path) as raw:
            _refuse_compressed(raw, path, field_name)
            yield from _groups(raw)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{field_name}={path}: not a complete tar ({error}); copy it again or remove it"
        ) from None


def _groups(raw: BinaryIO) -> Iterator[Group]:
    raw.seek(0, 2)
    end = raw.tell()
    raw.seek(0)
    current: Group | None = None
    with tarfile.open(fileobj=raw, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # otherwise tarfile keeps every member
            if member.isdir():
                continue
            is_file = member.isreg() and member.sparse is None
            if is_file and member.offset_data + member.size > end:
                raise tarfile.ReadError(f"ends inside {member.name!r}")
            folder, slash, base = member.name.rpartition("/")
            dots = len(base) - len(base.lstrip("."))  # leading dots belong to the name
            stem, _, extension = base[dots:].partition(".")
            name = f"{folder}{slash}{base[:dots]}{stem}"
            if current is None or current.name != name:
                if current is not None:
                    yield current
                current = Group(name, member.offset)
            current.members.append(Member(extension.lower(), member.offset_data, member.size, is_file))
            current.end = tar.offset  # where the next header is
        raw.seek(tar.offset)
        if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile accepts this as an end
            raise tarfile.ReadError(f"no valid header and no end mark at byte {tar.offset}")
    if current is not None:
        yield current


def _refuse_compressed(raw: BinaryIO, path: Place, field_name: str) -> None:
    start = raw.read(6)
    raw.seek(0)
    for magic, tool in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"{field_name}={path}: a compressed tar cannot be read by position; decompress it first ({tool})"
            )
