"""Tables: Parquet or CSV with one row per picture.

Columns: `image` (bytes) or `path` (relative to the table), and optionally `key`, `caption` (text or a list),
`label`, `split`; every other column becomes an attribute.
"""

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


def read(source: str, options: SourceOptions) -> Iterator[Record]:
    """Yields the rows in a seeded order: row groups are shuffled, and rows within each."""
    path = _locate(source)
    names = {name: options.columns.get(name, name) for name in KNOWN}
    for unknown in sorted(set(options.columns) - set(KNOWN)):
        raise UserError(f"--column {unknown}=…: not a column that packing knows; valid are {', '.join(KNOWN)}")
    for first_row, table in _pieces(path, names, options):
        order = list(range(table.num_rows))
        random.Random(f"{options.seed}/{first_row}").shuffle(order)
        for row in order:
            values = {name: column[row].as_py() for name, column in zip(table.column_names, table.columns)}
            yield _record(values, names, first_row + row, path)


def _locate(source: str) -> Path:
    if source in SHIPPED:
        return Path(str(resources.files("shards").joinpath("demo", SHIPPED[source])))
    path = Path(source)
    if not path.is_file():
        raise UserError(f"SOURCE={source}: no such table; give a .parquet or .csv file, or {', '.join(SHIPPED)}")
    return path


def _pieces(path: Path, names: dict[str, str], options: SourceOptions) -> Iterator[tuple[int, pa.Table]]:
    """(number of the first row, rows) of pieces that fit in memory, in shuffled order."""
    try:
        if path.suffix.lower() == ".csv":
            table = pyarrow.csv.read_csv(path)
            _check_columns(table.column_names, names, path)
            yield 0, table
            return
        with pq.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, names, path)
            counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            starts = [sum(counts[:i]) for i in range(len(counts))]
            order = list(range(len(counts)))
            random.Random(f"{options.seed}").shuffle(order)
            for group in order:
                yield starts[group], file.read_row_group(group)
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
    image = known["image"] if known["image"] is not None else known["path"]
    if known["image"] is None and isinstance(image, str):
        image = str(path.parent / image)
    caption = known["caption"]
    captions = tuple(caption) if isinstance(caption, list) else (caption,) if caption else ()
    key = known["key"]
    return Record(
        name=str(key) if key is not None else f"{path.name}#{row}",
        image=image if image is not None else b"",
        captions=tuple(str(c) for c in captions if c),
        label=None if known["label"] is None else str(known["label"]),
        attributes={name: value for name, value in values.items() if value is not None},
        split=None if known["split"] is None else str(known["split"]),
    )
