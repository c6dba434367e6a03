"""Tables: Parquet or CSV with one row per picture.

SOURCE is a file, a folder of `.parquet` files, or a pattern with `*`. Columns: `image` (bytes, or a struct
with `bytes`) or `path` (relative to the table), and optionally `key`, `caption` (text or a list), `label`,
`split`, `persons` (a list of box, score, labels as in FORMAT.md); every other column becomes an attribute. In
a CSV these are texts (`007` stays `007`), and `image` is a path. An empty text is a missing one.
"""

import base64
import csv
import datetime
import json
import math
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.persons import Person
from shards.sources import Cell, Image, Record, SourceOptions
from shards.storage import Place, matching, open_seekable, place
from uniemox_dist.runtime.errors import UserError

KNOWN = ("image", "path", "key", "caption", "label", "split", "persons")
SHIPPED = {"shipped:fluent_emoji": "fluent_emoji.parquet"}


def read(source: str, options: SourceOptions) -> Iterator[Record]:
    """Yields the rows, file by file."""
    for unknown in sorted(set(options.columns) - set(KNOWN)):
        raise UserError(
            f"--column {unknown}=…: not a column that packing knows; valid are {', '.join(KNOWN)}"
        )
    names = {name: options.columns.get(name, name) for name in KNOWN}
    for path in _locate(source):
        yield from (_csv if path.suffix.lower() in (".csv", ".tsv") else _parquet)(path, names)


def _locate(source: str) -> list[Place]:
    if source in SHIPPED:
        return [Path(str(resources.files("shards") / "demo" / SHIPPED[source]))]
    found = matching(source, "SOURCE")
    if found is None:
        root = place(source, "SOURCE")
        found = [root] if root.is_file() else sorted(root.glob("*.parquet"), key=str) if root.is_dir() else []
    if not found:
        raise UserError(
            f"SOURCE={source}: no such table; give a .parquet or .csv file, a folder of .parquet files, or "
            f"{', '.join(SHIPPED)}"
        )
    return found


def _parquet(path: Place, names: dict[str, str]) -> Iterator[Record]:
    try:
        with open_seekable(path) as raw, pq.ParquetFile(raw) as file:
            schema = file.schema_arrow
            _check_columns(schema.names, names, path)
            pictures = [n for n in (names["image"], names["path"]) if n in schema.names]
            kinds = {n: _kind(schema.field(n).type, n, path) for n in pictures}
            inline = [n for n in pictures if kinds[n] == "bytes"]
            others = [n for n in schema.names if n not in inline]
            first = 0
            for group in range(file.num_row_groups):
                metadata = file.metadata.row_group(group)
                size = _column_bytes(metadata, inline) // max(1, metadata.num_rows)
                for row, values in enumerate(_rows(file, group, metadata.num_rows, others)):
                    image: Image = b""
                    if inline:
                        image = Cell(str(path), inline[0], group, row)
                    elif text := next((values[n] for n in pictures if values.get(n)), None):
                        image = _beside(path, text)
                    yield _record(values, names, f"{path.name}#{first + row}", image, size or None)
                first += metadata.num_rows
    except pa.ArrowInvalid as error:
        raise UserError(f"SOURCE={path}: not a readable table: {str(error).splitlines()[0]}") from None


def _rows(file: pq.ParquetFile, group: int, count: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    """A row group without its pictures: those are fetched later, in the order of packing."""
    if not columns:
        yield from ({} for _ in range(count))
        return
    for batch in file.iter_batches(4096, row_groups=[group], columns=columns):
        yield from batch.to_pylist()


def _csv(path: Place, names: dict[str, str]) -> Iterator[Record]:
    csv.field_size_limit(1 << 24)
    try:
        with path.open("r", encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            header = next(lines, [])
            if not header:
                raise UserError(f"SOURCE={path}: not a readable table: it is empty")
            _check_columns(header, names, path)
            known = set(names.values())
            for row, cells in enumerate(lines):
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise UserError(
                        f"SOURCE={path}: line {lines.line_num} has {len(cells)} values where the header has "
                        f"{len(header)}; mend its commas or quotes"
                    )
                values: dict[str, Any] = {
                    name: cell if name in known else _number(cell) for name, cell in zip(header, cells)
                }
                text = values.get(names["image"]) or values.get(names["path"])
                image: Image = _beside(path, text) if text else b""
                yield _record(values, names, f"{path.name}#{row}", image, None)
    except csv.Error as error:
        raise UserError(
            f"SOURCE={path}: not a readable table: line {lines.line_num}: {error}; mend its quotes"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"SOURCE={path}: not UTF-8 text ({error.reason}); convert it") from None


def _kind(kind: pa.DataType, name: str, path: Place) -> str:
    """`bytes` where a column holds pictures (a struct of Hugging Face's may hold paths, too), `path` for texts."""
    if pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "bytes"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
        return "path"
    raise UserError(
        f"SOURCE={path}: the column {name!r} holds {kind}, not pictures or paths; name another with "
        f"--column image=NAME"
    )


def _column_bytes(metadata: Any, names: list[str]) -> int:
    columns = [metadata.column(i) for i in range(metadata.num_columns)]
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in names)


def _check_columns(present: list[str], names: dict[str, str], path: Place) -> None:
    if names["image"] not in present and names["path"] not in present:
        raise UserError(
            f"SOURCE={path}: has neither the column {names['image']!r} (picture bytes) nor {names['path']!r} "
            f"(picture file); its columns are {', '.join(present)}; name one with --column image=NAME"
        )
    for ours, theirs in names.items():
        if ours != theirs and theirs not in present:
            raise UserError(
                f"--column {ours}={theirs}: {path} has no such column; its columns are {', '.join(present)}"
            )


def _record(
    values: dict[str, Any], names: dict[str, str], name: str, image: Image, size: int | None
) -> Record:
    known = {ours: values.pop(theirs, None) for ours, theirs in names.items()}
    caption = known["caption"]
    captions = caption if isinstance(caption, list) else [caption]
    attributes = {name: plain(value) for name, value in values.items()}
    name = _text(known["key"]) or name
    try:
        persons = _persons(known["persons"])
    except (ValueError, KeyError, TypeError) as error:
        return Record(name, image, refused=("annotation", f"the column {names['persons']!r}: {error}"))
    return Record(
        name=name,
        image=image,
        captions=tuple(str(c) for c in captions if c),
        label=_text(known["label"]),
        attributes={name: value for name, value in attributes.items() if value not in (None, "")},
        split=_text(known["split"]),
        persons=persons,
        size=size,
    )


def _persons(value: Any) -> tuple[Person, ...] | None:
    """The column `persons`: a list of structs, or the same as JSON text."""
    entries = json.loads(value) if isinstance(value, str) and value else value
    if not entries:
        return None
    persons = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise TypeError(f"holds {type(entry).__name__} where a box, score and labels are expected")
        labels = entry.get("labels") or {}
        labels = json.loads(labels) if isinstance(labels, str) else labels
        persons.append(
            Person.from_json({"box": entry["box"], "score": entry.get("score", 1.0), "labels": labels})
        )
    return tuple(persons)


def _beside(path: Place, text: str) -> str:
    """A path as a table states it: absolute, a URL, or from the table's folder."""
    return text if "://" in text else str(path.parent / text)


def _number(text: str) -> Any:
    """A cell of a CSV as a number where it looks like one and nothing is lost; otherwise the text itself."""
    if re.fullmatch(r"-?(0|[1-9]\d{0,17})", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?(0|[1-9]\d*)\.\d+([eE][-+]?\d+)?", text) else text


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def plain(value: Any) -> Any:
    """A value as JSON has it: times in ISO 8601, NaN as null, bytes in base64, and text for the rest."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value if math.isfinite(value) else str(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return str(value)
