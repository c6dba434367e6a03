"""Applies what a preset states about a table to its rows: each row becomes a record.

Values that do not fit refuse the row with the reason `annotation`. A column that the preset names and the table lacks
is an error.
"""

import ast
import io
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image as PillowImage

from shards.detect.types import Person
from shards.sources import Record
from shards.sources.columns import USUAL, caption_names, make_record, shape_of, usual_names
from shards.sources.csv_cells import MISSING as MISSING_WORDS
from shards.sources.files import SPLITS, split_name
from shards.sources.patterns import Pattern
from shards.sources.preset_schema import Pixels, Table
from shards.sources.tables import parse_number, picture_in
from shards.sources.values import (
    BAD_VALUE,
    load_json,
    parse_attributes,
    parse_label,
    parse_real,
    parse_text,
    to_json_value,
)
from shards.storage import Place
from uniemox_dist.core.errors import UserError

FILE = "file"
"""The column that holds the name of the table itself, without its extension."""
MISSING = ("nan", "na", "n/a", "none", "null", "-", ".")
"""Texts of missing numbers, in lower case."""
_FIELD = re.compile(r"\{([^{}]+)\}")


class RowRules:
    """The rules of one table, for rows with these columns."""

    def __init__(self, table: Table, row: Mapping[str, Any], path: Place) -> None:
        """
        Args:
            row: a row of the table, with all of its columns.

        Raises:
            UserError: if the table lacks a column that the preset names, or a column of pictures.
        """
        columns = list(row)
        self.table, self.file = table, path.name.rpartition(".")[0]
        self.patterns = {name: Pattern(f"patterns.{name}", text) for name, text in table.patterns.items()}
        made = [name for pattern in self.patterns.values() for name in pattern.groups]
        present = list(dict.fromkeys([*columns, FILE, *made]))
        used = [column for theirs in table.columns.values() for column in fields_of(theirs, present)]
        used += [
            *table.distribution.values(),
            *(column for columns_of in table.dimensions.values() for column in columns_of),
            *table.patterns,
            *table.json_columns,
            *(table.more or ()),
        ]
        if table.persons is not None:
            used += table.persons.box
        if table.pixels is not None:
            used.append(table.pixels.column)
        for column in used:
            if column not in present:
                raise UserError(
                    f"SOURCE={path}: has no column {column!r}, which the preset names; its columns are "
                    f"{', '.join(columns)}; give the published table, or state its columns in a --preset FILE.yaml"
                )
        self.used = {*used, FILE}
        given = {str(ours): theirs for ours, theirs in table.columns.items()}
        free = {name: shape_of(row.get(name)) for name in present if name not in self.used}
        usual = {ours: ours for ours in USUAL} if given else usual_names(free, {})
        self.captions = {} if "caption" in given else caption_names(free, {})
        """The columns of captions, by the rule of all tables, if the preset states none."""
        usual = {ours: theirs for ours, theirs in {**usual, **self.captions}.items() if theirs in present}
        self.templates = {**usual, **given}
        """Our names -> columns or templates: those of the preset, or those of that very name, or else usual ones."""
        self.columns = columns
        self.used |= {theirs for theirs in self.templates.values() if theirs in present}
        if table.pixels is None and not self.templates.keys() & {"path", "image"}:
            raise UserError(
                f"SOURCE={path}: none of its columns ({', '.join(columns)}) names the pictures; call one of them path "
                "(--columns, or `columns: {path: …}` in a preset)"
            )
        chosen = () if isinstance(table.attributes, bool) else table.attributes
        self.missing_attributes = [column for column in chosen if column not in present]

    def text_names(self) -> dict[str, str]:
        """The columns of a text table that `CsvCells` reads as texts. Those that have rules of their own are called so
        that the words for missing values are texts there: those of patterns, shares, dimensions, JSON and values."""
        plain = {
            ours: theirs
            for ours, theirs in self.templates.items()
            if theirs in self.columns
            and theirs not in self.table.json_columns
            and not MISSING_WORDS & set(self.table.values.get(ours, ()))  # type: ignore[call-overload]
        }
        return {**{f"={column}": column for column in self.used}, **plain}

    def kept_columns(self) -> list[str]:
        """The columns that are used, or become attributes."""
        chosen = self.table.attributes or ()
        used = self.templates.values()
        return [c for c in self.columns if chosen is True or c in chosen or c in used]

    def cells(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row with the columns that patterns find in others, and with JSON read.

        Raises:
            ValueError: if a pattern does not match.
            UserError: if one takes too long.
        """
        cells = {**row, FILE: self.file}
        for column, pattern in self.patterns.items():
            text = str(cells.get(column) or "")
            match = pattern.search(text)
            if match is None:
                raise ValueError(
                    f"the column {column!r} holds {text[:80]!r}, which does not match {self.table.patterns[column]}"
                )
            cells |= match.groupdict()
        for column in self.table.json_columns:
            cells[column] = read_literal(cells.get(column), column)
        return cells

    def path(self, cells: Mapping[str, Any]) -> str | None:
        """The path of a row's picture, with `/` between folders; None if it has none."""
        ours = "path" if "path" in self.templates else "image"
        text = parse_text(picture_in(fill(self.templates[ours], cells)))
        return text and text.replace("\\", "/").removeprefix("./")

    def record(self, row: Mapping[str, Any], name: str) -> Record:
        """The record of a row, without the place of its picture.

        Raises:
            UserError: if a pattern takes too long.
        """
        try:
            return self._record(self.cells(row), name)
        except UserError:  # a pattern that takes too long
            raise
        except BAD_VALUE as error:
            detail = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            return Record(name, b"", split=self.table.split, refused=("annotation", detail))

    def _record(self, cells: dict[str, Any], name: str) -> Record:
        table = self.table
        if table.more is not None:
            first, second = (parse_real(cells[column]) or 0 for column in table.more)
            if first <= second:
                raise ValueError(f"{table.more[0]}={first:g} is not more than {table.more[1]}={second:g}")
        values: dict[str, Any] = {}
        for ours, theirs in self.templates.items():
            if ours == "image" and table.pixels is not None:
                continue
            value = fill(theirs, cells)
            names = table.values.get(ours)  # type: ignore[call-overload]
            if names is not None and value is not None:
                text = str(value).strip()
                value = names.get(text, names.get(parse_label(text) or "", value))
                if (
                    ours == "split"
                    and text
                    and split_name(str(value)) not in (*names.values(), *SPLITS.values())
                ):
                    raise ValueError(f"{value!r} is no split; the preset knows {', '.join(names)}")
            values[ours] = value
        values.pop("path", None)
        values.pop("image", None)
        chosen = table.attributes or ()
        rest = {
            column: parse_number(value) if isinstance(value, str) else value
            for column, value in cells.items()
            if (column not in self.used if chosen is True else column in chosen)
        }
        numbers: dict[str, Any] = {}
        for ours, columns in table.dimensions.items():
            known = (self._dimension(ours, cells[column]) for column in columns)
            numbers[ours] = next((number for number in known if number is not None), None)
        persons = table.persons
        label = values.pop("label", None) if persons is not None else None
        values = values if persons is not None else {**numbers, **values}
        if table.distribution:
            shares = {label: cells[column] for label, column in table.distribution.items()}
            values["votes" if table.votes else "distribution"] = {k: v for k, v in shares.items() if v != ""}
        record = make_record(values, {ours: ours for ours in values}, name, b"")
        if persons is None:
            record = replace(record, attributes={**parse_attributes(rest), **record.attributes})
        if record.refused is not None:
            return replace(record, split=record.split or table.split)
        record = replace(record, split=record.split or table.split)
        if table.label_votes and record.label is not None:
            record = replace(record, label=None, distribution={record.label: 1.0}, is_vote=True)
        if table.pixels is not None:
            record = replace(record, image=draw_pixels(cells[table.pixels.column], table.pixels))
        elif "image" in self.templates and isinstance(
            content := picture_in(fill(self.templates["image"], cells)), bytes
        ):
            record = replace(record, image=content)
        if persons is None:
            return record
        own: dict[str, Any] = {**to_json_value(rest), "label": parse_label(label), **numbers}
        labels = {column: value for column, value in own.items() if value not in (None, "")}
        return add_person(record, self._box(cells), labels, is_pixels=persons.unit == "pixels")

    def _dimension(self, name: Any, value: Any) -> float | None:
        if str(value).strip().lower() in (*MISSING, *self.table.missing):
            return None
        try:
            number = parse_real(value)
        except BAD_VALUE as error:
            raise ValueError(f"{name}: {error}") from None
        return number

    def _box(self, cells: Mapping[str, Any]) -> tuple[float, float, float, float]:
        persons = self.table.persons
        assert persons is not None
        stated = [cells[column] for column in persons.box]
        if len(stated) == 1:
            stated = read_literal(stated[0], persons.box[0])
        try:
            a, b, c, d = map(float, stated)
        except (TypeError, ValueError):
            raise ValueError(f"the box {', '.join(map(str, stated))[:80]} is not four numbers") from None
        x1, y1, x2, y2 = (a, b, a + c, b + d) if persons.form == "size" else (a, b, c, d)
        if not all(map(math.isfinite, (x1, y1, x2, y2))) or x2 < x1 or y2 < y1:
            raise ValueError(f"the box ({a:g}, {b:g}, {c:g}, {d:g}) has no corners in order")
        return x1, y1, x2, y2


def add_person(
    record: Record, box: tuple[float, float, float, float], labels: dict[str, Any], *, is_pixels: bool
) -> Record:
    """A record that describes one person of its picture. The packer scales boxes in pixels, when it knows the size."""
    person = Person((0.0, 0.0, 0.0, 0.0) if is_pixels else box, 1.0, labels)
    return replace(record, persons=(person,), pixel_boxes=(box,) if is_pixels else None, is_person=True)


def fields_of(template: str, present: Collection[str]) -> list[str]:
    """The columns in a template such as `{Folder}/{Filename}.jpg`; a column itself is a template, too."""
    return [template] if template in present or not (found := _FIELD.findall(template)) else found


def fill(template: str, cells: Mapping[str, Any]) -> Any:
    """The value of a column, or the text of a template; None for a template with an empty field."""
    if template in cells or not _FIELD.search(template):
        return cells.get(template)
    texts = {name: parse_text(cells.get(name)) for name in _FIELD.findall(template)}
    return None if None in texts.values() else _FIELD.sub(lambda found: str(texts[found[1]]), template)


def read_literal(value: Any, column: str) -> Any:
    """The value of a cell that holds JSON, or a list as Python prints it; other values are returned unchanged."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return load_json(value)
    except ValueError:
        pass
    try:
        return ast.literal_eval(re.sub(r"\bnan\b", "None", value.strip()))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(
            f"the column {column!r} holds {value[:80]!r}, which is neither JSON nor a list"
        ) from None


def draw_pixels(value: Any, pixels: Pixels) -> bytes:
    """A PNG of grey values in a text such as `70 80 82 …`."""
    width, height = pixels.size
    try:
        numbers = np.array([int(number) for number in re.split(r"[\s,]+", str(value).strip())], np.int64)
    except (ValueError, OverflowError):
        raise ValueError(f"the column {pixels.column!r} holds {str(value)[:40]!r}, not numbers") from None
    if len(numbers) != width * height or numbers.min() < 0 or numbers.max() > 255:
        raise ValueError(
            f"the column {pixels.column!r} holds {len(numbers)} values from {numbers.min()} to {numbers.max()}, but "
            f"{width} x {height} values from 0 to 255 are expected"
        )
    file = io.BytesIO()
    PillowImage.fromarray(numbers.reshape(height, width).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
