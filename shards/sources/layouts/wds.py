"""WebDataset tars: img2dataset's output, our own shards, or any other collection.

`shards/sources/tars.py` finds the tars that SOURCE names. Members belong to one sample if their names agree up to the
first dot; they need not be neighbours. Its picture is the first member with a usual picture's extension, or else one
such as `x.v2.jpg`, or else one that is a picture by its content; every other picture is refused and counted.

All captions of a sample are kept once each: `captions` in its `.json`, then `.txt`, `.caption` and `.text`, then
`caption` in `.json`, or else `text` or another usual name (`columns.py`). `x.jpg.txt` and `x.v2.txt` describe `x` too,
unless another picture of the key has that name. `.json` may have `label`, `label_distribution`, `persons` and
`attributes` as well, as our own shards do; `.cls` is the label if it has none, otherwise an attribute. Fields that
`--column` names replace all these. All other fields become attributes, and so do the columns of img2dataset's
`.parquet` beside a tar. A key that occurs in several tars counts once per tar.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow.parquet as pq

from shards.format.manifest import read_manifest, stated_ranges
from shards.format.sample import DIMENSIONS, parse_record
from shards.format.tars import Group, Member, read_groups
from shards.pictures.formats import HEAD_BYTES, identify_format
from shards.sources import Record, Slice, SourceOptions
from shards.sources.columns import (
    DESCRIBING,
    DOWNLOAD,
    caption_names,
    note_captions,
    shape_of,
    share_columns,
    take_value,
    write_caption_notes,
)
from shards.sources.files import split_name
from shards.sources.tables import convert_parquet_errors
from shards.sources.tars import TARS, SourceTar, are_one_pack, decompressed, find_tars
from shards.sources.validate import validate_record
from shards.sources.values import (
    BAD_VALUE,
    divide_votes,
    load_json,
    parse_attributes,
    parse_captions,
    parse_dimension,
    parse_distribution,
    parse_label,
    parse_persons,
    parse_text,
)
from shards.storage import Place, open_seekable
from uniemox_dist.core.errors import UserError

USES = ("--persons source", "--picture", "--column")
CAPTIONS = ("txt", "caption", "text")
"""Extensions of captions, in their order."""
_TEXTS = {*CAPTIONS, "json", "cls"}
_APPLE_DOUBLE = b"\0\5\x16\7"
"""First bytes of a file that macOS writes for the extended attributes of another file."""
_OWN = {
    "caption",
    "captions",
    "label",
    "label_distribution",
    "persons",
    "attributes",
    "source",
    "image_sha256",
}


def read(source: str, options: SourceOptions) -> Iterator[Record]:
    """Yields the samples tar by tar. Names are `tar/sample`; samples of our own shards keep the name in their source.

    Raises:
        UserError: if there are no tars, or one is incomplete.
    """
    for unknown in sorted(set(options.columns) - set(DESCRIBING)):
        raise UserError(
            f"--column {unknown}=…: --layout wds takes it from the tar; valid are {', '.join(DESCRIBING)}"
        )
    unseen = dict(options.columns)
    tars, others = find_tars(source)
    options.findings.dimension_ranges.update(_read_ranges(tars))
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
                options=options,
            )
            for _, record in tar_records(place, reading):
                yield record
    yield from others
    write_caption_notes("samples", options)
    for ours, theirs in unseen.items():
        raise UserError(
            f"--column {ours}={theirs}: no sample has such a field in its .json or in the table beside its tar"
        )


def _read_ranges(tars: list[SourceTar]) -> dict[str, tuple[float, float]]:
    """The ranges of dimensions that the manifests beside the tars state.

    Raises:
        UserError: if they state different ones.
    """
    ranges: dict[str, tuple[float, float]] = {}
    for folder in dict.fromkeys(tar.place.parent for tar in tars if tar.entry is not None):
        provenance = read_manifest(folder, "SOURCE").provenance
        for name in DIMENSIONS:
            for low, high in stated_ranges(provenance, name):
                first = ranges.setdefault(name, (low, high))
                if first != (low, high):
                    raise UserError(
                        f"SOURCE={folder}: the range of its {name} is {low:g} to {high:g}, but others have "
                        f"{first[0]:g} to {first[1]:g}; pack them one by one"
                    )
    return ranges


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
    """Fields of the `.json` members that the user named: our name (of `DESCRIBING`) -> the field's name."""
    unseen: dict[str, str] = field(default_factory=dict)
    """Those of `columns` that no sample has had so far; found ones are removed."""
    options: SourceOptions = field(default_factory=SourceOptions)
    """Receives the findings."""


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

    pictures = _find_pictures(tar, group)
    if reading.chosen is not None:
        pictures = [member for member in pictures if member.offset in reading.chosen]
        if not pictures:
            return
    if not pictures:
        yield refused("no_picture", "has no picture among its members")
        return
    if group.is_unsafe:
        yield refused("unsafe_name", "its name points outside the folder")
        return
    if reading.picture is not None:
        pictures = sorted(pictures, key=lambda member: not _is_called(member, reading.picture or ""))
        if not _is_called(pictures[0], reading.picture):
            extensions = ", ".join(f".{member.extension}" for member in pictures[:5])
            yield refused("no_picture", f"has no picture {reading.picture}, but {extensions}")
            return
    first, *others = pictures
    if not first.is_file:
        yield refused("no_picture", f"its .{first.extension} is {first.kind.value}")
    else:
        try:
            fields = {
                **reading.rows.get(group.name, {}),
                **_read_json(tar, _describing(group, pictures, "json")),
            }
            fields = parse_record(fields)
            if {"source", "image_sha256"} <= fields.keys():  # a sample of ours
                own = str(fields["source"])
                name = own if reading.own_names else f"{reading.name}/{own}"
            image = Slice(str(tar), first.offset, first.length)
            texts = [_read_text(tar, m) for end in CAPTIONS for m in _describing(group, pictures, end)]
            classes = [_read_text(tar, member) for member in _describing(group, pictures, "cls")]
            named = {}
            for ours, theirs in reading.columns.items():
                wanted = [*share_columns(ours, theirs, fields).values()] or [theirs]
                if any(name in fields for name in wanted):
                    named[ours] = take_value(fields, ours, theirs)
                    reading.unseen.pop(ours, None)
            yield _named(_record(name, image, split, fields, texts, classes, reading.options), named)
        except BAD_VALUE as error:
            yield refused("annotation", f"its .json or .txt: {error}")
    for other in others:
        extension = f".{other.extension}" if other.extension else ""
        detail = f"a second picture ({extension or 'without extension'}) of one key"
        yield Record(f"{name}{extension}", b"", split=split, refused=("duplicate_key", detail))


def _find_pictures(tar: Place, group: Group) -> list[Member]:
    """The pictures of a group: those with a picture's extension, and then others by their content."""
    return group.pictures + [
        member
        for member in group.members
        if member not in group.pictures
        and member.is_file
        and member.extension.rpartition(".")[2] not in _TEXTS
        and identify_format(_read_slice(tar, member.offset, min(member.length, HEAD_BYTES))) is not None
    ]


def _describing(group: Group, pictures: list[Member], end: str) -> list[Member]:
    """The members of a group with the extension `end`, such as `txt`, that describe its first picture: those named
    after it first, then those named after the key, then those named after no picture."""
    first, *others = [
        {picture.extension, picture.extension.rpartition(".")[0]} - {""} for picture in pictures
    ]
    taken = set().union(*others) - first
    found = []
    for member in group.members:
        before, _, last = member.extension.rpartition(".")
        if last == end and before not in taken:
            found.append((0 if before in first else 1 if not before else 2, member))
    return [member for _, member in sorted(found, key=lambda item: item[0])]


def _is_called(picture: Member, name: str) -> bool:
    """Whether `--picture NAME` means a picture: `left` and `left.jpg` mean `k.left.jpg`, and `jpg` means `k.jpg`."""
    return name in (picture.extension, picture.extension.rpartition(".")[0])


def _record(
    name: str,
    image: Slice,
    split: str | None,
    fields: dict[str, Any],
    texts: list[str],
    classes: list[str],
    options: SourceOptions,
) -> Record:
    """The record of a sample; `fields` come from its `.json` and its row in the table beside the tar."""
    captions = parse_captions(fields.get("captions")) + tuple(text for text in texts if text)
    captions += parse_captions(fields.get("caption"))
    shapes = {field: shape_of(value) for field, value in fields.items() if value}
    names = {name: name for name in ("caption", "captions")}
    if not captions:
        names = caption_names(shapes, {})
        captions = parse_captions(fields.pop(names["caption"], None))
    note_captions(names, shapes, options)
    own = fields.get("attributes")
    more = {key: value for key, value in fields.items() if key not in _OWN | DOWNLOAD}
    labels = [text for text in map(parse_label, (fields.get("label"), *classes)) if text]
    others = [label for label in labels if label != labels[0]]
    attributes = {**(own if isinstance(own, dict) else {}), **more, **({"cls": others[0]} if others else {})}
    return Record(
        name=name,
        image=image,
        captions=tuple(dict.fromkeys(captions)),
        label=labels[0] if labels else None,
        distribution=parse_distribution(fields.get("label_distribution")),
        attributes=parse_attributes(attributes),
        split=split,
        persons=parse_persons(fields.get("persons")),
        size=image.length,
    )


def _named(record: Record, named: dict[str, Any]) -> Record:
    """A record with the fields that the user named; they replace what others say."""
    if captions := parse_captions(named.get("caption")):
        record = replace(record, captions=captions)
    if (label := parse_label(named.get("label"))) is not None:
        record = replace(record, label=label)
    if (split := parse_text(named.get("split"))) is not None:
        record = replace(record, split=split_name(split))
    if (persons := parse_persons(named.get("persons"))) is not None:
        record = replace(record, persons=persons)
    if (shares := parse_distribution(named.get("distribution"))) is not None:
        record = replace(record, distribution=shares)
    if (votes := divide_votes(parse_distribution(named.get("votes")))) is not None:
        record = replace(record, distribution=votes)
    values = {name: parse_dimension(named.get(name)) for name in DIMENSIONS}
    known = {name: value for name, value in values.items() if value is not None}
    return replace(record, attributes={**record.attributes, **known})


def _read_json(tar: Place, members: list[Member]) -> dict[str, Any]:
    """The fields of all `.json` members; those of the first go before those of later ones."""
    found: dict[str, Any] = {}
    for member in members:
        text = _read_text(tar, member)
        fields = load_json(text) if text else {}
        if not isinstance(fields, dict):
            raise ValueError(f"is {type(fields).__name__}, not an object")
        found = {**fields, **found}
    return found


def _read_text(tar: Place, member: Member) -> str:
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
