"""Tables: Parquet or CSV with one row per picture.

Columns: `image` (bytes, or a struct with `bytes`) or `path` (relative to the table), and optionally `key`,
`caption` (text or a list), `label`, `split`; every other column becomes an attribute. In a CSV these are
texts (`007` stays `007`), and `image` is a path. An empty text is a missing one.
"""

import base64
import datetime
import math
import random
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from shards.sources import Record, SourceOptions
from uniemox_dist.runtime.errors import UserError

KNOWN = ("image", "path", "key", "caption", "label", "split")
SHIPPED = {"shipped:fluent_emoji": "fluent_emoji.parquet"}
PIECE_BYTES = 256 << 20
"""Row groups are read and shuffled together up to this size (one at least)."""


def read(source: str, options: SourceOptions) -> Iterator[Record]:
    """Yields the rows in a seeded order: row groups are shuffled, then the rows of as many as fit in memory."""
    path = _locate(source)
    names = {name: options.columns.get(name, name) for name in KNOWN}
    for unknown in sorted(set(options.columns) - set(KNOWN)):
        raise UserError(
            f"--column {unknown}=…: not a column that packing knows; valid are {', '.join(KNOWN)}"
        )
    for numbers, table in _pieces(path, names, options):
        order = list(range(table.num_rows))
        random.Random(f"{options.seed}/{numbers[0]}").shuffle(order)
        for row in order:
            values = {name: column[row].as_py() for name, column in zip(table.column_names, table.columns)}
            yield _record(values, names, numbers[row], path)


def _locate(source: str) -> Path:
    if source in SHIPPED:
        return Path(str(resources.files("shards") / "demo" / SHIPPED[source]))
    path = Path(source)
    if not path.is_file():
        raise UserError(
            f"SOURCE={source}: no such table; give a .parquet or .csv file, or {', '.join(SHIPPED)}"
        )
    return path


def _pieces(
    path: Path, names: dict[str, str], options: SourceOptions
) -> Iterator[tuple[list[int], pa.Table]]:
    """(row numbers, rows) of pieces that fit in memory. Tables are often sorted by label: a piece is several row
    groups from all over the table, so that neighbours in a shard are not neighbours there."""
    try:
        if path.suffix.lower() == ".csv":
            table = pyarrow.csv.read_csv(
                path,
                parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types={column: pa.string() for column in names.values()}
                ),
            )
            _check_columns(table.column_names, names, path)
            if table.num_rows:
                yield list(range(table.num_rows)), table
            return
        with pq.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, names, path)
            counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            starts = [sum(counts[:i]) for i in range(len(counts))]
            order = list(range(len(counts)))
            random.Random(f"{options.seed}").shuffle(order)
            while order:
                groups: list[int] = []
                size = 0
                while order and (not groups or size < PIECE_BYTES):
                    groups.append(order.pop())
                    size += file.metadata.row_group(groups[-1]).total_byte_size
                numbers = [starts[g] + i for g in groups for i in range(counts[g])]
                if numbers:
                    yield numbers, file.read_row_groups(groups)
    except pa.ArrowInvalid as error:
        raise UserError(f"SOURCE={path}: not a readable table: {str(error).splitlines()[0]}") from None


def _check_columns(present: list[str], names: dict[str, str], path: Path) -> None:
    if names["image"] not in present and names["path"] not in present:
        raise UserError(
            f"SOURCE={path}: has neither the column {names['image']!r} (picture bytes) nor {names['path']!r} "
            f"(picture file); its columns are {', '.join(present)}; name one with --column image=NAME"
        )


def _record(values: dict[str, Any], names: dict[str, str], row: int, path: Path) -> Record:
    known = {name: values.pop(column, None) for name, column in names.items()}
    caption = known["caption"]
    captions = caption if isinstance(caption, list) else [caption]
    attributes = {name: _plain(value) for name, value in values.items()}
    return Record(
        name=_text(known["key"]) or f"{path.name}#{row}",
        image=_image(known, names, path),
        captions=tuple(str(c) for c in captions if c),
        label=_text(known["label"]),
        attributes={name: value for name, value in attributes.items() if value not in (None, "")},
        split=_text(known["split"]),
    )


def _image(known: dict[str, Any], names: dict[str, str], path: Path) -> bytes | str:
    """The picture's bytes, or its path (from the table's folder); no bytes where both are missing."""
    for name in ("image", "path"):
        value = known[name]
        if isinstance(value, dict):  # the struct of Hugging Face's image columns
            value = value.get("bytes") or value.get("path")
        if not value:
            continue
        if isinstance(value, str):
            return str(path.parent / value)
        if not isinstance(value, bytes):
            raise UserError(
                f"SOURCE={path}: the column {names[name]!r} holds {type(value).__name__}, not pictures or "
                f"paths; name another with --column {name}=NAME"
            )
        return value
    return b""


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def _plain(value: Any) -> Any:
    """A value as JSON has it: times in ISO 8601, NaN as null, bytes in base64, and text for the rest."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value if math.isfinite(value) else str(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return str(value)
