"""Tables: Parquet or CSV with one row per picture.

SOURCE is a file, a folder of `.parquet` files, or a pattern with `*`. Columns: `image` (bytes, or a struct
with `bytes`) or `path` (relative to the table), and optionally `key`, `caption` (text or a list), `label`,
`split`, `persons` (a list of box, score, labels as in FORMAT.md); every other column becomes an attribute. In a CSV
these named columns are texts (`007` stays `007`), and `image` is a path. An empty text counts as missing.
"""

import re
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.sources import Cell, Image, Record, SourceOptions
from shards.sources.files import name_below
from shards.sources.tables import check_column_names, convert_parquet_errors, read_csv
from shards.sources.values import BAD_VALUE, parse_attributes, parse_captions, parse_persons, parse_text
from shards.storage import Place, match_pattern, open_seekable, parse_place
from uniemox_dist.core.errors import UserError

USES = ("--column", "--persons source")
KNOWN = ("image", "path", "key", "caption", "label", "split", "persons")
SHIPPED = {"shipped:fluent_emoji": "fluent_emoji.parquet"}


def read(source: str, options: SourceOptions) -> Iterator[Record]:
    """Yields the rows, file by file.

    Raises:
        UserError: if there is no table, or one without pictures, or an unknown `--column`.
    """
    for unknown in sorted(set(options.columns) - set(KNOWN)):
        raise UserError(f"--column {unknown}=…: unknown column; valid are {', '.join(KNOWN)}")
    names = {name: options.columns.get(name, name) for name in KNOWN}
    for path, name in _locate(source):
        yield from (_csv if path.suffix.lower() in (".csv", ".tsv") else _parquet)(path, name, names)


def _locate(source: str) -> list[tuple[Place, str]]:
    """The tables of a source, with their names."""
    if source in SHIPPED:
        return [(Path(str(resources.files("shards") / "demo" / SHIPPED[source])), SHIPPED[source])]
    found = match_pattern(source, "SOURCE")
    if found is None:
        root = parse_place(source, "SOURCE")
        found = [root] if root.is_file() else sorted(root.glob("*.parquet"), key=str) if root.is_dir() else []
    if not found:
        raise UserError(
            f"SOURCE={source}: no such table; give a .parquet or .csv file, a folder of .parquet files, or "
            f"{', '.join(SHIPPED)}"
        )
    return [(path, name_below(path, source)) for path in found]


def _parquet(path: Place, name: str, names: dict[str, str]) -> Iterator[Record]:
    with convert_parquet_errors(f"SOURCE={path}"), open_seekable(path) as raw, pq.ParquetFile(raw) as file:
        schema = file.schema_arrow
        _check_columns(schema.names, names, path)
        check_column_names(schema.names, path)
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
                elif where := next((values[n] for n in pictures if values.get(n)), None):
                    image = _beside(path, where)
                yield _record(values, names, f"{name}#{first + row}", image, size or None)
            first += metadata.num_rows


def _rows(file: pq.ParquetFile, group: int, count: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    """A row group without its pictures, which are read later, in the order of packing."""
    if not columns:
        yield from ({} for _ in range(count))
        return
    for batch in file.iter_batches(4096, row_groups=[group], columns=columns, use_threads=False):
        yield from batch.to_pylist()


def _csv(path: Place, name: str, names: dict[str, str]) -> Iterator[Record]:
    known = set(names.values())
    for row, _, cells in read_csv(path, lambda header: _check_columns(header, names, path)):
        values: dict[str, Any] = {
            column: cell if column in known else _number(cell) for column, cell in cells.items()
        }
        where = values.get(names["image"]) or values.get(names["path"])
        image: Image = _beside(path, where) if where else b""
        yield _record(values, names, f"{name}#{row}", image, None)


def _kind(kind: pa.DataType, name: str, path: Place) -> str:
    """`bytes` if a column contains pictures (a struct of Hugging Face may also contain paths), `path` for texts."""
    if pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "bytes"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
        return "path"
    raise UserError(
        f"SOURCE={path}: column {name!r} holds {kind}, not pictures or paths; name another with "
        f"--column image=NAME"
    )


def _column_bytes(metadata: Any, names: list[str]) -> int:
    columns = [metadata.column(i) for i in range(metadata.num_columns)]
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in names)


def _check_columns(present: list[str], names: dict[str, str], path: Place) -> None:
    if names["image"] not in present and names["path"] not in present:
        raise UserError(
            f"SOURCE={path}: has neither column {names['image']!r} (picture bytes) nor {names['path']!r} "
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
    column = ""
    try:
        for ours, read in _READERS.items():
            column = f"the column {names[ours]!r}: "
            known[ours] = read(known[ours])
        column = ""
        more = parse_attributes(values)
    except BAD_VALUE as error:
        split, key = (known[ours] if isinstance(known[ours], str) else None for ours in ("split", "key"))
        return Record(key or name, image, split=split, refused=("annotation", f"{column}{error}"))
    return Record(
        name=known["key"] or name,
        image=image,
        captions=known["caption"],
        label=known["label"],
        attributes=more,
        split=known["split"],
        persons=known["persons"],
        size=size,
    )


# The split comes first, so that a refused record keeps it.
_READERS: dict[str, Callable[[Any], Any]] = {
    "split": parse_text,
    "key": parse_text,
    "caption": parse_captions,
    "label": parse_text,
    "persons": parse_persons,
}


def _beside(path: Place, text: str) -> str:
    """The path in a cell: absolute, a URL, or relative to the table's folder."""
    return text if "://" in text else str(path.parent / text)


def _number(text: str) -> Any:
    """A cell of a CSV as a number if the conversion is exact; otherwise the text itself."""
    if re.fullmatch(r"-?(0|[1-9]\d{0,17})", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?(0|[1-9]\d*)\.\d+([eE][-+]?\d+)?", text) else text
