"""Encodes a sample as tar members and as the fields of its index row. Packing workers import this; it needs no
pyarrow."""

import math
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from shards.format.sample import DIMENSIONS, PICTURE, Sample
from shards.format.tars import read_json_member
from uniemox_dist.core.files import canonical_json

BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Encoded:
    """An encoded sample: its tar members, and the fields of its index row except positions."""

    data: bytes | memoryview
    image_length: int
    fields: dict[str, Any]


def encode_members(sample: Sample) -> list[bytes]:
    """The pieces of a sample's tar members, in order."""
    return [part for name, content in sample.members() for part in _member(name, content)]


def encode(sample: Sample) -> Encoded:
    """Encodes a sample."""
    return Encoded(b"".join(encode_members(sample)), len(sample.image), index_fields(sample))


def is_current(key: str, data: bytes) -> bool:
    """Whether a sample's members are as `encode` writes them: earlier versions and other programs use other names or
    another JSON."""
    if not data.startswith(f"{key}.{PICTURE}\0".encode()):
        return False
    try:
        record = read_json_member(data)
    except ValueError:
        return False
    return isinstance(record.get("persons"), str) and isinstance(record.get("label_distribution"), str)


def index_fields(sample: Sample) -> dict[str, Any]:
    """The fields of a sample's index row that do not depend on its position in a tar."""
    persons = [
        {"box": list(p.box), "score": p.score, "labels": canonical_json(p.labels).decode()}
        for p in sample.persons
    ]
    fields = {
        "key": sample.key,
        "width": sample.width,
        "height": sample.height,
        "label": sample.label,
        "captions": list(sample.captions),
        "persons": persons,
        "image_sha256": sample.image_sha256,
    }
    if sample.distribution:
        fields["label_distribution"] = canonical_json(sample.distribution).decode()
    values = {name: _finite(sample.attributes.get(name)) for name in DIMENSIONS}
    return fields | {name: value for name, value in values.items() if value is not None}


def _finite(value: Any) -> float | None:
    """A JSON value as a float; None if it is no number, or one that does not fit."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _member(name: str, content: bytes) -> tuple[bytes, bytes, bytes]:
    """Header, content and padding of one tar member."""
    return _header(name, len(content)), content, bytes(-len(content) % BLOCK)


def _header(name: str, size: int) -> bytes:
    """A plain ustar header with fixed fields; tarfile needs ten times as long for the same bytes.

    The checksum is the sum of all bytes, with spaces in the checksum field.
    """
    template, total = _template()
    varied = name.encode("ascii")
    length = f"{size:011o}".encode()
    checksum = total + sum(varied) + sum(length)
    return b"".join(
        (varied, template[len(varied) : 124], length, template[135:148], b"%06o\0" % checksum, template[155:])
    )


@lru_cache(maxsize=1)
def _template() -> tuple[bytes, int]:
    """A header without name, size and checksum, and the sum of its bytes."""
    info = tarfile.TarInfo("")
    info.mode, info.mtime = 0o644, 0
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[124:135] = bytes(11)
    header[148:156] = b" " * 8
    return bytes(header), sum(header)
