"""The index of one tar: a Parquet file with one row per sample, in tar order.

It answers every question about a shard without opening the tar, and lets a reader fetch one picture by
one positioned read.
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

from shards.format.parquet import THREADS, open_parquet
from shards.storage import Place
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import atomic_path, canonical_json, sha256_bytes

_PERSON = pa.struct(
    [
        ("box", pa.list_(pa.float64(), 4)),  # x1, y1, x2, y2 as shares of width and height
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
ROW_GROUP = 1024
"""Rows that a reader takes up at a time: of a large shard it then holds what it walks through, not all."""
REFUSED = pa.field("refused", pa.string())
"""Only in an index with rows that are no part of the data set though the tar has them: the reason. No row of a
pack has one; joining parts marks what several of them packed."""


def index_path(folder: Place, shard: str) -> Place:
    """The index beside shard `000012.tar`: index/000012.parquet."""
    return folder / "index" / f"{shard.removesuffix('.tar')}.parquet"


def rows_sha256(rows: Sequence[dict[str, Any]]) -> str:
    """The hash of what an index says, whatever Parquet version wrote it."""
    return sha256_bytes(canonical_json(list(rows)))


def write_index(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes an index atomically; rows may have the key `refused`."""
    schema = SCHEMA.append(REFUSED) if any("refused" in row for row in rows) else SCHEMA
    table = pa.Table.from_pylist(list(rows), schema=schema)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=ROW_GROUP)


def read_index(path: Place, columns: list[str] | None = None, *, sha256: str | None = None) -> pa.Table:
    """Reads an index, whole or some of its columns, without the rows that are marked as refused.

    Raises:
        UserError: if the file is missing or damaged, does not have the hash `sha256` where that is given, lacks a
            column of the format, or has values there that no index has.
    """
    table = read_all_rows(path, columns, sha256=sha256)
    if REFUSED.name not in table.column_names:
        return table
    return table.filter(pc.is_null(table[REFUSED.name])).drop_columns(REFUSED.name)


def read_all_rows(path: Place, columns: list[str] | None = None, *, sha256: str | None = None) -> pa.Table:
    """`read_index` with refused rows, and the column `refused` where the file has it."""
    with _opened(path, columns, sha256) as file:
        marks = [REFUSED.name] if _has_refused(file) else []
        return _checked(path, file.read(columns=[*(columns or SCHEMA.names), *marks], use_threads=THREADS))


def group_ends(path: Place, *, sha256: str | None = None) -> list[int]:
    """Where the row groups of an index end, as numbers of rows: what `read_group` reads at a time.

    With `sha256` the whole file is read once, and has to have that hash.

    Raises:
        UserError: as `read_index` does.
    """
    with _opened(path, None, sha256) as file:
        if not _has_refused(file):
            lengths = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            return list(accumulate(lengths)) or [0]
    return [read_index(path, ["key"]).num_rows]  # rows are numbered without refused ones: one group


def read_group(path: Place, number: int, columns: list[str]) -> pa.Table:
    """One row group of an index.

    Raises:
        UserError: as `read_index` does.
    """
    with _opened(path, columns) as file:
        if not _has_refused(file):
            return _checked(path, file.read_row_group(number, columns=columns, use_threads=THREADS))
    return read_index(path, columns)


def _opened(
    path: Place, columns: list[str] | None, sha256: str | None = None
) -> AbstractContextManager[pq.ParquetFile]:
    fix = "copy index/ together with the tars"
    return open_parquet(path, SCHEMA, what="index", fix=fix, columns=columns, sha256=sha256)


def _has_refused(file: pq.ParquetFile) -> bool:
    return REFUSED.name in file.schema_arrow.names


def _checked(path: Place, table: pa.Table) -> pa.Table:
    """The table itself, if every value of it is one that readers may rely on."""
    table.validate(full=True)  # texts that are no UTF-8 would fail where they are looked at
    wrong = next((name for name in table.column_names if not _is_sound(name, table[name])), None)
    if wrong is not None:
        raise UserError(
            f"{path}: column {wrong} of the index has a value that no index has; copy index/ again, or look with "
            f"`uniemox shards verify`"
        )
    return table


def _is_sound(name: str, column: pa.ChunkedArray) -> bool:
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
    """The rows of `read_all_rows`, as `write_index` and `rows_sha256` take them."""
    rows = table.to_pylist()
    return [{k: v for k, v in row.items() if k != "refused" or v is not None} for row in rows]
