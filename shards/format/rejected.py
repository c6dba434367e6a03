"""The list of refused records, `rejected.parquet`, beside a data set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.format.parquet import THREADS, open_parquet
from shards.storage import Place
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import atomic_path

REJECTED = "rejected.parquet"
_SCHEMA = pa.schema([("source", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


def write_rejected(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rejected.parquet atomically; rows have the keys `source`, `reason` and `detail`."""
    with atomic_path(folder / REJECTED) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=_SCHEMA), temporary)


def read_rejected(folder: Place) -> list[dict[str, str]] | None:
    """The rows of a folder's rejected.parquet; None if there is no such file.

    Raises:
        UserError: if it cannot be read, or is not such a list.
    """
    path = folder / REJECTED
    if not path.is_file():
        return None
    with open_parquet(path, _SCHEMA, what="list of refused records", fix="copy it again") as file:
        table = file.read(columns=_SCHEMA.names, use_threads=THREADS)
        table.validate(full=True)
    if any(column.null_count for column in table.columns):
        raise UserError(f"{path}: the list of refused records has an empty field; copy it again")
    rows: list[dict[str, str]] = table.to_pylist()
    return rows
