"""The shards of a data set as its manifest states them: what does not fit is not used."""

import pyarrow as pa

from shards.format.index import REFUSED, index_path, read_all_rows, read_index
from shards.format.manifest import ShardEntry
from shards.storage import Place, size_of
from uniemox_dist.core.errors import UserError


def rows_of(folder: Place, entry: ShardEntry, columns: list[str] | None = None) -> pa.Table:
    """The rows of a shard's index, or some columns of them.

    Raises:
        UserError: if the index is not the one that the manifest states.
    """
    table = read_index(index_path(folder, entry.name), columns, sha256=entry.index_sha256)
    _check_count(folder, entry, table.num_rows)
    return table


def all_rows_of(folder: Place, entry: ShardEntry) -> pa.Table:
    """`rows_of` with refused rows, and the column `refused` where the file has it."""
    table = read_all_rows(index_path(folder, entry.name), sha256=entry.index_sha256)
    is_marked = REFUSED.name in table.column_names
    live = table[REFUSED.name].null_count if is_marked else table.num_rows
    _check_count(folder, entry, live)
    return table


def check_tar(folder: Place, entry: ShardEntry, field: str) -> None:
    """Looks whether a tar is there with the size that the manifest states; `field` is what error lines call the folder.

    Raises:
        UserError: if it is not.
    """
    size = size_of(folder / entry.name)
    if size != entry.bytes:
        state = "is missing" if size is None else f"has {size} bytes instead of {entry.bytes}"
        raise UserError(
            f"{field}={folder}: {entry.name} {state}; copy it again, or take bad shards out with "
            f"`uniemox shards verify --quarantine`"
        )


def _check_count(folder: Place, entry: ShardEntry, rows: int) -> None:
    if rows != entry.samples:
        raise UserError(
            f"{index_path(folder, entry.name)}: the index has {rows} samples, the manifest says {entry.samples}; copy "
            f"index/ again"
        )
