"""Tars as webdataset groups them, whoever wrote them: read by position, never extracted."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from shards.storage import Place, open_seekable
from uniemox_dist.runtime.errors import UserError

PICTURES = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"})
"""Extensions that say "picture"; what is inside decides whether it can be packed."""

_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


@dataclass(frozen=True)
class Member:
    """One regular file in a tar."""

    extension: str
    """After the first dot of the base name, in lower case."""
    offset: int
    """Of its content, bytes."""
    length: int


@dataclass
class Group:
    """Neighbouring members with one name up to the first dot: a sample."""

    name: str
    offset: int
    """Of the first member's first header, extended headers included."""
    members: list[Member] = field(default_factory=list)
    end: int = 0
    """Where the next group may begin."""

    def find(self, extension: str) -> Member | None:
        """The first member with this extension."""
        return next((member for member in self.members if member.extension == extension), None)

    @property
    def pictures(self) -> list[Member]:
        """Members whose extension is a picture's."""
        return [member for member in self.members if member.extension in PICTURES]

    @property
    def is_unsafe(self) -> bool:
        """Whether extracting its members would write outside the folder: nobody means that well."""
        return self.name.startswith("/") or ".." in self.name.split("/")


def groups(path: Place, field_name: str = "SOURCE") -> Iterator[Group]:
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
            f"{field_name}={path}: not a whole tar ({error}); copy it again or take it away"
        ) from None


def _groups(raw: BinaryIO) -> Iterator[Group]:
    raw.seek(0, 2)
    end = raw.tell()
    raw.seek(0)
    current: Group | None = None
    with tarfile.open(fileobj=raw, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every member it has seen
            if not member.isreg() or member.sparse is not None:
                continue
            if member.offset_data + member.size > end:
                raise tarfile.ReadError(f"ends inside {member.name!r}")
            folder, slash, base = member.name.rpartition("/")
            dots = len(base) - len(base.lstrip("."))  # leading dots belong to the name
            stem, _, extension = base[dots:].partition(".")
            name = f"{folder}{slash}{base[:dots]}{stem}"
            if current is None or current.name != name:
                if current is not None:
                    yield current
                current = Group(name, member.offset)
            current.members.append(Member(extension.lower(), member.offset_data, member.size))
            current.end = member.offset_data + member.size + -member.size % tarfile.BLOCKSIZE
        raw.seek(tar.offset)
        if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes this for an end, too
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
