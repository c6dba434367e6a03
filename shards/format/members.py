"""The index of a tar with any members: a Parquet file with one row per sample, in tar order. FORMAT.md specifies it."""

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.format.index import ROW_GROUP
from shards.format.parquet import THREADS, open_parquet
from shards.storage import Place
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import atomic_path, hide_secrets

_MEMBER = pa.struct(
    [
        ("name", pa.string()),  # webdataset's extension, in lower case
        ("offset", pa.int64()),  # first byte of the content in the tar
        ("length", pa.int64()),
    ]
)
SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # webdataset's __key__
        ("members", pa.list_(_MEMBER)),  # in tar order
        ("sha256", pa.string()),  # of the sample, see `sample_sha256`
    ]
)
_RESERVED = pa.array(["__key__", "__url__"])
"""No names of members: webdataset's samples have other content there."""
_FIX = "copy the folder of the index again, or index the tars again"


def sample_sha256(members: Iterable[tuple[str, bytes]]) -> str:
    """The hash of a sample: over the name, a zero byte, the length as 8 bytes little-endian and the content of each of
    its members, in order."""
    digest = hashlib.sha256()
    for name, content in members:
        digest.update(name.encode() + b"\0" + len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def write_members(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the index of a tar atomically."""
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=ROW_GROUP)


def read_member_group_ends(path: Place, *, sha256: str | None = None) -> list[int]:
    """The row numbers at which the row groups of an index end; `read_member_group` reads one group.

    With `sha256` the whole file is read once and must have that hash.

    Raises:
        UserError: if the file is missing or damaged, is not such an index, or has another hash.
    """
    with _opened(path, sha256) as file:
        return list(accumulate(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))) or [
            0
        ]


def read_member_group(path: Place, number: int) -> pa.Table:
    """One row group of an index.

    Raises:
        UserError: as `read_member_group_ends`, or if it holds an illegal value.
    """
    with _opened(path) as file:
        table = file.read_row_group(number, columns=SCHEMA.names, use_threads=THREADS)
        table.validate(full=True)
    members = pc.list_flatten(table["members"])
    columns = [*table.columns, *(pc.struct_field(members, field.name) for field in _MEMBER)]
    names = pc.struct_field(members, "name")
    numbers = [column for column in columns if pa.types.is_integer(column.type) and len(column)]
    if (
        any(column.null_count for column in columns)
        or any(pc.min(n).as_py() < 0 for n in numbers)
        or pc.any(pc.is_in(names, _RESERVED)).as_py()
    ):
        raise UserError(f"{hide_secrets(path)}: the index holds an illegal value; {_FIX}")
    return table


def _opened(path: Place, sha256: str | None = None) -> AbstractContextManager[pq.ParquetFile]:
    return open_parquet(path, SCHEMA, what="index of members", fix=_FIX, sha256=sha256)
