"""Pictures out of the columns of Parquet files. Only the packing parent reads them, since row groups come whole."""

from typing import Any

import pyarrow.parquet as pq

from shards.sources import Cell
from shards.storage import open_seekable, place


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
            with open_seekable(place(cell.path)) as raw, pq.ParquetFile(raw) as file:
                self._groups[key] = file.read_row_group(cell.row_group, [cell.column])[cell.column]
        value = self._groups[key][cell.row].as_py()
        if isinstance(value, dict):  # the struct of Hugging Face's image columns
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and value:
            return value if "://" in value else str(place(cell.path).parent / value)
        return value or b""
