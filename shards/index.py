"""The index of one tar: a Parquet file with one row per sample, in tar order.

It answers every question about a shard without opening the tar, and lets a reader fetch one picture by
one positioned read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.storage import Place, open_seekable
from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.files import atomic_path, canonical_json, sha256_bytes

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
        pq.write_table(table, temporary, compression="zstd")


def read_index(path: Place, columns: list[str] | None = None) -> pa.Table:
    """Reads an index, whole or some of its columns, without the rows that are marked as refused.

    Raises:
        UserError: if the file is missing, is not Parquet, or lacks a column of the format.
    """
    table = read_all_rows(path, columns)
    if "refused" not in table.column_names:
        return table
    return table.filter(pc.is_null(table["refused"])).drop_columns("refused")


def read_all_rows(path: Place, columns: list[str] | None = None) -> pa.Table:
    """`read_index` with refused rows, and the column `refused` where the file has it."""
    try:
        # ParquetFile rather than read_table: the latter takes `k=v` folder names for columns.
        with open_seekable(path) as raw, pq.ParquetFile(raw) as file:
            present = file.schema_arrow.names
            missing = sorted(set(columns or SCHEMA.names) - set(present))
            if missing:
                raise UserError(f"{path}: the index lacks the columns {', '.join(missing)}; pack again")
            marks = ["refused"] if "refused" in present else []
            return file.read(columns=[*(columns or SCHEMA.names), *marks])
    except FileNotFoundError:
        raise UserError(f"{path}: the index is missing; copy index/ together with the tars") from None
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{path}: not a readable index ({str(error).splitlines()[0]}); copy it again"
        ) from None


def to_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of `read_all_rows`, as `write_index` and `rows_sha256` take them."""
    rows = table.to_pylist()
    return [{k: v for k, v in row.items() if k != "refused" or v is not None} for row in rows]
