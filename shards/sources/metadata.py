"""Metadata files of Hugging Face's ImageFolder: `metadata.csv`, `.jsonl` or `.parquet` beside or above the pictures.

Each row names a picture in `file_name`, relative to the file's folder. Other columns are `text` or `caption`, `label`,
`split` and so on, by their usual names (`columns.py`); the rest become attributes.
"""

import json
import os
import posixpath
import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from shards.sources import Record, SourceOptions
from shards.sources.columns import READ, CaptionColumns, make_record, shape_of, usual_names
from shards.sources.csv_cells import CsvCells
from shards.sources.described import PictureNames, Repeats, make_rules, read_rows
from shards.sources.files import NamesInForms, read_head
from shards.sources.hugging_face import has_classes, name_classes, read_features
from shards.sources.preset_schema import FoundTable
from shards.sources.presets import draw64
from shards.sources.row_rules import RowRules
from shards.sources.tables import check_column_names, open_table, read_csv, read_json_lines
from shards.sources.values import to_json_value
from shards.storage import Place
from uniemox_dist.core.errors import UserError

NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME = "file_name"


def is_metadata(path: str) -> bool:
    """Whether a file has the name of a metadata file."""
    return path.rpartition("/")[2].lower() in NAMES


class _NoFileName(Exception):
    """A file without the column `file_name`."""


class Metadata:
    """The rows of a source's metadata files by picture. The rows are on disk; each needs 17 bytes in memory."""

    def __init__(self, root: Place, paths: list[str], files: NamesInForms, options: SourceOptions) -> None:
        """Reads metadata files; those without `file_name` are left out and noted. Then the tables that the set's preset
        describes.

        Args:
            files: all files of the source.

        Raises:
            UserError: for a file that cannot be read.
        """
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        self._options = options
        self._folders: set[str] = set()
        self.fields: set[str] = set()
        """Names of columns; collected only if the user named some."""
        self._captions: list[dict[str, str]] = []
        """The columns of captions, by file."""
        hashes, offsets = array("Q"), array("Q", [0])
        for path in paths:
            folder, captions = path.rpartition("/")[0], CaptionColumns()
            try:
                if not read_head(root / path):
                    raise _NoFileName("it is empty")
                file_name = options.columns.get("path", FILE_NAME)
                for row, values in _read(root / path, file_name, options):
                    if isinstance(values, dict):
                        captions.add(values)
                        if options.columns:
                            self.fields.update(values, (file_name,))
                    where = f"{path}, row {row + 1}"
                    name, line = _encode(folder, where, values, files, len(self._captions))
                    hashes.append(draw64(0, name))
                    offsets.append(offsets[-1] + len(line))
                    self._file.write(line)
            except _NoFileName as error:
                options.findings.notes.append(f"{path} is not used: {error}")
                continue
            self._folders.add(f"{folder}/" if folder else "")
            self._captions.append(captions.choose(options))
        self._rules: dict[int, RowRules] = {}
        self._table_rows: list[range] = []
        """The numbers of the rows of each table that the preset describes."""
        for place, table in enumerate(options.tables):
            first = len(hashes)
            for name, line in self._read_described(root, place, table, files):
                hashes.append(draw64(0, name))
                offsets.append(offsets[-1] + len(line))
                self._file.write(line)
            self._table_rows.append(range(first, len(hashes)))
            self._folders.add("")
        self._file.flush()
        hash_N = np.frombuffer(hashes, np.uint64)
        self._order_N = np.argsort(hash_N, kind="stable")
        self._sorted_N = hash_N[self._order_N]
        self._offsets = offsets
        self._is_matched_N = np.zeros(len(hash_N), bool)

    def _read_described(
        self, root: Place, place: int, table: FoundTable, files: NamesInForms
    ) -> Iterator[tuple[str, bytes]]:
        """(path of the picture below the root, the row as a line) of the rows of a described table."""
        pictures, repeats = PictureNames(table.rules, str(root)), Repeats(table)
        convert: Callable[[dict[str, Any]], dict[str, Any]]
        for number, row in read_rows(table):
            where = f"{table.path.name}, line {number}"
            name, content = "", row
            if not isinstance(row, ValueError):
                if place not in self._rules:
                    self._rules[place], convert = make_rules(table, row, self._options)
                rules, content = self._rules[place], convert(row)
                try:
                    if (text := rules.path(rules.cells(content))) is None:
                        raise ValueError("names no picture")
                    name = files.find(posixpath.normpath(pictures.find(text)))
                except UserError:
                    raise
                except ValueError as error:
                    content = error
            if isinstance(content, ValueError):
                yield "", json.dumps(["", where, f"{where}: {content}", -1 - place]).encode()
            elif not repeats.skips(name):
                yield name, json.dumps([name, where, to_json_value(content), -1 - place]).encode()
        repeats.write_note(self._options)

    def __enter__(self) -> "Metadata":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def covers(self, path: str) -> bool:
        """Whether a metadata file lies in a folder above a picture."""
        if not self._folders:
            return False
        ends = [at for at, character in enumerate(path) if character == "/"]
        return "" in self._folders or any(path[: at + 1] in self._folders for at in ends)

    def names(self, path: str) -> bool:
        """Whether a row names this file."""
        return bool(self._numbers(path))

    def rows(self, path: str) -> list[Record]:
        """What the rows of a picture say, in the order of the files; their names are places of the rows."""
        numbers = self._numbers(path)
        self._is_matched_N[numbers] = True
        return [self._record(number)[1] for number in numbers]

    def check_tables(self, source: str) -> None:
        """Raises UserError if no row of a table that the preset describes belongs to a picture that `rows` was asked
        for. Lists of splits may be empty, if SOURCE is a part of the set."""
        for table, numbers in zip(self._options.tables, self._table_rows):
            if (
                numbers
                and table.rules.split is None
                and not self._is_matched_N[numbers.start : numbers.stop].any()
            ):
                name, where, values, _ = self._content(numbers[0])
                detail = values if isinstance(values, str) else f"{where} names {name!r}"
                raise UserError(
                    f"SOURCE={source}: none of the {len(numbers):,} rows of {table.path} belongs to a picture there; "
                    f"the first: {detail}"
                )

    def unmatched(self) -> Iterator[Record]:
        """A refused record for each file that rows name, but that was not asked for by `rows`."""
        last = None
        for at in np.flatnonzero(~self._is_matched_N[self._order_N]).tolist():
            number = int(self._order_N[at])
            name, row = self._record(number)
            if name and name == last:
                continue
            last = name
            if row.refused is not None and not name:
                yield Record(row.name, b"", refused=row.refused)
            elif name == ".." or name.startswith(("../", "/")):
                detail = f"{row.name} names it, but it leads out of the folder"
                yield Record(name, b"", split=row.split, refused=("outside", detail))
            else:
                detail = f"{row.name} names it, but there is no such file"
                yield Record(name, b"", split=row.split, refused=("unreadable", detail))

    def _numbers(self, path: str) -> list[int]:
        if not len(self._sorted_N):
            return []
        value = np.uint64(draw64(0, path))
        start, end = (np.searchsorted(self._sorted_N, value, side) for side in ("left", "right"))  # type: ignore[call-overload]
        found: list[int] = self._order_N[start:end].tolist()
        return [number for number in found if self._content(number)[0] == path]

    def _content(self, number: int) -> tuple[str, str, dict[str, Any] | str, int]:
        """(path of the picture, place of the row, its values or why it cannot be used, number of the file; numbers of
        described tables are -1, -2, …)."""
        start, end = self._offsets[number], self._offsets[number + 1]
        name, where, values, file = json.loads(os.pread(self._file.fileno(), end - start, start))
        return name, where, values, file

    def _record(self, number: int) -> tuple[str, Record]:
        name, where, values, file = self._content(number)
        if isinstance(values, str):
            return name, Record(where, b"", refused=("annotation", values))
        if file < 0:
            return name, replace(self._rules[-1 - file].record(values, where), table=-1 - file)
        names = usual_names({key: shape_of(value) for key, value in values.items()}, self._options.columns)
        names = names | self._captions[file]
        named = {ours: names[ours] for ours in READ if ours in names}
        return name, make_record(values, named, where, b"")


def _encode(
    folder: str, where: str, values: dict[str, Any] | ValueError, files: NamesInForms, file: int
) -> tuple[str, bytes]:
    """(path of a row's picture below SOURCE, the row as a line); `file` is the number of its file."""
    content: Any
    if isinstance(values, ValueError):
        name, content = "", f"{where}: {values}"
    else:
        text = values.pop(FILE_NAME, None)
        if isinstance(text, str) and text.strip():
            name = text if text.startswith("/") else posixpath.normpath(posixpath.join(folder, text))
            name = files.find(name)
            content = {key: value for key, value in to_json_value(values).items() if value not in (None, "")}
        else:
            name, content = "", f"{where}: names no file"
    return name, json.dumps([name, where, content, file]).encode()


def _read(
    path: Place, file_name: str, options: SourceOptions
) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """The rows of a metadata file; the picture's file is under `FILE_NAME`."""
    extension = path.suffix.lower()
    rows = _csv(path, file_name, options) if extension == ".csv" else _other(path, file_name, extension)
    for row, values in rows:
        if isinstance(values, dict):
            values[FILE_NAME] = values.pop(file_name, None)
        yield row, values


def _csv(
    path: Place, file_name: str, options: SourceOptions
) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    reader: CsvCells

    def check_header(header: list[str]) -> None:
        nonlocal reader
        _check(header, file_name)
        names = usual_names(dict.fromkeys(header, ""), options.columns)
        reader = CsvCells({**names, "path": file_name}, header, options.findings)

    for row, _, cells in read_csv(path, check_header):
        yield row, reader.convert(cells)


def _other(path: Place, file_name: str, extension: str) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    if extension == ".jsonl":
        first = True
        for row, values in read_json_lines(path):
            if first and isinstance(values, dict):
                _check(list(values), file_name)
                first = False
            yield row, values
        return
    with open_table(path) as table:
        _check(table.schema.names, file_name)
        check_column_names(table.schema.names, path)
        features = {name: f for name, f in read_features(table.schema).items() if has_classes(f)}
        number = 0
        for group in range(table.groups):
            for values in table.rows(group, table.schema.names):
                try:
                    yield number, {k: name_classes(v, features.get(k)) for k, v in values.items()}
                except ValueError as error:
                    yield number, ValueError(str(error))
                number += 1


def _check(columns: list[str], file_name: str) -> None:
    if file_name not in columns:
        raise _NoFileName(f"it has no column {file_name}, only {', '.join(columns)[:120]}")
