"""Keeps the records of a source on disk while they are packed, since a source may have millions."""

import base64
import hashlib
import json
import os
from array import array
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from shards.detect.types import Person
from shards.sources import Cell, Image, Record, Slice


class Spool:
    """Records by number. Each is one line of JSON on disk and 8 bytes in memory.

    Pictures that a layout passes as bytes go into a second file.
    """

    def __init__(self, folder: Path, name: str = "records.jsonl") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / name
        self._lines: BinaryIO = open(self.path, "w+b", buffering=1 << 20)  # noqa: SIM115
        self._pictures_path = folder / "pictures.bin"
        self._pictures: BinaryIO | None = None
        self._offsets = array("Q", [0])
        self._digest = hashlib.sha256()

    def append(self, record: Record) -> None:
        """Adds a record; records are numbered from 0."""
        image = self._store_bytes(record.image)
        line = json.dumps({**_fields(record), "image": _encode_image(image)}, ensure_ascii=True).encode()
        self._lines.write(line)
        self._offsets.append(self._offsets[-1] + len(line))
        self._digest.update(line + b"\n")

    def line(self, number: int) -> bytes:
        """The line of a record, for `parse_record`."""
        start, end = self._offsets[number], self._offsets[number + 1]
        return os.pread(self._lines.fileno(), end - start, start)

    def seal(self) -> str:
        """Makes all records readable; returns a hash of all listed records."""
        self._lines.flush()
        if self._pictures is not None:
            self._pictures.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Closes the files. Their folder's owner deletes them."""
        self._lines.close()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def _store_bytes(self, image: Image) -> Image:
        if not isinstance(image, bytes) or not image:
            return image
        if self._pictures is None:
            self._pictures = open(self._pictures_path, "wb")  # noqa: SIM115 (closed by seal)
        start = self._pictures.tell()
        self._pictures.write(image)
        self._digest.update(image)
        return Slice(self._pictures_path.name, start, len(image))


def parse_record(line: bytes, folder: Path = Path()) -> Record:
    """Parses a spooled line; `folder` is the spool's folder."""
    fields: dict[str, Any] = json.loads(line)
    image = _decode_image(fields.pop("image"))
    if isinstance(image, Slice) and image.path == "pictures.bin":
        image = Slice(str(folder / image.path), image.offset, image.length)
    persons = fields.get("persons")
    if persons is not None:
        fields["persons"] = tuple(map(Person.from_json, persons))
    for name in ("captions", "refused", "boxes_size"):
        if fields.get(name) is not None:
            fields[name] = tuple(fields[name])
    if fields.get("pixel_boxes") is not None:
        fields["pixel_boxes"] = tuple(map(tuple, fields["pixel_boxes"]))
    return Record(image=image, **fields)


def _fields(record: Record) -> dict[str, Any]:
    """The fields that are set, without the picture."""
    fields = {
        name: getattr(record, name)
        for name in (
            "name",
            "captions",
            "label",
            "distribution",
            "attributes",
            "split",
            "boxes_size",
            "pixel_boxes",
            "is_person",
            "is_vote",
            "table",
            "group",
            "size",
            "refused",
        )
    }
    kept = {name: value for name, value in fields.items() if value not in (None, (), {}, False)}
    if record.persons is not None:
        kept["persons"] = [person.to_json() for person in record.persons]
    return kept


def _encode_image(image: Image) -> Any:
    if isinstance(image, bytes):
        return ["bytes", base64.b64encode(image).decode()]
    if isinstance(image, str):
        return image
    return [type(image).__name__, {name: value for name, value in asdict(image).items() if value != ""}]


def _decode_image(value: Any) -> Image:
    if isinstance(value, str):
        return value
    kind, content = value
    if kind == "bytes":
        return base64.b64decode(content)
    return Slice(**content) if kind == "Slice" else Cell(**content)
