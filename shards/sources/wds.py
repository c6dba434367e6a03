"""WebDataset tars: img2dataset's output, our own shards, or any other collection.

SOURCE is a tar, a folder of tars (`SOURCE/<split>/*.tar` where there are none at its top), or a pattern with
`*`. Of a sample, `.txt` is the caption, `.cls` the label, and `.json` may hold `caption` or `captions`,
`label`, `persons` and `attributes` as our own shards do; all other fields become attributes, as do the
columns of img2dataset's `.parquet` beside a tar. A key that occurs in several tars counts once per tar.
"""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.persons import Person
from shards.sources import Record, Slice, SourceOptions
from shards.sources.folder import SPLITS
from shards.sources.table import plain
from shards.storage import Place, matching, open_seekable, place
from shards.tars import Group, groups
from uniemox_dist.runtime.errors import UserError

# Fields of img2dataset about its download, of which nothing is left to say once the picture is here.
_DOWNLOAD = {"key", "status", "error_message", "sha256", "md5", "width", "height"}
_OWN = {"caption", "captions", "label", "persons", "attributes", "source", "image_sha256"}


def read(source: str, options: SourceOptions) -> Iterator[Record]:
    """Yields the samples tar by tar; names are `tar/sample`, or what our own shards call the source."""
    root = place(source, "SOURCE")
    for tar, split in _tars(root, source):
        rows = table_rows(tar)
        for group in groups(tar):
            yield from sample_records(tar, group, split, rows)


def _tars(root: Place, source: str) -> Iterator[tuple[Place, str | None]]:
    found: list[tuple[Place, str | None]]
    if (named := matching(source, "SOURCE")) is not None:
        found = [(tar, None) for tar in named]
    elif root.is_file():
        found = [(root, None)]
    elif root.is_dir():
        found = [(tar, None) for tar in sorted(root.glob("*.tar"), key=str)] or [
            (tar, SPLITS.get(tar.parent.name, tar.parent.name))
            for tar in sorted(root.glob("*/*.tar"), key=str)
        ]
    else:
        raise UserError(f"SOURCE={source}: no such file or folder")
    if not found:
        raise UserError(f"SOURCE={source}: holds no tars; give a folder of .tar files, or a pattern")
    yield from found


def table_rows(tar: Place) -> dict[str, dict[str, Any]]:
    """The rows of img2dataset's table beside a tar, by key; none where there is no such table."""
    beside = tar.parent / f"{tar.name.removesuffix('.tar')}.parquet"
    if not beside.is_file():
        return {}
    try:
        with open_seekable(beside) as file:
            table = pq.read_table(file)
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{beside}: not a readable table ({str(error).splitlines()[0]}); take it away"
        ) from None
    if "key" not in table.column_names:
        return {}
    return {str(row["key"]): row for row in table.to_pylist()}


def sample_records(
    tar: Place, group: Group, split: str | None, rows: dict[str, dict[str, Any]]
) -> Iterator[Record]:
    """The record of a group of members, and refused ones for whatever cannot be used."""
    name = f"{tar.name}/{group.name}"
    pictures = group.pictures
    if not pictures:
        if group.find("json") or group.find("txt"):
            yield Record(name, b"", split=split, refused=("no_picture", "has no picture among its members"))
        return
    first, *others = pictures
    image = Slice(str(tar), first.offset, first.length)
    if group.is_unsafe:
        yield Record(name, image, split=split, refused=("unsafe_name", "its name leads out of the folder"))
        return
    try:
        fields = {**rows.get(group.name, {}), **_json(tar, group)}
        record = _record(name, image, split, fields, _text(tar, group, "txt"), _text(tar, group, "cls"))
    except (ValueError, KeyError, TypeError) as error:
        yield Record(name, image, split=split, refused=("annotation", f"its .json or .txt: {error}"))
        return
    yield record
    for other in others:
        detail = f"a second picture (.{other.extension}) of one key"
        yield Record(f"{name}.{other.extension}", b"", split=split, refused=("duplicate_key", detail))


def _record(name: str, image: Slice, split: str | None, fields: dict[str, Any], txt: str, cls: str) -> Record:
    """The record of a sample; `fields` are those of its `.json` and of its row in the table beside the tar."""
    given = fields.get("captions")
    captions = [str(caption) for caption in given] if isinstance(given, list) else []
    captions = [text for text in captions if text] or [text for text in (txt, fields.get("caption")) if text][
        :1
    ]
    label = fields.get("label") if fields.get("label") is not None else cls or None
    own = fields.get("attributes")
    attributes = dict(own) if isinstance(own, dict) else {}
    attributes |= {k: v for k, v in fields.items() if k not in _OWN | _DOWNLOAD}
    attributes = {str(key): plain(value) for key, value in attributes.items()}
    persons = fields.get("persons")
    return Record(
        name=str(fields["source"]) if {"source", "image_sha256"} <= fields.keys() else name,
        image=image,
        captions=tuple(captions),
        label=None if label is None else str(label),
        attributes={key: value for key, value in attributes.items() if value not in (None, "")},
        split=split,
        persons=tuple(map(Person.from_json, persons)) if persons else None,
        size=image.length,
    )


def _json(tar: Place, group: Group) -> dict[str, Any]:
    text = _text(tar, group, "json")
    fields = json.loads(text) if text else {}
    if not isinstance(fields, dict):
        raise ValueError(f"holds {type(fields).__name__}, not an object")
    return fields


def _text(tar: Place, group: Group, extension: str) -> str:
    member = group.find(extension)
    if member is None:
        return ""
    return _content(tar, member.offset, member.length).decode("utf-8-sig").strip()


_open: tuple[str, Any] | None = None


def _content(tar: Place, offset: int, length: int) -> bytes:
    """Some bytes of a tar; the last one stays open, since its members are asked for one after the other."""
    global _open
    if _open is None or _open[0] != str(tar):
        if _open is not None:
            _open[1].close()
        _open = (str(tar), open_seekable(tar))
    _open[1].seek(offset)
    data: bytes = _open[1].read(length)
    return data
