"""WebDataset tars: img2dataset's output, our own shards, or any other collection.

SOURCE is a tar, a folder of tars (`SOURCE/<split>/*.tar` if none is at its top), or a pattern with `*`. In a sample,
`.txt` is the caption and `.cls` the label. `.json` may have `caption` or `captions`, `label`, `persons` and
`attributes`, as our own shards do; `--column` names other fields, which then go before `.txt` and `.cls`. All other
fields become attributes, and so do the columns of img2dataset's `.parquet` beside a tar. A key that occurs in several
tars counts once per tar. Members belong to one sample if their names agree up to the first dot; they need not be
neighbours. Its picture is the first member with a usual picture's extension, or else one such as `x.v2.jpg`; the latter
is described by `x.v2.txt`, or by `x.txt` if that is missing. If no member has such an extension, the content of the
members decides.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pyarrow.parquet as pq

from shards.format.tars import Group, Member, read_groups
from shards.picture_formats import HEAD_BYTES, identify_format
from shards.sources import Record, Slice, SourceOptions
from shards.sources.columns import DOWNLOAD
from shards.sources.files import SPLITS, is_clutter, name_below, split_name
from shards.sources.tables import convert_parquet_errors
from shards.sources.validate import validate_record
from shards.sources.values import (
    BAD_VALUE,
    load_json,
    parse_attributes,
    parse_captions,
    parse_persons,
    parse_text,
)
from shards.storage import Place, match_pattern, open_seekable, parse_place
from uniemox_dist.core.errors import UserError

USES = ("--persons source", "--column")
COLUMNS = ("caption", "label", "split", "persons")
"""Our names of JSON fields, the valid left sides of `--column`."""
_TEXTS = {"txt", "json", "cls"}
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
    tars = _tars(source)
    own_names = len(tars) == 1 or _are_one_pack([tar for tar, _ in tars])
    for tar, split in tars:
        records = tar_records(
            tar, split, name_below(tar, source), own_names, columns=options.columns, unseen=unseen
        )
        for _, record in records:
            yield record
    for ours, theirs in unseen.items():
        raise UserError(
            f"--column {ours}={theirs}: no sample has such a field in its .json or in the table beside its tar"
        )


def _tars(source: str) -> list[tuple[Place, str | None]]:
    """The tars of a source, with their splits."""
    root = parse_place(source, "SOURCE")
    found: list[tuple[Place, str | None]]
    if (named := match_pattern(source, "SOURCE")) is not None:
        found = [(tar, None) for tar in named]
    elif root.is_file():
        found = [(root, None)]
    elif root.is_dir():
        found = [(tar, None) for tar in sorted(root.glob("*.tar"), key=str)] or [
            (tar, SPLITS.get(tar.parent.name.lower(), tar.parent.name))
            for tar in sorted(root.glob("*/*.tar"), key=str)
            if not is_clutter(tar.parent.name)
        ]
    else:
        raise UserError(
            f"SOURCE={source}: no such file or folder; give a tar, a folder of tars, or a pattern"
        )
    if not found:
        raise UserError(f"SOURCE={source}: has no tars; give a folder of .tar files, or a pattern")
    return found


def _are_one_pack(tars: list[Place]) -> bool:
    """Whether all tars belong to data sets that this project packed from one listing; the names of their samples are
    then unique."""
    listings = {_listing(folder) for folder in {str(tar.parent): tar.parent for tar in tars}.values()}
    return len(listings) == 1 and None not in listings


def _listing(folder: Place) -> str | None:
    """The hash of the listing that a data set was packed from; None if its manifest has none."""
    try:
        return str(json.loads((folder / "manifest.json").read_bytes())["provenance"]["source_sha256"])
    except (OSError, *BAD_VALUE):
        return None


def _table_rows(tar: Place) -> dict[str, dict[str, Any]]:
    """The rows of img2dataset's table beside a tar, by key; empty if there is no table."""
    beside = tar.parent / f"{tar.name.removesuffix('.tar')}.parquet"
    if not beside.is_file():
        return {}
    with convert_parquet_errors(str(beside)), open_seekable(beside) as file:
        rows = pq.read_table(file, use_threads=False).to_pylist()
    return {str(row["key"]): row for row in rows if "key" in row}


def tar_records(
    tar: Place,
    split: str | None = None,
    tar_name: str | None = None,
    own_names: bool = True,
    field_name: str = "SOURCE",
    columns: Mapping[str, str] | None = None,
    unseen: dict[str, str] | None = None,
) -> Iterator[tuple[Group, Record]]:
    """The records of a tar, each with its group: one for each sample, and a refused one for everything that cannot be
    used.

    Args:
        tar_name: the first part of all names; default: the tar's file name.
        own_names: samples of our own shards keep the name in their source.
        field_name: the tar's name in error lines.
        columns: fields of the `.json` members that the user named: our name (of `COLUMNS`) -> the field's name.
        unseen: those of `columns` that no sample has had so far; found ones are removed.
    """
    rows = _table_rows(tar)
    unseen = {} if unseen is None else unseen
    tar_name = tar_name or tar.name
    group, clutter = None, 0
    for group in read_groups(tar, field_name):
        if _is_clutter(tar, group):
            clutter += len(group.members)
            continue
        for record in _sample_records(tar, group, split, rows, tar_name, own_names, columns or {}, unseen):
            yield group, validate_record(record)
    if group is not None and clutter:
        files = "1 file" if clutter == 1 else f"{clutter} files"
        refused = ("no_picture", f"{files} that macOS adds to archives (._…, .DS_Store, __MACOSX)")
        yield group, Record(f"{tar_name}/._*", b"", split=split, refused=refused)


def _is_clutter(tar: Place, group: Group) -> bool:
    """Whether a group is none of the user's files, but one that macOS adds to archives."""
    base = group.name.rpartition("/")[2]
    if group.name.startswith("__MACOSX/") or base in (".DS_Store", "._", "._.DS_Store"):
        return True
    first = group.members[0]
    return base.startswith("._") and _read_slice(tar, first.offset, 4) == _APPLE_DOUBLE


def _sample_records(
    tar: Place,
    group: Group,
    split: str | None,
    rows: dict[str, dict[str, Any]],
    tar_name: str,
    own_names: bool,
    columns: Mapping[str, str],
    unseen: dict[str, str],
) -> Iterator[Record]:
    name = f"{tar_name}/{group.name}"

    def refused(reason: str, detail: str) -> Record:
        return Record(name, b"", split=split, refused=(reason, detail))

    if not (pictures := _pictures(tar, group)):
        yield refused("no_picture", "has no picture among its members")
        return
    first, *others = pictures
    if group.is_unsafe:
        yield refused("unsafe_name", "its name points outside the folder")
    elif not first.is_file:
        yield refused("no_picture", f"its .{first.extension} is {first.kind.value}")
    else:
        try:
            fields = {**rows.get(group.name, {}), **_json(tar, group, first)}
            if {"source", "image_sha256"} <= fields.keys():  # a sample of ours
                own = str(fields["source"])
                name = own if own_names else f"{tar_name}/{own}"
            image = Slice(str(tar), first.offset, first.length)
            texts = [_text(tar, group, first, extension) for extension in ("txt", "cls")]
            named = {ours: fields.pop(theirs) for ours, theirs in columns.items() if theirs in fields}
            for ours in named:
                unseen.pop(ours, None)
            yield _named(_record(name, image, split, fields, *texts), named)
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


def _record(name: str, image: Slice, split: str | None, fields: dict[str, Any], txt: str, cls: str) -> Record:
    """The record of a sample; `fields` come from its `.json` and its row in the table beside the tar."""
    own = fields.get("attributes")
    more = {key: value for key, value in fields.items() if key not in _OWN | DOWNLOAD}
    label = parse_text(fields.get("label"))
    return Record(
        name=name,
        image=image,
        captions=parse_captions(fields.get("captions"))
        or parse_captions(txt)
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
    member = group.find(extension, picture)
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
