"""The index of one tar: a Parquet file with one row per sample, in tar order.

It answers every question about a shard without opening the tar, and lets a reader fetch one picture by
one positioned read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.format import Sample
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


@dataclass(frozen=True)
class Location:
    """Where a sample lies in its tar, bytes."""

    sample_offset: int
    sample_length: int
    image_offset: int
    image_length: int


def index_path(folder: Path, shard: str) -> Path:
    """The index beside shard `000012.tar`: index/000012.parquet."""
    return folder / "index" / f"{shard.removesuffix('.tar')}.parquet"


def index_row(sample: Sample, location: Location) -> dict[str, Any]:
    """The row of one sample."""
    persons = [
        {"box": list(p.box), "score": p.score, "labels": canonical_json(p.labels).decode()}
        for p in sample.persons
    ]
    return {
        "key": sample.key,
        **vars(location),
        "width": sample.width,
        "height": sample.height,
        "label": sample.label,
        "captions": list(sample.captions),
        "persons": persons,
        "image_sha256": sample.image_sha256,
    }


def rows_sha256(rows: Sequence[dict[str, Any]]) -> str:
    """The hash of what an index says, whatever Parquet version wrote it."""
    return sha256_bytes(canonical_json(list(rows)))


def write_index(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes an index atomically."""
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_index(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Reads an index, whole or some of its columns.

    Raises:
        UserError: if the file is missing, is not Parquet, or lacks a column of the format.
    """
    try:
        # ParquetFile rather than read_table: the latter takes `k=v` folder names for columns.
        with pq.ParquetFile(path) as file:
            missing = sorted(set(columns or SCHEMA.names) - set(file.schema_arrow.names))
            if missing:
                raise UserError(f"{path}: the index lacks the columns {', '.join(missing)}; pack again")
            return file.read(columns=columns or SCHEMA.names)
    except FileNotFoundError:
        raise UserError(f"{path}: the index is missing; copy index/ together with the tars") from None
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{path}: not a readable index ({str(error).splitlines()[0]}); copy it again"
        ) from None
