"""The rows of tables that a preset describes: text with any delimiter or pattern, JSON, JSON Lines, Parquet and Arrow.

A row that cannot be read is a ValueError, so that it is refused and counted, as in Flickr30k's results.csv.
"""

import csv
import io
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

from shards.sources import Record, SourceOptions
from shards.sources.columns import note_captions
from shards.sources.csv_cells import CsvCells
from shards.sources.files import NamesInForms, name_below, try_path
from shards.sources.hugging_face import has_classes, name_classes, read_features
from shards.sources.patterns import Pattern
from shards.sources.preset_schema import FoundTable, Table
from shards.sources.row_rules import RowRules
from shards.sources.tables import (
    ARROW,
    SAMPLE_CHARS,
    check_column_names,
    find_delimiter,
    open_table,
    read_json_lines,
)
from shards.sources.values import load_json
from shards.storage import Place, find_files, is_local, parse_place
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.formatting import counted

Row = tuple[int, dict[str, Any] | ValueError]
"""Number of the line or row, from 1, and its cells by column."""


def read_described(table: FoundTable, pictures: str, source: str, options: SourceOptions) -> Iterator[Record]:
    """The records of a table whose rows are pictures, or one of several rows of a picture."""
    files = PictureNames(table.rules, pictures)
    name = name_below(table.path, source)
    repeats = Repeats(table)
    rules: RowRules | None = None
    for number, row in read_rows(table):
        where = f"{name}, line {number}"
        if isinstance(row, ValueError):
            yield Record(where, b"", split=table.rules.split, refused=("annotation", str(row)))
            continue
        if rules is None:
            rules, convert = make_rules(table, row, options)
        cells = convert(row)
        record = rules.record(cells, where)
        if record.refused is not None or record.image:
            yield record
            continue
        try:
            text = rules.path(rules.cells(cells))
            if text is None:
                raise ValueError("names no picture")
            place, refused = try_path(
                parse_place(pictures), files.find(text), allow_outside=options.allow_outside
            )
        except UserError:
            raise
        except ValueError as error:
            place, refused = b"", ("annotation", str(error))
            text = where
        if refused is not None or not repeats.skips(str(place)):
            yield replace(record, name=text or where, image=place, refused=refused)
    repeats.write_note(options)


def make_rules(
    table: FoundTable, row: dict[str, Any], options: SourceOptions
) -> tuple[RowRules, Callable[[dict[str, Any]], dict[str, Any]]]:
    """The rules of a table, from one of its rows, and a function for its cells, which all rows go through first: in
    text, words for missing values, lists of captions and columns without a name are what they are in other tables."""
    rules = RowRules(table.rules, row, table.path)
    if rules.missing_attributes:
        missing = ", ".join(rules.missing_attributes)
        options.findings.notes.append(f"without {missing}, which {table.path.name} does not have")
    if rules.captions:
        note_captions(rules.captions, rules.kept_columns(), options)
    if table.path.suffix.lower() in (".parquet", *ARROW, ".jsonl", ".ndjson", ".json"):
        return rules, lambda cells: cells
    named = [column for column in row if column or table.rules.attributes is True]
    return rules, CsvCells(rules.text_names(), named, options.findings).convert


def read_rows(table: FoundTable) -> Iterator[Row]:
    """The rows of a table, file order.

    Raises:
        UserError: for a file that is not what its extension says, and for one without rows.
    """
    path, extension = table.path, table.path.suffix.lower()
    if extension in (".parquet", *ARROW):
        rows = _columnar(path)
    elif extension in (".jsonl", ".ndjson"):
        rows = _json_lines(path)
    elif extension == ".json":
        rows = _json(path, table.rules)
    else:
        rows = _text(path, table.rules)
    if table.beside is not None:
        rows = _side_by_side(rows, read_rows(FoundTable(table.beside, Table())), table)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise UserError(f"SOURCE={path}: has no rows; download it again, or give another preset")


def _side_by_side(rows: Iterator[Row], others: Iterator[Row], table: FoundTable) -> Iterator[Row]:
    """Rows with the columns that they do not have from another table's rows in the same order."""
    for row, other in itertools.zip_longest(rows, others):
        if row is None or other is None:
            raise UserError(
                f"SOURCE={table.path}: has {'fewer' if row is None else 'more'} rows than {table.beside}, whose rows "
                "should be in the same order; download both again"
            )
        (number, cells), (_, more) = row, other
        if isinstance(cells, ValueError) or isinstance(more, ValueError):
            yield number, cells if isinstance(cells, ValueError) else ValueError(f"{table.beside}: {more}")
        else:
            yield number, {**more, **cells}


class Repeats:
    """Finds the rows that name a picture again, where a preset states that the first one counts."""

    def __init__(self, table: FoundTable) -> None:
        self._table = table
        self._seen: set[str] | None = set() if table.rules.repeated == "first" else None
        self._skipped = 0

    def skips(self, picture: str) -> bool:
        """Whether an earlier row names this picture, so that this one does not count."""
        if self._seen is None or picture not in self._seen:
            if self._seen is not None:
                self._seen.add(picture)
            return False
        self._skipped += 1
        return True

    def write_note(self, options: SourceOptions) -> None:
        if self._skipped:
            rows = counted(self._skipped, "row")
            options.findings.notes.append(
                f"{rows} of {self._table.path.name} left out: of several rows of a picture the first one counts"
            )


class PictureNames:
    """Finds the pictures that rows name by their file name alone, or by a path in another case."""

    def __init__(self, rules: Table, pictures: str) -> None:
        self._match = rules.match
        self._paths: dict[str, list[str]] | None = None
        self._names = NamesInForms(())
        self._pictures = parse_place(pictures)
        self._is_there = lru_cache(4096)(self._is_file)
        """Rows of one picture usually follow one another."""

    def find(self, text: str) -> str:
        """The path of a picture below the pictures' folder; the text itself if there is none.

        A path is compared in any case if there is no file of this very name, and only one in another case. That needs a
        list of all files, so paths in stores are taken as they are.

        Raises:
            ValueError: if several files have this name.
        """
        if self._match == "path" and (not is_local(self._pictures) or self._is_there(text)):
            return text
        if self._paths is None:
            self._paths = {}
            for path in sorted(find_files(self._pictures)):
                self._paths.setdefault(self._name(path), []).append(path)
            self._names = NamesInForms(self._paths)
        found = self._paths.get(self._names.find(self._name(text)), [])
        if len(found) > 1 and self._match == "path":
            return text
        if len(found) > 1:
            raise ValueError(f"{text!r} is the name of several files: {', '.join(found[:3])}")
        return found[0] if found else text

    def _is_file(self, text: str) -> bool:
        try:
            return "://" in text or os.path.lexists(self._pictures / text)
        except ValueError:  # a zero byte
            return True

    def _name(self, path: str) -> str:
        if self._match == "path":
            return path.casefold()
        name = path.rpartition("/")[2]
        stem, dot, _ = name.rpartition(".")
        return (stem if dot and self._match == "stem" else name).casefold()


def _text(path: Place, rules: Table) -> Iterator[Row]:
    try:
        with path.open(
            "r", encoding="utf-8-sig" if rules.encoding == "utf-8" else rules.encoding, newline=""
        ) as file:
            for _ in range(rules.skip):
                file.readline()
            if rules.line is not None:
                yield from _matched(file, rules.line, rules.skip)
                return
            sample = file.read(SAMPLE_CHARS)
            sample += file.readline()  # so that no line is cut
            is_whole = len(sample) < SAMPLE_CHARS
            lines = itertools.chain(io.StringIO(sample, newline=""), file)
            delimiter = rules.delimiter or (
                "\t" if path.suffix.lower() == ".tsv" else find_delimiter(sample, is_whole)
            )
            if delimiter == "space":
                split: Iterator[list[str]] = (line.split() for line in lines)
            else:
                is_plain = bool(rules.header) and delimiter == "\t"
                has_quotes = not is_plain if rules.quotes is None else rules.quotes
                quoting: Any = csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE
                split = csv.reader(
                    lines,
                    strict=True,
                    delimiter=delimiter,
                    quoting=quoting,
                    skipinitialspace=delimiter not in ",\t",
                )
            header = list(rules.header) or [name.strip() for name in next(split, [])]
            check_column_names(header, path)
            start = rules.skip + (1 if rules.header else 2)
            for number, cells in enumerate(split, start):
                if not any(cells):
                    continue
                if len(cells) != len(header):
                    found, wanted = counted(len(cells), "value"), counted(len(header), "column")
                    yield number, ValueError(f"has {found} for {wanted}")
                else:
                    yield number, dict(zip(header, cells))
    except csv.Error as error:
        raise UserError(f"SOURCE={path}: not a readable table: {error}; fix its quotes") from None
    except UnicodeDecodeError as error:
        raise UserError(f"SOURCE={path}: not in UTF-8 ({error.reason}); convert it") from None


def _matched(file: io.TextIOBase, pattern: str, skipped: int) -> Iterator[Row]:
    compiled = Pattern("line", pattern)
    is_header = True
    for number, text in enumerate(file, skipped + 1):
        line = text.rstrip("\r\n")
        if not line.strip():
            continue
        match = compiled.fullmatch(line)
        if match is not None:
            is_header = False
            yield number, {name: text or "" for name, text in match.groupdict().items()}
        elif not is_header:
            yield number, ValueError(f"{line[:80]!r} does not have the form that the preset states")


def _json(path: Place, rules: Table) -> Iterator[Row]:
    try:
        content = load_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"SOURCE={path}: not a JSON file ({error}); download it again") from None
    if rules.records is not None:
        content = content.get(rules.records) if isinstance(content, dict) else None
    if not isinstance(content, list):
        where = f"under {rules.records!r}" if rules.records else "at its top"
        raise UserError(f"SOURCE={path}: has no list {where}; give the file as it is published")
    rows = [flatten(entry) if isinstance(entry, dict) else None for entry in content]
    blank = dict.fromkeys(name for row in rows for name in row or ())
    for number, (entry, row) in enumerate(zip(content, rows), 1):
        if row is not None:
            yield number, {**blank, **row}
        else:
            yield number, ValueError(f"holds {str(entry)[:80]!r}, not an object")


def _json_lines(path: Place) -> Iterator[Row]:
    blank = dict.fromkeys(
        name for _, row in read_json_lines(path) if isinstance(row, dict) for name in row
    )  # a first pass, because a field that is missing in the first row is no mistake
    for number, row in read_json_lines(path):
        yield number + 1, {**blank, **row} if isinstance(row, dict) else row


def flatten(entry: dict[str, Any]) -> dict[str, Any]:
    """An object with the fields of inner objects as `outer.inner`, and lists of objects as lists of their fields."""
    cells: dict[str, Any] = {}
    for name, value in entry.items():
        if isinstance(value, dict):
            cells |= {f"{name}.{inner}": found for inner, found in flatten(value).items()}
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            inner_names = dict.fromkeys(key for item in value for key in item)
            cells |= {f"{name}.{inner}": [item.get(inner) for item in value] for inner in inner_names}
        else:
            cells[name] = value
    return cells


def _columnar(path: Place) -> Iterator[Row]:
    number = 0
    with open_table(path) as table:
        check_column_names(table.schema.names, path)
        features = {name: f for name, f in read_features(table.schema).items() if has_classes(f)}
        for group in range(table.groups):
            for values in table.rows(group, table.schema.names):
                number += 1
                try:
                    yield number, {k: name_classes(v, features.get(k)) for k, v in values.items()}
                except ValueError as error:
                    yield number, error
