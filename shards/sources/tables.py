"""Reading of tables: CSV, JSON Lines, Parquet and Arrow files, with clear errors, and pictures in their columns."""

import codecs
import csv
import hashlib
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from shards.pictures.formats import BadPicture
from shards.sources import Cell
from shards.sources.files import Outside, resolve_path
from shards.sources.other_files import describe_other
from shards.sources.values import load_json
from shards.storage import Place, is_local, open_seekable, parse_place
from uniemox_dist.core.errors import UserError

_FIELD_BYTES = 1 << 24
"""Largest cell of a CSV, and longest line of JSON Lines."""
ARROW = (".arrow", ".feather", ".ipc")
"""Extensions of Arrow files."""
csv.field_size_limit(_FIELD_BYTES)
_CELLS = 64
"""Pictures of a column that are in memory at a time while they are hashed."""
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
_DELIMITERS = "\t,;|"
"""Of a CSV, in the order of preference if several fit."""
_QUOTED = re.compile(r'(^|[,\t;|] *)"(?:[^"]|"")*("|\Z)')
"""A cell of a CSV in quotes, which begin behind a delimiter; group 1 is what is before it."""
SAMPLE_CHARS = 1 << 16
"""Characters of a CSV that decide about its delimiter."""


def read_csv(
    path: Place, check_header: Callable[[list[str]], None]
) -> Iterator[tuple[int, int, dict[str, str]]]:
    """Yields (row number from 0, number of its last line, cells by column) of a UTF-8 CSV or TSV with a header.

    Reading is strict, because a misplaced quote swallows rows.

    Raises:
        UserError: for an empty file, a repeated column, a row longer or shorter than the header, unmatched quotes,
            or bytes that are not UTF-8; also what `check_header` raises.
    """
    try:
        with path.open("r", encoding="utf-8-sig", newline="") as file:
            sample = file.read(SAMPLE_CHARS)
            file.seek(0)
            is_whole = len(sample) < SAMPLE_CHARS
            delimiter = "\t" if path.suffix.lower() == ".tsv" else find_delimiter(sample, is_whole)
            lines = _open_csv(file, delimiter)
            header: list[str] = next(lines, [])
            if not header:
                raise UserError(
                    f"SOURCE={path}: not a readable table: it is empty; give a table with a header"
                )
            check_header(header)
            check_column_names(header, path)
            for row, cells in enumerate(lines):
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise UserError(
                        f"SOURCE={path}: line {lines.line_num} has {len(cells)} values, but the header has "
                        f"{len(header)}; fix its commas or quotes"
                    )
                yield row, lines.line_num, dict(zip(header, cells))
    except csv.Error as error:
        raise UserError(
            f"SOURCE={path}: not a readable table: line {lines.line_num}: {error}; fix its quotes"
        ) from None
    except UnicodeDecodeError as error:
        fix = f"not a CSV in UTF-8 ({error.reason}); convert it, such as iconv -f WINDOWS-1252 -t UTF-8"
        raise UserError(f"SOURCE={path}: {describe_other(path) or fix}") from None


def parse_number(text: str) -> Any:
    """A cell of a CSV as a number if the conversion is exact; otherwise the text itself."""
    if re.fullmatch(r"-?(0|[1-9]\d{0,17})", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?(0|[1-9]\d*)\.\d+([eE][-+]?\d+)?", text) else text


def _open_csv(lines: Iterable[str], delimiter: str) -> Any:
    return csv.reader(lines, strict=True, delimiter=delimiter, skipinitialspace=delimiter not in ",\t")


def find_delimiter(sample: str, is_whole: bool) -> str:
    """The delimiter of the CSV that begins with `sample`: the one in its header, outside of quotes. If there are
    several, the first by which all rows have as many cells as the header; a comma if there is none.

    Args:
        is_whole: `sample` is the whole file; otherwise its last line may be a part.
    """
    header = re.split("[\r\n]", _QUOTED.sub(r"\1", sample), maxsplit=1)[0]
    found = [mark for mark in _DELIMITERS if mark in header] or [","]
    if len(found) == 1:
        return found[0]
    lines = list(io.StringIO(sample, newline=""))
    return next((mark for mark in found if _has_equal_rows(lines, mark, is_whole)), found[0])


def _has_equal_rows(lines: list[str], mark: str, is_whole: bool) -> bool:
    """Whether all complete rows have as many cells as the first one."""
    rows = _open_csv(lines, mark)
    widths: set[int] = set()
    try:
        widths.update(len(row) for row in rows if row and (is_whole or rows.line_num < len(lines)))
    except csv.Error:  # in a sample that ends inside of quotes, too
        if is_whole or rows.line_num < len(lines):
            return False
    return len(widths) == 1


def read_json_lines(path: Place) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Yields (row number from 0, object) of a file with one JSON object per line; a ValueError for a line that is none.

    Empty lines are no rows.

    Raises:
        UserError: for a line of more than 16 MiB, UTF-16, and compressed files.
    """
    row = 0
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(_FIELD_BYTES + 1)
            if not line:
                return
            if len(line) > _FIELD_BYTES:
                raise UserError(
                    f"SOURCE={path}: line {number} has more than {_FIELD_BYTES >> 20} MiB; put one object on each line"
                )
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
                if not line.lstrip().startswith(b"{") and (other := describe_other(path)) is not None:
                    raise UserError(f"SOURCE={path}: {other}")
            if not line.strip():
                continue
            try:
                value = load_json(line.strip().decode())
                if not isinstance(value, dict):
                    raise ValueError(f"holds {type(value).__name__}, not an object")
                yield row, value
            except json.JSONDecodeError as error:
                what = error.msg.removesuffix(" at")
                yield row, ValueError(f"line {number}: {what} at character {error.pos + 1}")
            except ValueError as error:
                yield row, ValueError(f"line {number}: {error}")
            row += 1


def check_column_names(columns: list[str], path: Place) -> None:
    """Raises UserError if two columns have the same name, because one of them would be lost."""
    repeated = [name for name, count in Counter(columns).items() if count > 1]
    if repeated:
        raise UserError(
            f"SOURCE={path}: has {Counter(columns)[repeated[0]]} columns called {repeated[0]!r}; rename or remove "
            "all but one"
        )


@contextmanager
def convert_parquet_errors(where: str, path: Place | None = None) -> Iterator[None]:
    """Turns errors of a damaged Parquet file, read inside, into one line that begins with `where`. If the file at
    `path` is of another kind, the line states that.

    Raises:
        UserError: for a file that is not Parquet, or not complete. Errors of the disk and network pass through.
    """
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError, OSError) as error:
        # pyarrow reports damage as ArrowInvalid, or as a plain OSError without a number.
        if isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError):
            raise
        if path is not None and (other := describe_other(path)) is not None:
            raise UserError(f"{where}: {other}") from None
        raise UserError(
            f"{where}: not a readable table: {' '.join(str(error).split())}; copy it again or remove it"
        ) from None


class Table(Protocol):
    """A Parquet or Arrow file: groups of rows, each of which is read at once."""

    schema: pa.Schema
    groups: int
    """Number of groups."""

    def size(self, group: int, columns: Sequence[str]) -> tuple[int, int]:
        """Rows of a group, and bytes of these columns in it."""

    def rows(self, group: int, columns: list[str]) -> Iterator[dict[str, Any]]:
        """The rows of a group with these columns."""

    def column(self, group: int, name: str) -> Any:
        """A column of a group."""

    def cells(self, group: int, name: str) -> Iterator[Any]:
        """The values of a column of a group, of which a few are in memory at a time."""


@contextmanager
def open_table(path: Place) -> Iterator[Table]:
    """Opens a Parquet or Arrow file.

    Raises:
        UserError: if it is damaged, or neither.
    """
    with convert_parquet_errors(f"SOURCE={path}", path):
        if path.suffix.lower() in ARROW:
            yield _ArrowTable(path)
        else:
            with open_seekable(path) as raw, pq.ParquetFile(raw) as file:
                yield _ParquetTable(file)


class _ParquetTable:
    def __init__(self, file: pq.ParquetFile) -> None:
        self._file = file
        self.schema = file.schema_arrow
        self.groups = file.num_row_groups

    def size(self, group: int, columns: Sequence[str]) -> tuple[int, int]:
        metadata = self._file.metadata.row_group(group)
        every = [metadata.column(i) for i in range(metadata.num_columns)]
        used = [c.total_uncompressed_size for c in every if c.path_in_schema.split(".")[0] in columns]
        return metadata.num_rows, sum(used)

    def rows(self, group: int, columns: list[str]) -> Iterator[dict[str, Any]]:
        if not columns:
            yield from ({} for _ in range(self.size(group, ())[0]))
            return
        for batch in self._file.iter_batches(4096, row_groups=[group], columns=columns, use_threads=False):
            yield from batch.to_pylist()

    def column(self, group: int, name: str) -> Any:
        return self._file.read_row_group(group, [name], use_threads=False)[name]

    def cells(self, group: int, name: str) -> Iterator[Any]:
        batches = self._file.iter_batches(_CELLS, row_groups=[group], columns=[name], use_threads=False)
        for batch in batches:
            yield from (cell.as_py() for cell in batch.column(0))


class _ArrowTable:
    """Arrow's file format (Feather version 2) or stream format, which Hugging Face's `save_to_disk` writes."""

    def __init__(self, path: Place) -> None:
        source = pa.memory_map(str(path)) if is_local(path) else pa.BufferReader(path.read_bytes())
        magic = source.read(6)
        source.seek(0)
        if magic == b"ARROW1":
            file = pa.ipc.open_file(source)
            self._read: Callable[[int], pa.RecordBatch] = file.get_batch
            self.schema, self.groups = file.schema, file.num_record_batches
            return
        size = source.size()
        source.seek(max(0, size - 8))
        if source.read(8) != _STREAM_END:
            raise pa.ArrowInvalid("it lacks the mark at its end")
        source.seek(0)
        stream = pa.ipc.open_stream(source)
        self.schema, batches = stream.schema, list(stream)  # views of the mapped file
        self._read, self.groups = batches.__getitem__, len(batches)

    def size(self, group: int, columns: Sequence[str]) -> tuple[int, int]:
        batch = self._read(group)
        return batch.num_rows, sum(batch.column(name).nbytes for name in columns)

    def rows(self, group: int, columns: list[str]) -> Iterator[dict[str, Any]]:
        if not columns:
            yield from ({} for _ in range(self.size(group, ())[0]))
            return
        batch = self._read(group).select(columns)
        batch.validate(full=True)
        for start in range(0, batch.num_rows, 4096):
            yield from batch.slice(start, 4096).to_pylist()

    def column(self, group: int, name: str) -> Any:
        column = self._read(group).column(name)
        column.validate(full=True)
        return column

    def cells(self, group: int, name: str) -> Iterator[Any]:
        yield from (cell.as_py() for cell in self.column(group, name))


def storage_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column's values: without dictionaries, runs and extensions."""
    while True:
        if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            kind = kind.value_type
        elif isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        else:
            return kind


def hash_cell(value: Any) -> str:
    """A hash of the picture in a cell, or of the path that it holds instead; "" if it holds neither."""
    content = picture_in(value)
    if isinstance(content, str) and content:
        content = f"path\n{content}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) and content else ""


def picture_in(value: Any) -> Any:
    """The bytes or path in a cell; other values are returned unchanged."""
    if isinstance(value, dict):  # the struct of Hugging Face's image columns
        return value.get("bytes") or value.get("path")
    return value


class CellReader:
    """Reads pictures out of Parquet columns, piece by piece; only the row groups of one piece are in memory.

    Only the packing parent reads them, because Parquet is read by whole row groups.
    """

    def __init__(self, *, allow_outside: bool = False) -> None:
        self._allow_outside = allow_outside
        self._piece: int | None = None
        self._groups: dict[tuple[str, int], Any] = {}

    def read(self, cell: Cell, piece: int) -> bytes | str | BadPicture:
        """The picture in a cell, or the path of its file if this or another column holds paths; BadPicture if that
        leads out of the table's folder."""
        if piece != self._piece:
            self._piece, self._groups = piece, {}
        key = (cell.path, cell.row_group)
        if key not in self._groups:
            with open_table(parse_place(cell.path)) as table:
                self._groups[key] = table.column(cell.row_group, cell.column)
        value = picture_in(self._groups[key][cell.row].as_py())
        if isinstance(value, str) and value:
            try:
                folder = parse_place(cell.path).parent
                return resolve_path(folder, value, allow_outside=self._allow_outside)
            except Outside as error:
                return BadPicture("outside", str(error))
        return value or cell.otherwise or b""
