"""The index of one tar: a Parquet file with one row per sample, in tar order.

It describes a shard completely, so that no reader has to scan the tar: a picture is one positioned read.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.format.entries import ShardEntry
from shards.format.parquet import THREADS, open_parquet
from shards.storage import Place, file_size
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import atomic_path, canonical_json, hide_secrets, sha256_bytes

_PERSON = pa.struct(
    [
        ("box", pa.list_(pa.float64(), 4)),  # x1, y1, x2, y2 as fractions of width and height
        ("score", pa.float64()),
        ("labels", pa.string()),  # JSON: that person's own labels
    ]
)
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("sample_offset", pa.int64()),  # first byte of the sample's first tar header
        ("sample_length", pa.int64()),  # up to the next sample's first header
        ("image_offset", pa.int64()),  # first byte of the encoded picture
        ("image_length", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("label", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("persons", pa.list_(_PERSON)),
        ("image_sha256", pa.string()),
    ]
)
OPTIONAL = pa.schema(
    [
        ("label_distribution", pa.string()),  # JSON: labels and their shares
        ("valence", pa.float64()),  # the picture's attributes of these names, if they are numbers
        ("arousal", pa.float64()),
        ("dominance", pa.float64()),
    ]
)
"""Columns that only the indexes of shards have in which a sample has such a value."""
ROW_GROUP = 1024
"""Rows that a reader loads at a time, so that it never holds the whole index of a large shard."""
REFUSED = pa.field("refused", pa.string())
"""Optional column: the reason why a sample of the tar does not belong to the data set. `shards pack` never writes it;
`shards merge` marks samples that several parts packed."""


def index_path(folder: Place, shard: str) -> Place:
    """The index beside shard `000012.tar`: index/000012.parquet."""
    return folder / "index" / f"{shard.removesuffix('.tar')}.parquet"


def rows_sha256(rows: Sequence[dict[str, Any]]) -> str:
    """The hash of the rows of an index, independent of the Parquet version that wrote it. Missing values of optional
    columns do not count."""
    return sha256_bytes(canonical_json([_without_missing(row) for row in rows]))


def _without_missing(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if v is not None or (k != REFUSED.name and k not in OPTIONAL.names)}


def write_index(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes an index atomically; rows may have the keys `refused` and those of `OPTIONAL`."""
    schema = SCHEMA
    for field in (*OPTIONAL, REFUSED):
        if any(row.get(field.name) is not None for row in rows):
            schema = schema.append(field)
    table = pa.Table.from_pylist(list(rows), schema=schema)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=ROW_GROUP)


def read_index(path: Place, columns: list[str] | None = None, *, sha256: str | None = None) -> pa.Table:
    """Reads an index, whole or some of its columns, without the rows marked as refused. Optional columns that it does
    not have are null if `columns` names them, and otherwise left out.

    Raises:
        UserError: if the file is missing or damaged, does not have the hash `sha256` (if given), or lacks a column of
            the format or holds an illegal value there.
    """
    table = read_all_rows(path, columns, sha256=sha256)
    if REFUSED.name not in table.column_names:
        return table
    return table.filter(pc.is_null(table[REFUSED.name])).drop_columns(REFUSED.name)


def read_all_rows(path: Place, columns: list[str] | None = None, *, sha256: str | None = None) -> pa.Table:
    """Like `read_index`, including refused rows, and the column `refused` if the file has it."""
    with _opened(path, columns, sha256) as file:
        names = _names_in(file, columns) + ([REFUSED.name] if _has_refused(file) else [])
        return _checked(path, file.read(columns=names, use_threads=THREADS), columns)


def read_group_ends(path: Place, *, sha256: str | None = None) -> list[int]:
    """The row numbers at which the row groups of an index end; `read_group` reads one group.

    With `sha256` the whole file is read once and must have that hash.

    Raises:
        UserError: as `read_index`.
    """
    with _opened(path, None, sha256) as file:
        if not _has_refused(file):
            lengths = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            return list(accumulate(lengths)) or [0]
    return [
        read_index(path, ["key"]).num_rows
    ]  # rows are numbered without refused ones, so they form one group


def read_group(path: Place, number: int, columns: list[str]) -> pa.Table:
    """One row group of an index.

    Raises:
        UserError: as `read_index`.
    """
    with _opened(path, columns) as file:
        if not _has_refused(file):
            names = _names_in(file, columns)
            return _checked(path, file.read_row_group(number, columns=names, use_threads=THREADS), columns)
    return read_index(path, columns)


def _opened(
    path: Place, columns: list[str] | None, sha256: str | None = None
) -> AbstractContextManager[pq.ParquetFile]:
    fix = "copy index/ together with the tars"
    required = [name for name in columns or () if name in SCHEMA.names] or None
    return open_parquet(path, SCHEMA, what="index", fix=fix, columns=required, sha256=sha256)


def _names_in(file: pq.ParquetFile, columns: list[str] | None) -> list[str]:
    """The columns that are read: those asked for, except optional ones that the file lacks; all of them for None."""
    have = file.schema_arrow.names
    return [
        name for name in columns or [*SCHEMA.names, *OPTIONAL.names] if name in SCHEMA.names or name in have
    ]


def _has_refused(file: pq.ParquetFile) -> bool:
    return REFUSED.name in file.schema_arrow.names


def _checked(path: Place, table: pa.Table, columns: list[str] | None) -> pa.Table:
    """Returns the table if all of its values are legal, with those of `columns` that it lacks as nulls."""
    table.validate(full=True)  # finds texts that are not UTF-8 here instead of at first use
    wrong = next((name for name in table.column_names if not _is_sound(name, table[name])), None)
    if wrong is not None:
        raise UserError(
            f"{hide_secrets(path)}: column {wrong} of the index holds an illegal value; copy index/ again, or check "
            "it with `uniemox shards verify`"
        )
    for name in columns or ():
        if name not in table.column_names:
            table = table.append_column(
                OPTIONAL.field(name), pa.nulls(table.num_rows, OPTIONAL.field(name).type)
            )
    return table


def _is_sound(name: str, column: pa.ChunkedArray) -> bool:
    if name in OPTIONAL.names:
        if column.type != OPTIONAL.field(name).type:
            return False
        return not pa.types.is_floating(column.type) or pc.all(pc.is_finite(column)).as_py() is not False
    if name in ("label", REFUSED.name):
        return True
    if name == "captions":
        return int(pc.list_flatten(column).null_count) == 0
    if name == "persons":
        people = pc.list_flatten(column)
        scores, boxes = (pc.struct_field(people, field) for field in ("score", "box"))
        sides = pc.list_flatten(boxes)
        if people.null_count or scores.null_count or boxes.null_count or sides.null_count:
            return False
        box_P4 = sides.to_numpy().reshape(-1, 4)
        is_inside = (box_P4 >= 0) & (box_P4 <= 1)
        is_ordered = box_P4[:, :2] <= box_P4[:, 2:]
        return bool(is_inside.all() and is_ordered.all() and np.isfinite(scores.to_numpy()).all())
    if column.null_count:
        return False
    return not pa.types.is_integer(column.type) or len(column) == 0 or pc.min(column).as_py() >= 0


def to_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of `read_all_rows`, as `write_index` and `rows_sha256` expect them."""
    return [_without_missing(row) for row in table.to_pylist()]


# ---- the index and tar of a shard, checked against the manifest


def read_shard_rows(folder: Place, entry: ShardEntry, columns: list[str] | None = None) -> pa.Table:
    """The rows of a shard's index, or some columns of them.

    Raises:
        UserError: if the index does not match the manifest.
    """
    table = read_index(index_path(folder, entry.name), columns, sha256=entry.index_sha256)
    _check_count(folder, entry, table.num_rows)
    return table


def read_all_shard_rows(folder: Place, entry: ShardEntry) -> pa.Table:
    """Like `read_shard_rows`, including refused rows, and the column `refused` if the file has it."""
    table = read_all_rows(index_path(folder, entry.name), sha256=entry.index_sha256)
    is_marked = REFUSED.name in table.column_names
    live = table[REFUSED.name].null_count if is_marked else table.num_rows
    _check_count(folder, entry, live)
    return table


def check_tar(folder: Place, entry: ShardEntry, field: str) -> None:
    """Checks that a tar exists and has the size in the manifest; `field` is the folder's name in error messages.

    Raises:
        UserError: if it does not.
    """
    size = file_size(folder / entry.name)
    if size != entry.bytes:
        state = "is missing" if size is None else f"has {size} bytes instead of {entry.bytes}"
        raise UserError(
            f"{field}={hide_secrets(folder)}: {entry.name} {state}; copy it again, or remove bad shards with "
            f"`uniemox shards verify --quarantine`"
        )


def _check_count(folder: Place, entry: ShardEntry, rows: int) -> None:
    if rows != entry.samples:
        raise UserError(
            f"{index_path(folder, entry.name)}: the index has {rows} samples, but the manifest states {entry.samples}; "
            f"copy index/ again"
        )
