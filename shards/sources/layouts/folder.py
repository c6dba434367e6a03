"""Picture folders: label folders, with or without split folders above them.

Paths are `SOURCE/<split>/<label>/…/picture` if the top folders are called train, val, test or similar (in any case),
and `SOURCE/<label>/…/picture` if none is. Pictures directly in SOURCE have no label. Folders between label and picture
are the record's group. Every file that is a picture by its content belongs to the source, whatever its name; files with
a picture's extension that are none are refused when they are packed, except macOS's `._x.jpg`. All other files are
counted by extension. Hidden folders and `__MACOSX` are skipped.

Captions come from files beside a picture `x.jpg`, in this order and all of them: `x.txt`, `x.caption`, `x.text`, the
same after the whole name (`x.jpg.txt`), the rows of a `metadata.csv`, `.jsonl` or `.parquet` above it (`metadata.py`),
and `x.json` (an object with `caption`, `captions` or `text`, or else `tags`). Extensions may have any case. Labels of
the metadata go before those of folders, and folders before `x.json`; other fields of both become attributes.
"""

import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from shards.format.sample import parse_record
from shards.format.tars import PICTURES
from shards.pictures.formats import PictureFormat, identify_format
from shards.sources import Record, SourceOptions
from shards.sources.columns import (
    DOWNLOAD,
    READ,
    check_columns_seen,
    check_known,
    make_record,
    note_captions,
    shape_of,
    usual_names,
    write_caption_notes,
)
from shards.sources.csv_cells import write_cell_notes
from shards.sources.files import (
    SPLITS,
    NamesInForms,
    is_apple_double,
    is_clutter,
    name_below,
    read_head,
    read_side_file,
    split_name,
)
from shards.sources.metadata import Metadata, is_metadata
from shards.sources.patterns import Pattern
from shards.sources.rows import join_rows, keep_one_split
from shards.sources.values import (
    BAD_VALUE,
    load_json,
    parse_array,
    parse_captions,
    parse_dimension,
    parse_text,
)
from shards.storage import Place, find_files, has_bucket, parse_place
from uniemox_dist.core.errors import UserError

USES = ("--column",)
TEXTS = (".txt", ".caption", ".text")
"""Extensions of captions files, in the order of their captions."""
JSON_BYTES = 1 << 20
"""A larger `x.json` is not read: it holds more than captions, such as the picture itself."""
_OURS = ("source", "image_sha256")
HIDDEN = "in hidden folders"
_HEADS = 256
"""Files of which one thread reads the first bytes."""


def read(source: str, options: SourceOptions) -> Iterator[Record]:
    """Yields the pictures by name, and then refused records for files that only a metadata file names. Names are paths
    relative to the source.

    Raises:
        UserError: if the folder does not exist, has no pictures, or has folders of splits beside other folders.
    """
    check_known(options.columns)
    root = parse_place(source, "SOURCE")
    if not root.is_dir():
        if not has_bucket(root):
            raise UserError(f"SOURCE={source}: no such bucket; correct its name")
        raise UserError(f"SOURCE={source}: no such folder; give a folder of pictures")
    paths = sorted(find_files(root))
    count = len(paths)
    paths = [path for path in paths if not any(map(is_clutter, path.split("/")[:-1]))]
    if hidden := count - len(paths):
        options.findings.not_pictures[HIDDEN] += hidden
    paths = _without_ignored(paths, source, options)
    said = [path for path in paths if is_metadata(path)]
    pictures = _find_formats(root, said)
    said = [path for path in said if path not in pictures]
    with Metadata(root, said, NamesInForms(paths), options) as metadata:
        folder = _Folder(source, root, paths, metadata, options)
        yield from folder.records()
        metadata.check_tables(source)
        yield from metadata.unmatched()
        write_caption_notes("metadata or .json files", options)
        write_cell_notes(options.findings)
        check_columns_seen(options.columns, metadata.fields | folder.fields, "no metadata file or .json")


def _without_ignored(paths: list[str], source: str, options: SourceOptions) -> list[str]:
    """The files that may be pictures: without the tables of the set, and without folders that hold none of its
    pictures, such as masks; the latter are counted."""
    ignored = [name.casefold().strip("/") for name in (options.form.ignore if options.form else ())]
    tables = {name_below(table.path, source) for table in options.tables}
    paths = [path for path in paths if path not in tables]
    kept = [path for path in paths if not any(path.casefold().startswith(f"{name}/") for name in ignored)]
    if ignored and len(kept) < len(paths):
        options.findings.not_pictures[f"in {', '.join(ignored)}"] += len(paths) - len(kept)
    return kept


class _Folder:
    """The files of a source, and which of them are pictures."""

    def __init__(
        self, source: str, root: Place, paths: list[str], metadata: Metadata, options: SourceOptions
    ) -> None:
        self.root, self.metadata, self.options = root, metadata, options
        name = options.form.name if options.form is not None else None
        self.pattern = Pattern("name", name) if name is not None else None
        self.arrays = options.form.arrays if options.form is not None else {}
        self.label_folders = options.form is None or options.form.label_folders
        self.lists = ", ".join(table.path.name for table in options.tables if table.rules.split is not None)
        """The lists of splits that the set's preset names; pictures that none of them names are refused."""
        named = {path for path in paths if _extension(path) in PICTURES and not is_apple_double(path)}
        others = [path for path in paths if path not in named]
        formats = _find_formats(root, others)
        self.pictures = [path for path in paths if path in named or path in formats or metadata.names(path)]
        self.refused = {path: found for path, found in formats.items() if found and not found.is_accepted}
        known = set(self.pictures)
        others = [path for path in others if path not in known]
        _count(others, options)
        if not self.pictures:
            kinds = ", ".join(f"{n} {kind}" for kind, n in options.findings.not_pictures.most_common(5))
            raise UserError(
                f"SOURCE={source}: has no pictures; its files are {kinds or 'none'}; give another folder, or "
                "another --layout"
            )
        # By path with the extension in lower case; of x.txt and x.TXT the former comes first.
        self.beside: dict[str, list[str]] = {}
        stems = NamesInForms(stem for path in self.pictures for stem in _stems(path))
        for path in sorted(others, key=str.swapcase):
            if (extension := f".{_extension(path)}") in (*TEXTS, ".json"):
                self.beside.setdefault(stems.find(path[: -len(extension)]) + extension, []).append(path)
        tops = {path.split("/")[0] for path in self.pictures if "/" in path and path not in self.refused}
        self.has_splits = _has_splits(source, tops)
        self.fields: set[str] = set()
        """Names of fields of the `.json` files."""
        self.used: set[str] = set()
        self.notes: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def records(self) -> Iterator[Record]:
        base = str(self.root).rstrip("/")
        for path in self.pictures:
            # File names are bytes; those that are not UTF-8 are written with \xff escapes.
            name = _escape(path)
            parts = name.split("/")[:-1]
            top = parts[0].lower() if parts else ""
            split = SPLITS[top] if self.has_splits and top in SPLITS else None
            if split is not None:
                parts.pop(0)
            label, group = parts[0] if parts else None, "/".join(parts[1:]) or None
            if not self.label_folders:
                label, group = None, None
            if self.pattern is not None:
                found = self.pattern.search(name)
                named = found.groupdict() if found is not None else {}
                label, group = named.get("label"), named.get("group") or group
                split = split_name(named["split"]) if named.get("split") else split
            record = Record(name=name, image=f"{base}/{path}", label=label, group=group, split=split)
            texts, jsons = self._find_beside(path)
            rows, leaks = keep_one_split(record, self.metadata.rows(path))
            yield from leaks
            if (kind := self.refused.get(path)) is not None:
                yield replace(record, refused=("format", kind.refusal or kind.name))
            else:
                yield self._in_a_split(self._describe(path, record, texts, rows, jsons))
        self._write_notes()

    def _in_a_split(self, record: Record) -> Record:
        if self.lists and record.split is None and record.refused is None:
            return replace(record, refused=("annotation", f"none of {self.lists} names it"))
        return record

    def _find_beside(self, path: str) -> tuple[list[str], list[str]]:
        """The captions files and the .json files of a picture, in the order of their captions."""
        stems = _stems(path)
        texts = [side for stem in stems for ext in TEXTS for side in self.beside.get(stem + ext, ())]
        jsons = [side for stem in stems for side in self.beside.get(f"{stem}.json", ())]
        self.used.update(texts, jsons)
        return texts, jsons

    def _describe(
        self, path: str, record: Record, texts: list[str], rows: list[Record], jsons: list[str]
    ) -> Record:
        """A picture's record with what the files beside it and the rows of metadata say."""
        captions: dict[str, None] = {}
        sources: set[tuple[str, ...]] = set()
        for beside in texts:
            try:
                text = read_side_file(self.root / beside).decode("utf-8-sig").strip()
            except ValueError as error:
                detail = f"its caption {_escape(beside.rpartition('/')[2])}: {error}"
                return replace(record, refused=("annotation", detail))
            if text:
                sources.add((text,))
                captions[text] = None
        label, attributes, persons, split = record.label, {}, None, record.split
        distribution = None
        if rows:
            joined = join_rows(rows)
            if joined.refused is not None:
                return replace(record, refused=joined.refused)
            sources.add(joined.captions)
            captions |= dict.fromkeys(joined.captions)
            label, attributes, persons = joined.label or label, joined.attributes, joined.persons
            record = replace(record, pixel_boxes=joined.pixel_boxes)
            split, distribution = joined.split or split, joined.distribution
        elif self.metadata.covers(path):
            self._note("pictures that no metadata file names", path)
        for beside in jsons:
            try:
                said = self._read_json(beside)
            except BAD_VALUE as error:
                detail = f"its {_escape(beside.rpartition('/')[2])}: {error}"
                return replace(record, refused=("annotation", detail))
            if said is None:
                continue
            if said.refused is not None:
                reason, detail = said.refused
                detail = f"its {_escape(beside.rpartition('/')[2])}: {detail}"
                return replace(record, refused=(reason, detail))
            sources.add(said.captions)
            captions |= dict.fromkeys(said.captions)
            more = {"label": said.label} if label is not None and said.label not in (None, label) else {}
            attributes = {**said.attributes, **more, **attributes}
            label = said.label if label is None else label
            persons = said.persons if persons is None else persons
            distribution = said.distribution if distribution is None else distribution
        try:
            values = {ours: self._read_array(path, template) for ours, template in self.arrays.items()}
            if "label" in values:
                label = parse_text(values.pop("label"))
            numbers = {ours: parse_dimension(value) for ours, value in values.items()}
            attributes |= {ours: number for ours, number in numbers.items() if number is not None}
        except BAD_VALUE as error:
            return replace(record, refused=("annotation", str(error)))
        if len(sources - {()}) > 1:
            self._note("pictures with different captions in several files; all are kept", path)
        return replace(
            record,
            captions=tuple(captions),
            label=label,
            distribution=distribution,
            attributes=attributes,
            persons=persons,
            split=split,
        )

    def _read_array(self, path: str, template: str) -> Any:
        """The value in the `.npy` file that the set's preset names for a picture."""
        folder, _, name = path.rpartition("/")
        stem = name.rpartition(".")[0] or name
        place = posixpath.normpath(posixpath.join(folder, template.replace("{stem}", stem)))
        try:
            if place.startswith(("../", "/")):
                raise ValueError("leads out of the folder")
            return parse_array(read_side_file(self.root / place))
        except (ValueError, EOFError) as error:
            raise ValueError(f"its {_escape(place)}: {error}") from None

    def _read_json(self, path: str) -> Record | None:
        """What the `x.json` of a picture says; None if it is no object, or a large one."""
        try:
            data = read_side_file(self.root / path, JSON_BYTES)
        except ValueError as error:
            if str(error).startswith("has more than"):
                self._note(".json files of more than 1 MiB, which were not read", path)
                return None
            raise
        fields = load_json(data.decode("utf-8-sig"))
        if not isinstance(fields, dict):
            self._note(".json files that hold no object, which were not read", path)
            return None
        return self._read_fields(fields, is_used=True)

    def _read_fields(self, fields: dict[str, Any], *, is_used: bool) -> Record:
        is_ours = {"source", "image_sha256"} <= fields.keys()  # of an extracted tar
        fields = parse_record(fields)
        fields = {name: value for name, value in fields.items() if not is_ours or name not in _OURS}
        own = fields.pop("attributes", None)
        fields = {
            name: value
            for name, value in fields.items()
            if name not in DOWNLOAD and value is not None and value != ""
        }
        if isinstance(own, dict):
            fields = {**own, **fields}
        elif own is not None:
            fields["attributes"] = own
        if self.options.columns:
            self.fields.update(fields)
        tags = fields.get("tags")
        names = usual_names({name: shape_of(value) for name, value in fields.items()}, self.options.columns)
        if is_used:
            note_captions(names, fields, self.options)
        named = {ours: names[ours] for ours in READ if ours in names and ours != "split"}
        record = make_record(fields, named, "", b"")
        if not record.captions and record.refused is None and isinstance(tags, str | list):
            record = replace(record, captions=parse_captions(", ".join(parse_captions(tags))))
        return record

    def _has_captions(self, path: str) -> bool:
        """Whether a .json file that belongs to no picture describes one that is missing."""
        try:
            fields = load_json(read_side_file(self.root / path, JSON_BYTES).decode("utf-8-sig"))
            return isinstance(fields, dict) and bool(self._read_fields(fields, is_used=False).captions)
        except BAD_VALUE:
            return False

    def _note(self, what: str, path: str) -> None:
        self.notes[what] += 1
        self.first.setdefault(what, path)

    def _write_notes(self) -> None:
        unused = sorted(path for sides in self.beside.values() for path in sides if path not in self.used)
        for path in unused:
            if _extension(path) != "json":
                self._note(f"captions files ({', '.join(TEXTS)}) that belong to no picture", path)
            elif self._has_captions(path):
                self._note(".json files with captions that belong to no picture", path)
        for what, count in self.notes.items():
            self.options.findings.notes.append(f"{count} {what}, such as {_escape(self.first[what])}")


def _stems(path: str) -> list[str]:
    """What the files beside a picture are called, without their extensions: its name without and with its own."""
    return list(dict.fromkeys((path.rpartition(".")[0] if _extension(path) else path, path)))


def _find_formats(root: Place, paths: list[str]) -> dict[str, PictureFormat | None]:
    """The files that are pictures by their first bytes, and their formats. The format is None for a file that cannot be
    read; it may be a picture unless its name says otherwise."""

    def find(some: Sequence[str]) -> list[tuple[str, PictureFormat | None]]:
        found: list[tuple[str, PictureFormat | None]] = []
        for path in some:
            try:
                head = read_head(root / path)
            except ValueError:
                if f".{_extension(path)}" not in (*TEXTS, ".json"):
                    found.append((path, None))
                continue
            if (kind := identify_format(head)) is not None:
                found.append((path, kind))
        return found

    parts = [paths[start : start + _HEADS] for start in range(0, len(paths), _HEADS)]
    with ThreadPoolExecutor(16) as threads:
        return dict(item for found in threads.map(find, parts) for item in found)


def _count(paths: list[str], options: SourceOptions) -> None:
    """Counts files that are not pictures by extension."""
    count = options.findings.not_pictures
    for path in paths:
        extension = _escape(_extension(path))
        kind = f".{extension}" if extension else "without extension"
        count[kind if kind in count or (len(count) < 100 and len(kind) <= 20) else "others"] += 1


def _has_splits(source: str, tops: set[str]) -> bool:
    """Whether the top folders are splits."""
    splits = {top for top in tops if top.lower() in SPLITS}
    if others := sorted(tops - splits)[:8]:
        if splits:
            raise UserError(
                f"SOURCE={source}: has folders of splits ({', '.join(sorted(splits))}) beside others "
                f"({_escape(', '.join(others))}); remove one kind, or rename a label that is called like a split"
            )
        return False
    return bool(splits)


def _extension(path: str) -> str:
    _, dot, extension = path.rpartition("/")[2].rpartition(".")
    return extension.lower() if dot else ""


def _escape(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")
