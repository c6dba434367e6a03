"""WebDataset tars: img2dataset's output, our own shards, or any other collection.

`shards/sources/tars.py` finds the tars that SOURCE names. In a sample, `.txt`, `.caption` and `.text` are captions, and
`.cls` is the label; `x.jpg.txt` and `x.jpg.json` belong to `x.jpg` as well. `.json` may have `caption` or `captions`,
`label`, `persons` and `attributes`, as our own shards do; `--column` names other fields, which then go before all
others. All other fields become attributes, and so do the columns of img2dataset's `.parquet` beside a tar. A key that
occurs in several tars counts once per tar. Members belong to one sample if their names agree up to the first dot; they
need not be neighbours. Its picture is the first member with a usual picture's extension, or else one such as
`x.v2.jpg`; the latter is described by `x.v2.txt`, or by `x.txt` if that is missing. If no member has such an extension,
the content of the members decides.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow.parquet as pq

from shards.format.sample import parse_record
from shards.format.tars import Group, Member, read_groups
from shards.pictures.formats import HEAD_BYTES, identify_format
from shards.sources import Record, Slice, SourceOptions
from shards.sources.columns import DOWNLOAD
from shards.sources.files import split_name
from shards.sources.tables import convert_parquet_errors
from shards.sources.tars import TARS, are_one_pack, decompressed, find_tars
from shards.sources.validate import validate_record
from shards.sources.values import (
    BAD_VALUE,
    load_json,
    parse_attributes,
    parse_captions,
    parse_persons,
    parse_text,
)
from shards.storage import Place, open_seekable
from uniemox_dist.core.errors import UserError

USES = ("--persons source", "--picture", "--column")
COLUMNS = ("caption", "label", "split", "persons")
"""Our names of JSON fields, the valid left sides of `--column`."""
CAPTIONS = ("txt", "caption", "text")
"""Extensions of captions, in their order; all of a sample's are kept."""
_TEXTS = {*CAPTIONS, "json", "cls"}
_APPLE_DOUBLE = b"\0\5\x16\7"
"""First bytes of a file that macOS writes for the extended attributes of another file."""
_OWN = {"caption", "captions", "label", "persons", "attributes", "source", "image_sha256"}


def read(source: str, options: SourceOptions) -> Iterator[Record]:
    """Yields the samples tar by tar. Names are `tar/sample`; samples of our own shards keep the name in their source.

    Raises:
        UserError: if there are no tars, or one is incomplete.
    """
    for unknown in sorted(set(options.columns) - set(COLUMNS)):
        raise UserError(
            f"--column {unknown}=…: --layout wds takes it from the tar; valid are {', '.join(COLUMNS)}"
        )
    unseen = dict(options.columns)
    tars, others = find_tars(source)
    own_names = len(tars) == 1 or are_one_pack(tars)
    for tar in tars:
        with decompressed(tar.place, options.scratch) as place:
            reading = Reading(
                tar.name,
                tar.split,
                own_names=own_names,
                chosen=tar.read_chosen(),
                picture=options.picture,
                rows=_table_rows(tar.place),
                as_bytes=place is not tar.place,
                columns=options.columns,
                unseen=unseen,
            )
            for _, record in tar_records(place, reading):
                yield record
    yield from others
    for ours, theirs in unseen.items():
        raise UserError(
            f"--column {ours}={theirs}: no sample has such a field in its .json or in the table beside its tar"
        )


@dataclass(frozen=True)
class Reading:
    """How a tar is read."""

    name: str
    """The first part of all names."""
    split: str | None = None
    field_name: str = "SOURCE"
    """The tar's name in error lines."""
    own_names: bool = True
    """Samples of our own shards keep the name in their source."""
    chosen: frozenset[int] | None = None
    """Positions of the pictures that count; None for all."""
    picture: str | None = None
    """Which picture of a key with several: the part of its name between the key and the format's extension."""
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """From `_table_rows`."""
    as_bytes: bool = False
    """Pictures are passed as bytes, because the tar is deleted."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Fields of the `.json` members that the user named: our name (of `COLUMNS`) -> the field's name."""
    unseen: dict[str, str] = field(default_factory=dict)
    """Those of `columns` that no sample has had so far; found ones are removed."""


def read_tar(tar: Place, field_name: str) -> Iterator[tuple[Group, Record]]:
    """All records of one tar; `field_name` is its name in error lines."""
    return tar_records(tar, Reading(tar.name, field_name=field_name, rows=_table_rows(tar)))


def tar_records(tar: Place, reading: Reading) -> Iterator[tuple[Group, Record]]:
    """The records of a tar, each with its group: one for each sample, and a refused one for everything that cannot be
    used. Samples that are not chosen have none."""
    group, clutter = None, 0
    for group in read_groups(tar, reading.field_name):
        if _is_clutter(tar, group):
            clutter += len(group.members)
            continue
        for record in _sample_records(tar, group, reading):
            if reading.as_bytes and isinstance(image := record.image, Slice):
                record = replace(record, image=_read_slice(tar, image.offset, image.length))
            yield group, validate_record(record)
    if group is not None and clutter and reading.chosen is None:
        files = "1 file" if clutter == 1 else f"{clutter} files"
        refused = ("no_picture", f"{files} that macOS adds to archives (._…, .DS_Store, __MACOSX)")
        yield group, Record(f"{reading.name}/._*", b"", split=reading.split, refused=refused)


def _table_rows(tar: Place) -> dict[str, dict[str, Any]]:
    """The rows of img2dataset's table beside a tar, by key; empty if there is no table."""
    end = max((end for end in TARS if tar.name.lower().endswith(end)), key=len, default="")
    beside = tar.parent / f"{tar.name[: len(tar.name) - len(end)]}.parquet"
    if not beside.is_file():
        return {}
    with convert_parquet_errors(str(beside)), open_seekable(beside) as file:
        rows = pq.read_table(file, use_threads=False).to_pylist()
    return {str(row["key"]): row for row in rows if "key" in row}


def _is_clutter(tar: Place, group: Group) -> bool:
    """Whether a group is none of the user's files, but one that macOS adds to archives."""
    base = group.name.rpartition("/")[2]
    if group.name.startswith("__MACOSX/") or base in (".DS_Store", "._", "._.DS_Store"):
        return True
    first = group.members[0]
    return base.startswith("._") and _read_slice(tar, first.offset, 4) == _APPLE_DOUBLE


def _sample_records(tar: Place, group: Group, reading: Reading) -> Iterator[Record]:
    name, split = f"{reading.name}/{group.name}", reading.split

    def refused(reason: str, detail: str) -> Record:
        return Record(name, b"", split=split, refused=(reason, detail))

    pictures = _pictures(tar, group)
    if reading.chosen is not None:
        pictures = [member for member in pictures if member.offset in reading.chosen]
        if not pictures:
            return
    if not pictures:
        yield refused("no_picture", "has no picture among its members")
        return
    if reading.picture is not None:
        pictures = sorted(pictures, key=lambda member: not _is_called(member, reading.picture or ""))
        if not _is_called(pictures[0], reading.picture):
            extensions = ", ".join(f".{member.extension}" for member in pictures[:5])
            yield refused("no_picture", f"has no picture {reading.picture}, but {extensions}")
            return
    first, *others = pictures
    if group.is_unsafe:
        yield refused("unsafe_name", "its name points outside the folder")
    elif not first.is_file:
        yield refused("no_picture", f"its .{first.extension} is {first.kind.value}")
    else:
        try:
            fields = parse_record({**reading.rows.get(group.name, {}), **_json(tar, group, first)})
            if {"source", "image_sha256"} <= fields.keys():  # a sample of ours
                own = str(fields["source"])
                name = own if reading.own_names else f"{reading.name}/{own}"
            image = Slice(str(tar), first.offset, first.length)
            texts = [_text(tar, group, first, extension) for extension in CAPTIONS]
            label = _text(tar, group, first, "cls")
            named = {ours: fields.pop(theirs) for ours, theirs in reading.columns.items() if theirs in fields}
            for ours in named:
                reading.unseen.pop(ours, None)
            yield _named(_record(name, image, split, fields, texts, label), named)
        except BAD_VALUE as error:
            yield refused("annotation", f"its .json or .txt: {error}")
    for other in others:
        detail = f"a second picture (.{other.extension}) of one key"
        yield Record(f"{name}.{other.extension}", b"", split=split, refused=("duplicate_key", detail))


def _pictures(tar: Place, group: Group) -> list[Member]:
    """The pictures of a group; by their content if no member has a picture's extension."""
    if group.pictures:
        return group.pictures
    return [
        member
        for member in group.members
        if member.is_file
        and member.extension not in _TEXTS
        and identify_format(_read_slice(tar, member.offset, min(member.length, HEAD_BYTES))) is not None
    ]


def _is_called(picture: Member, name: str) -> bool:
    """Whether `--picture NAME` means a picture: `left` and `left.jpg` mean `k.left.jpg`, and `jpg` means `k.jpg`."""
    return name in (picture.extension, picture.extension.rpartition(".")[0])


def _record(
    name: str, image: Slice, split: str | None, fields: dict[str, Any], texts: list[str], cls: str
) -> Record:
    """The record of a sample; `fields` come from its `.json` and its row in the table beside the tar."""
    own = fields.get("attributes")
    more = {key: value for key, value in fields.items() if key not in _OWN | DOWNLOAD}
    label = parse_text(fields.get("label"))
    return Record(
        name=name,
        image=image,
        captions=parse_captions(fields.get("captions"))
        or tuple(dict.fromkeys(text for text in texts if text))
        or parse_captions(fields.get("caption")),
        label=cls or None if label is None else label,
        attributes=parse_attributes({**own, **more} if isinstance(own, dict) else more),
        split=split,
        persons=parse_persons(fields.get("persons")),
        size=image.length,
    )


def _named(record: Record, named: dict[str, Any]) -> Record:
    """A record with the fields that the user named; they go before all others."""
    if captions := parse_captions(named.get("caption")):
        record = replace(record, captions=captions)
    if (label := parse_text(named.get("label"))) is not None:
        record = replace(record, label=label)
    if (split := parse_text(named.get("split"))) is not None:
        record = replace(record, split=split_name(split))
    if (persons := parse_persons(named.get("persons"))) is not None:
        record = replace(record, persons=persons)
    return record


def _json(tar: Place, group: Group, picture: Member) -> dict[str, Any]:
    found = _text(tar, group, picture, "json")
    fields = load_json(found) if found else {}
    if not isinstance(fields, dict):
        raise ValueError(f"is {type(fields).__name__}, not an object")
    return fields


def _text(tar: Place, group: Group, picture: Member, extension: str) -> str:
    member = group.find(extension, picture) or group.find(f"{picture.extension}.{extension}", picture)
    if member is None:
        return ""
    if not member.is_file:
        raise ValueError(f"its .{member.extension} is {member.kind.value}")
    return _read_slice(tar, member.offset, member.length).decode("utf-8-sig").strip()


_open_tar: tuple[str, Any] | None = None


def _read_slice(tar: Place, offset: int, length: int) -> bytes:
    """Bytes of a tar. The last tar stays open, because its members are read one after the other."""
    global _open_tar
    if _open_tar is None or _open_tar[0] != str(tar):
        if _open_tar is not None:
            _open_tar[1].close()
        _open_tar = (str(tar), open_seekable(tar))
    _open_tar[1].seek(offset)
    data: bytes = _open_tar[1].read(length)
    return data
