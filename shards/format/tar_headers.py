"""Reads the headers of a tar by position: ustar, GNU and pax, also several tars in one file (`cat a.tar b.tar`).

Python's `tarfile` stops at the first end mark, needs several times as long, loops on negative sizes and recurses on
long chains of extended headers. This reader refuses every header that it cannot trust.
"""

from collections.abc import Iterator
from enum import Enum
from typing import BinaryIO, NamedTuple

BLOCK = 512
_ZEROS = bytes(BLOCK)
_ZEROS_AT_ONCE = 1 << 20
_MOST_EXTENDED = 16 << 20
"""Largest extended header, bytes. Names and extended attributes need far less."""


class BadTar(ValueError):
    """A file that is not a complete tar; the message says why."""


class Kind(Enum):
    """The types of members."""

    FILE = "a file"
    FOLDER = "a folder"
    HARD_LINK = "a hard link"
    SYMBOLIC_LINK = "a symbolic link"
    SPARSE = "a sparse file"
    DEVICE = "a device"
    PIECE = "a piece of a file of another volume"


class Entry(NamedTuple):
    """One member of a tar."""

    name: bytes
    """As it is in the tar, usually UTF-8."""
    kind: Kind
    header: int
    """Position of its first header, extended headers included."""
    offset: int
    """Position of its content, bytes."""
    length: int
    """Of the content, bytes."""
    link: bytes
    """The name of the member that a link leads to."""

    @property
    def end(self) -> int:
        """Position of the next header."""
        return self.offset + self.length + -self.length % BLOCK


_KINDS = {
    b"1": Kind.HARD_LINK,
    b"2": Kind.SYMBOLIC_LINK,
    b"3": Kind.DEVICE,
    b"4": Kind.DEVICE,
    b"5": Kind.FOLDER,
    b"6": Kind.DEVICE,
    b"D": Kind.FOLDER,
    b"M": Kind.PIECE,
    b"S": Kind.SPARSE,
    b"V": Kind.FOLDER,  # the label of a volume
}
_WITHOUT_CONTENT = frozenset(b"123456V")
"""Types whose size does not count; it may be that of the file that a link leads to."""
_SPARSE = b"GNU.sparse."
_PAX_FIELDS = frozenset({b"path", b"linkpath", b"size", b"GNU.sparse.name"})
_EXTENDED = {b"x": "pax", b"X": "pax", b"g": "global", b"L": "name", b"K": "link"}


def read_entries(raw: BinaryIO) -> Iterator[Entry]:
    """The members of a tar, in its order. Contents are not read.

    Raises:
        BadTar: if the file ends early, has no end mark, or holds anything but headers and members.
    """
    end = raw.seek(0, 2)
    at, first = 0, None  # the position of the next block; that of an extended header before it
    is_ended = False
    shared: dict[bytes, bytes] = {}
    extended: dict[bytes, bytes] = {}
    while at < end:
        raw.seek(at)
        block = raw.read(BLOCK)
        if block == _ZEROS[: len(block)] and first is None:
            is_ended = True
            at = _skip_zeros(raw, at, end)
            continue
        if len(block) < BLOCK:
            raise BadTar(f"ends inside the header at byte {at}")
        is_ended = False
        size = _check_header(block, at)
        start, kind = at + BLOCK, block[156:157]
        if kind in _EXTENDED:
            first = at if first is None and kind != b"g" else first
            if size > _MOST_EXTENDED:
                raise BadTar(f"the extended header at byte {at} has {size} bytes")
            if start + size > end:
                raise BadTar(f"ends inside the extended header at byte {at}")
            _read_extended(raw.read(size), _EXTENDED[kind], at, shared, extended)
            at = start + size + -size % BLOCK
            continue
        fields = {**shared, **extended} if shared or extended else extended
        entry = _make_entry(block, at if first is None else first, start, size, fields)
        if kind == b"S":
            entry = entry._replace(offset=_skip_sparse_map(raw, block, start))
        if entry.offset + entry.length > end:
            raise BadTar(f"ends inside {_show(entry.name)}")
        at, first, extended = entry.end, None, {}
        yield entry
    if first is not None:
        raise BadTar(f"ends after the extended header at byte {first}")
    if not is_ended:
        raise BadTar("has no end mark")


def _skip_zeros(raw: BinaryIO, at: int, end: int) -> int:
    """Position of the first block from `at` on that is not zero; the end of the file if there is none."""
    raw.seek(at)
    length = (
        8 * BLOCK
    )  # doubled, because the zeros between two tars are few, and those at the end may be many
    while piece := raw.read(length):
        rest = piece.lstrip(b"\0")
        if rest:
            return at + (len(piece) - len(rest)) // BLOCK * BLOCK
        at += len(piece)
        length = min(2 * length, _ZEROS_AT_ONCE)
    return end


def _check_header(block: bytes, at: int) -> int:
    """Returns the size in a header.

    Raises:
        BadTar: if its checksum or size is wrong.
    """
    try:
        stated = _parse_number(block[148:156])
        if stated != sum(block) - sum(block[148:156]) + 256 and stated != _signed_sum(block):
            raise ValueError
    except ValueError:
        raise BadTar(f"no valid header at byte {at}") from None
    try:
        return _parse_number(block[124:136])
    except ValueError as error:
        raise BadTar(f"{_show(_text(block[:100]))} has a size that {error}") from None


def _signed_sum(block: bytes) -> int:
    """The checksum of old programs, which added signed bytes."""
    return sum(byte - 256 if byte > 127 else byte for byte in (*block[:148], *block[156:])) + 256


def _parse_number(field: bytes) -> int:
    if field[0] & 0x80:  # base 256; the second highest bit is the sign
        if field[0] & 0x40:
            raise ValueError("is negative")
        return int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
    digits = field.partition(b"\0")[0].strip()
    try:
        number = int(digits or b"0", 8)
    except ValueError:
        raise ValueError(f"is no number: {field!r}") from None
    if number < 0:
        raise ValueError("is negative")
    return number


def _read_extended(
    data: bytes, kind: str, at: int, shared: dict[bytes, bytes], extended: dict[bytes, bytes]
) -> None:
    """Adds the fields of an extended header to those of all further members, or of the next one."""
    if kind == "name":
        extended[b"path"] = _text(data)
    elif kind == "link":
        extended[b"linkpath"] = _text(data)
    else:
        target = shared if kind == "global" else extended
        for key, value in _parse_pax(data, at):
            if key in _PAX_FIELDS:
                target[key] = value
            elif key.startswith(_SPARSE):
                target[_SPARSE] = b""


def _parse_pax(data: bytes, at: int) -> Iterator[tuple[bytes, bytes]]:
    """The records of a pax header: their length in decimal digits, a space, the key, `=`, the value, a new line."""
    position, end = 0, len(data.rstrip(b"\0"))
    while position < end:
        space = data.find(b" ", position, position + 10)
        digits = data[position : max(space, position)]
        length = int(digits) if digits.isdigit() else 0
        if length <= len(digits) or position + length > len(data):
            raise BadTar(f"the extended header at byte {at} is damaged")
        key, equals, value = data[space + 1 : position + length - 1].partition(b"=")
        if not equals:
            raise BadTar(f"the extended header at byte {at} is damaged")
        yield key, value
        position += length


def _make_entry(block: bytes, first: int, start: int, size: int, fields: dict[bytes, bytes]) -> Entry:
    name, letter = _text(block[:100]), block[156:157]
    if block[257:263] == b"ustar\0" and block[345]:
        name = _text(block[345:500]) + b"/" + name
    kind = _KINDS.get(letter, Kind.FILE)
    link = _text(block[157:257]) if kind in (Kind.HARD_LINK, Kind.SYMBOLIC_LINK) else b""
    if fields:
        name, link = fields.get(b"path", name), fields.get(b"linkpath", link)
        if stated := fields.get(b"size"):
            if not stated.isdigit() or len(stated) > 18:
                raise BadTar(f"{_show(name)} has a size that is no number: {stated[:40]!r}")
            size = int(stated)
        if kind is Kind.FILE and _SPARSE in fields:
            name, kind = fields.get(b"GNU.sparse.name", name), Kind.SPARSE
    if kind is Kind.FILE and name.endswith(b"/"):  # folders in tars older than POSIX
        kind = Kind.FOLDER
    if letter[0] in _WITHOUT_CONTENT:
        size = 0
    return Entry(name, kind, first, start, size, link)


def _skip_sparse_map(raw: BinaryIO, block: bytes, start: int) -> int:
    """Position of the content of a sparse file of GNU's old format, after the blocks that list its holes."""
    more = block[482]
    while more:
        raw.seek(start)
        block = raw.read(BLOCK)
        if len(block) < BLOCK:
            raise BadTar("ends inside the map of a sparse file")
        start, more = start + BLOCK, block[504]
    return start


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _show(name: bytes) -> str:
    text = name.decode("utf-8", "backslashreplace")
    return repr(text if len(text) <= 80 else f"{text[:79]}…")
