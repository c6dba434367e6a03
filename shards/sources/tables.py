"""Tables as sources: strict CSV reading, Parquet with clear errors, and pictures in Parquet columns."""

import csv
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.sources import Cell
from shards.storage import Place, open_seekable, parse_place
from uniemox_dist.core.errors import UserError

_FIELD_BYTES = 1 << 24
"""Largest cell of a CSV."""


def read_csv(
    path: Place, check_header: Callable[[list[str]], None]
) -> Iterator[tuple[int, int, dict[str, str]]]:
    """Yields (row number from 0, number of its last line, cells by column) of a UTF-8 CSV or TSV with a header.

    Reading is strict, because a misplaced quote swallows rows.

    Raises:
        UserError: for an empty file, a repeated column, a row longer or shorter than the header, unmatched quotes,
            or bytes that are not UTF-8; also what `check_header` raises.
    """
    csv.field_size_limit(_FIELD_BYTES)
    try:
        with path.open("r", encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            header = next(lines, [])
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
        raise UserError(f"SOURCE={path}: not a CSV in UTF-8 ({error.reason}); convert it") from None


def check_column_names(columns: list[str], path: Place) -> None:
    """Raises UserError if two columns have the same name, because one of them would be lost."""
    repeated = [name for name, count in Counter(columns).items() if count > 1]
    if repeated:
        raise UserError(
            f"SOURCE={path}: has {Counter(columns)[repeated[0]]} columns called {repeated[0]!r}; rename or remove "
            "all but one"
        )


@contextmanager
def convert_parquet_errors(where: str) -> Iterator[None]:
    """Turns errors of a damaged Parquet file, read inside, into one line that begins with `where`.

    Raises:
        UserError: for a file that is not Parquet, or not complete. Errors of the disk and network pass through.
    """
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError, OSError) as error:
        # pyarrow reports damage as ArrowInvalid, or as a plain OSError without a number.
        if isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError):
            raise
        raise UserError(
            f"{where}: not a readable table: {' '.join(str(error).split())}; copy it again or remove it"
        ) from None


class CellReader:
    """Reads pictures out of Parquet columns, piece by piece; only the row groups of one piece are in memory.

    Only the packing parent reads them, because Parquet is read by whole row groups.
    """

    def __init__(self) -> None:
        self._piece: int | None = None
        self._groups: dict[tuple[str, int], Any] = {}

    def read(self, cell: Cell, piece: int) -> bytes | str:
        """The picture in a cell, or the path of its file if the column holds paths."""
        if piece != self._piece:
            self._piece, self._groups = piece, {}
        key = (cell.path, cell.row_group)
        if key not in self._groups:
            with (
                convert_parquet_errors(f"SOURCE={cell.path}"),
                open_seekable(parse_place(cell.path)) as raw,
                pq.ParquetFile(raw) as file,
            ):
                self._groups[key] = file.read_row_group(cell.row_group, [cell.column], use_threads=False)[
                    cell.column
                ]
        value = self._groups[key][cell.row].as_py()
        if isinstance(value, dict):  # the struct of Hugging Face's image columns
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and value:
            return value if "://" in value else str(parse_place(cell.path).parent / value)
        return value or b""
