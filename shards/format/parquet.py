"""Parquet files of our own, opened so that whatever is wrong with one is a line that names it."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from shards.storage import Place, open_seekable
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import sha256_bytes
from uniemox_dist.core.os_errors import said

THREADS = False
"""Arrow's own while it reads: one that still holds our file object when Python ends would abort the process, which a
short command meets one time in sixty; and files of this size need none."""
_CLOSED = (PermissionError, IsADirectoryError, NotADirectoryError)


@contextmanager
def open_parquet(
    path: Place,
    schema: pa.Schema,
    *,
    what: str,
    fix: str,
    columns: Sequence[str] | None = None,
    sha256: str | None = None,
) -> Iterator[pq.ParquetFile]:
    """A file with the columns of a schema (or some of them), and its errors while it is read.

    `what` is what error lines call it, `fix` where to get it again. With `sha256` it has to have that hash.

    Raises:
        UserError: if it is missing or damaged, is another file, or lacks a column or has one of another type.
        OSError: if the storage fails, which may pass.
    """
    try:
        # ParquetFile rather than read_table: the latter takes `k=v` folder names for columns.
        with _raw(path, what, sha256) as raw, pq.ParquetFile(raw) as file:
            found = file.schema_arrow
            names = list(columns or schema.names)
            if missing := sorted(set(names) - set(found.names)):
                raise UserError(f"{path}: the {what} lacks the columns {', '.join(missing)}; pack again")
            for name in names:
                if (given := found.field(name).type) != schema.field(name).type:
                    raise UserError(
                        f"{path}: column {name} of the {what} is {given}, not {schema.field(name).type}; pack again"
                    )
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: the {what} is missing; {fix}") from None
    except _CLOSED as error:
        raise UserError(f"{path}: the {what} cannot be read ({said(error)}); {fix}") from None
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:  # names of columns may be damaged, too
        # Arrow says OSError, too, where a file is damaged, but without a number; what a file system says has one.
        if isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError):
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a readable {what} ({first}); copy it again") from None


@contextmanager
def _raw(path: Place, what: str, sha256: str | None) -> Iterator[BinaryIO]:
    with open_seekable(path) as file:
        if sha256 is None:
            yield file
            return
        data = file.read()  # once, for the hash and the content
        if sha256_bytes(data) != sha256:
            raise UserError(
                f"{path}: the {what} is not the one that was written (SHA-256); copy it again, or look with "
                f"`uniemox shards verify`"
            )
        yield io.BytesIO(data)
