"""Tables: Parquet, Arrow, CSV or JSON Lines, with one row per picture, or one per caption.

SOURCE is a file, a folder of `.parquet` files (or else of other tables), or a pattern with `*`. Columns: `image`
(bytes, or a struct with `bytes`) or `path` (below the table's folder, or a URL), and optionally `key`, `caption` (text
or a list), `label`, `split`, `persons` (a list of box, score, labels as in FORMAT.md), `distribution`
(an object of labels and their shares, or several columns; see `columns.py`); every other column becomes an
attribute. Rows of the same path are one picture with several captions, and so are rows of equal bytes in tables that
have captions, whose pictures are read to compare them. In a CSV these named columns are texts (`007`
stays `007`), and `image` is a path. An empty text counts as missing; `csv_cells.py` has the other rules for cells.

Captions may have another usual name, such as `text` (`columns.py`). Tables without `image` and `path`, those of Hugging
Face's `datasets`, JSON Lines and Arrow files may use other names for the other columns, too, such as
`file_name`. Classes of `datasets` are stored by name. If
there are several tables, all called like splits (`train.csv`, `test-00000-of-00002.parquet`), these are their splits.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from shards.sources import Cell, Image, Record, SourceOptions
from shards.sources.columns import (
    NAMED,
    CaptionColumns,
    caption_names,
    check_columns_seen,
    check_known,
    exact_names,
    label_columns,
    make_record,
    missing_columns,
    note_captions,
    shape_of,
    usual_names,
    write_caption_notes,
)
from shards.sources.csv_cells import CsvCells, write_cell_notes
from shards.sources.described import read_described
from shards.sources.files import try_path
from shards.sources.find_tables import CSV, JSON_LINES, find_tables, locate_tables
from shards.sources.hugging_face import has_classes, name_classes, read_features
from shards.sources.preset_schema import FoundTable
from shards.sources.tables import (
    ARROW,
    check_column_names,
    hash_cell,
    open_table,
    read_csv,
    read_json_lines,
    storage_type,
)
from shards.storage import Place, is_local, parse_place
from uniemox_dist.core.errors import UserError

USES = ("--column", "--persons source", "--allow-outside")
SEVERAL_ROWS = True


def read(source: str, options: SourceOptions) -> Iterator[Record]:
    """Yields the rows, file by file.

    Raises:
        UserError: if there is no table, or one without pictures, or an unknown `--column`.
    """
    check_known(options.columns)
    if options.tables:
        yield from _described(options.tables, source, options)
        return
    if options.table is not None:
        tables = locate_tables(source)
        own = next(
            (name for path, name in tables if path.suffix.lower() in (*JSON_LINES, *ARROW, ".parquet")), None
        )
        if own is not None:
            raise UserError(f"--columns and --delimiter: {own} states its columns itself; leave both out")
        described = [FoundTable(path, options.table) for path, _ in tables]
        yield from _described(described, source, options)
        return
    tables, splits = find_tables(source, options)
    for (path, name), split in zip(tables, splits):
        if is_local(path) and not options.allow_outside:
            options.findings.roots.add(str(_pictures(path, options)))
        for record in _reader(path)(path, name, options):
            yield record if split is None or record.split else replace(record, split=split)
    write_caption_notes("tables", options)
    write_cell_notes(options.findings)


def _described(tables: Sequence[FoundTable], source: str, options: SourceOptions) -> Iterator[Record]:
    """The records of tables whose columns a preset or the command line describes."""
    for number, table in enumerate(tables):
        pictures = _pictures(table.path, options)
        if is_local(pictures) and not options.allow_outside:
            options.findings.roots.add(str(pictures))
        for record in read_described(table, str(pictures), source, options):
            yield replace(record, table=number)
    write_caption_notes("tables", options)
    write_cell_notes(options.findings)


def _pictures(table: Place, options: SourceOptions) -> Place:
    """The folder below which the paths in a table are."""
    return table.parent if options.pictures is None else parse_place(options.pictures, "--pictures")


def _reader(path: Place) -> Any:
    extension = path.suffix.lower()
    return _csv if extension in CSV else _json_lines if extension in JSON_LINES else _columnar


# ---- Parquet and Arrow


def _columnar(path: Place, name: str, options: SourceOptions) -> Iterator[Record]:
    with open_table(path) as table:
        schema = table.schema
        check_column_names(schema.names, path)
        features = read_features(schema)
        is_usual = bool(features) or path.suffix.lower() in ARROW or options.form is not None
        names = _names(schema, features, options, usual=is_usual)
        if options.form is not None and "label" not in options.columns:
            names["label"] = _find_text_label(schema, features, names["label"])
        _check_columns(schema.names, names, path)
        note_captions(names, schema.names, options)
        pictures = [n for n in (names["image"], names["path"]) if n in schema.names]
        kinds = {n: _kind(schema.field(n).type, n, path) for n in pictures}
        inline = [n for n in pictures if kinds[n] == "bytes"]
        others = [n for n in schema.names if n not in inline]
        has_captions = names["caption"] in others
        classes = {n: features[n] for n in others if has_classes(features.get(n))}
        first = 0
        for group in range(table.groups):
            count, used = table.size(group, inline)
            size = used // max(1, count) or None
            cells = table.cells(group, inline[0]) if inline and has_captions else itertools.repeat(None)
            for row, (values, content) in enumerate(zip(table.rows(group, others), cells)):
                row_name = f"{name}#{first + row}"
                try:
                    for column, feature in classes.items():
                        values[column] = name_classes(values[column], feature)
                except ValueError as error:
                    yield Record(row_name, b"", refused=("annotation", f"the column {column!r}: {error}"))
                    continue
                if inline:
                    otherwise = _find_file(values, others, names, path, options)
                    cell = Cell(str(path), inline[0], group, row, otherwise)
                    digest = (hash_cell(content) or hash_cell(otherwise)) if has_captions else ""
                    yield make_record(values, names, row_name, cell, size, digest)
                else:
                    where = next((values[n] for n in pictures if values.get(n)), None)
                    yield _path_record(values, names, row_name, path, where, options)
            first += count


def _find_file(
    values: dict[str, Any], columns: list[str], names: dict[str, str], table: Place, options: SourceOptions
) -> str:
    """The file that a row names beside a column of pictures; "" if there is none, or it lies outside."""
    where = values.get(names["path"]) if names["path"] in columns else None
    folder = _pictures(table, options)
    found = try_path(folder, where, allow_outside=options.allow_outside)[0] if where else ""
    return found if isinstance(found, str) else ""


def _names(
    schema: pa.Schema, features: dict[str, Any], options: SourceOptions, *, usual: bool
) -> dict[str, str]:
    exact = exact_names(options.columns)
    shapes = {field.name: _shape(field.type) for field in schema}
    if not usual and (exact["image"] in schema.names or exact["path"] in schema.names):
        return _exact_names(shapes, options)
    columns = dict(options.columns)
    images = [n for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "Image"]
    if images and not {"image", "path"} & {*columns, *schema.names}:
        columns["image"] = images[0]
    return usual_names(shapes, columns)


def _find_text_label(schema: pa.Schema, features: dict[str, Any], label: str) -> str:
    """The column of labels of a set whose labels are declared: instead of one with numbers that have no names the next
    one with a usual name and texts."""
    if label not in schema.names or has_classes(features.get(label)) or _is_text(schema.field(label).type):
        return label
    return next((name for name in label_columns(schema.names) if _is_text(schema.field(name).type)), label)


def _exact_names(shapes: dict[str, str], options: SourceOptions) -> dict[str, str]:
    """The columns of a table that has `image` or `path`: the captions by usual names, all others by their very names.
    Notes a column that looks like a label, but becomes an attribute."""
    exact, usual = exact_names(options.columns), usual_names(shapes, options.columns)["label"]
    if exact["label"] not in shapes and usual in shapes:
        note = f"the column {usual!r} became an attribute; --column label={usual} makes it the label"
        if note not in options.findings.notes:
            options.findings.notes.append(note)
    return exact | caption_names(shapes, options.columns)


def _shape(kind: pa.DataType) -> str:
    kind = storage_type(kind)
    lists = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
    if any(getattr(pa.types, test)(kind) for test in lists):
        return "list"
    return "object" if pa.types.is_struct(kind) or pa.types.is_map(kind) else ""


def _kind(kind: pa.DataType, name: str, path: Place) -> str:
    """`bytes` if a column contains pictures (a struct of Hugging Face may also contain paths), `path` for texts."""
    stored = storage_type(kind)
    if pa.types.is_struct(stored) or any(
        test(stored)
        for test in (
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_binary_view,
            pa.types.is_fixed_size_binary,
        )
    ):
        return "bytes"
    if _is_text(kind):
        return "path"
    raise UserError(
        f"SOURCE={path}: column {name!r} holds {kind}, not pictures or paths; name another with "
        f"--column image=NAME"
    )


def _is_text(kind: pa.DataType) -> bool:
    stored = storage_type(kind)
    return any(
        test(stored) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )


# ---- CSV and JSON Lines


def _csv(path: Place, name: str, options: SourceOptions) -> Iterator[Record]:
    names = exact_names(options.columns)
    reader: CsvCells

    def check_header(header: list[str]) -> None:
        nonlocal names, reader
        if names["image"] not in header and names["path"] not in header:
            names = usual_names(dict.fromkeys(header, ""), options.columns)
        else:
            names = _exact_names(dict.fromkeys(header, ""), options)
        _check_columns(header, names, path)
        note_captions(names, header, options)
        reader = CsvCells(names, header, options.findings)

    for row, _, cells in read_csv(path, check_header):
        values = reader.convert(cells)
        where = values.get(names["image"]) or values.get(names["path"])
        yield _path_record(values, names, f"{name}#{row}", path, where, options)


def _json_lines(path: Place, name: str, options: SourceOptions) -> Iterator[Record]:
    seen: set[str] = set()
    captions = CaptionColumns()
    for _, found in read_json_lines(path):
        if isinstance(found, dict):
            captions.add(found)
    chosen = captions.choose(options)
    for row, found in read_json_lines(path):
        row_name = f"{name}#{row}"
        if isinstance(found, ValueError):
            yield Record(row_name, b"", refused=("annotation", str(found)))
            continue
        if options.columns:
            seen.update(found)
        values = {column: value for column, value in found.items() if value not in (None, "")}
        names = usual_names({column: shape_of(value) for column, value in values.items()}, options.columns)
        names = names | chosen
        where = values.get(names["image"]) or values.get(names["path"])
        if isinstance(where, dict):  # as Hugging Face writes pictures without their bytes
            where = where.get("path")
        if not isinstance(where, str) or not where:
            columns = ", ".join(found) or "none"
            detail = f"names no picture; its fields are {columns[:120]}; name one with --column image=NAME"
            yield Record(row_name, b"", refused=("annotation", detail))
            continue
        yield _path_record(values, names, row_name, path, where, options)
    check_columns_seen(options.columns, seen, f"no line of {path}")


def _path_record(
    values: dict[str, Any],
    names: dict[str, str],
    name: str,
    table: Place,
    where: str | None,
    options: SourceOptions,
) -> Record:
    """The record of a row that names its picture, or has none."""
    image: Image = b""
    refused = None
    if where:
        image, refused = try_path(_pictures(table, options), where, allow_outside=options.allow_outside)
    record = make_record(values, names, name, image)
    return replace(record, refused=refused) if refused and record.refused is None else record


def _check_columns(present: list[str], names: dict[str, str], path: Place) -> None:
    if names["image"] not in present and names["path"] not in present:
        raise UserError(
            f"SOURCE={path}: has neither column {names['image']!r} (picture bytes) nor {names['path']!r} "
            f"(picture file); its columns are {', '.join(present)}; name one with --column image=NAME"
        )
    for ours, theirs in names.items():
        if (ours != theirs or ours in NAMED) and (missing := missing_columns(ours, theirs, present)):
            what = "such column" if missing == [theirs] else f"column {missing[0]!r}"
            raise UserError(
                f"--column {ours}={theirs}: {path} has no {what}; its columns are {', '.join(present)}"
            )
