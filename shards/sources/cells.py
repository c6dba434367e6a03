"""Pictures out of the columns of Parquet files. Only the packing parent reads them, since row groups come whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.sources import Cell
from shards.storage import open_seekable, place
from uniemox_dist.core.errors import UserError


@contextmanager
def whole_parquet(where: str) -> Iterator[None]:
    """Around everything that reads a Parquet file: damage becomes one line that begins with `where`.

    Raises:
        UserError: for a file that is no Parquet, or not whole. Errors of the disk and network pass.
    """
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError, OSError) as error:
        # pyarrow has no type for damage: half of it is ArrowInvalid, half an OSError, which then has no number.
        if isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError):
            raise
        raise UserError(
            f"{where}: not a readable table: {' '.join(str(error).split())}; copy it again or take it away"
        ) from None


class CellReader:
    """Pictures out of Parquet columns, by pieces: the row groups of one piece are in memory, no others."""

    def __init__(self) -> None:
        self._piece: int | None = None
        self._groups: dict[tuple[str, int], Any] = {}

    def read(self, cell: Cell, piece: int) -> bytes | str:
        """The picture of a cell, or the path of its file where the column holds that."""
        if piece != self._piece:
            self._piece, self._groups = piece, {}
        key = (cell.path, cell.row_group)
        if key not in self._groups:
            with (
                whole_parquet(f"SOURCE={cell.path}"),
                open_seekable(place(cell.path)) as raw,
                pq.ParquetFile(raw) as file,
            ):
                self._groups[key] = file.read_row_group(cell.row_group, [cell.column], use_threads=False)[
                    cell.column
                ]
        value = self._groups[key][cell.row].as_py()
        if isinstance(value, dict):  # the struct of Hugging Face's image columns
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and value:
            return value if "://" in value else str(place(cell.path).parent / value)
        return value or b""
