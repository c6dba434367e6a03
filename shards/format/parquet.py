"""Opens Parquet files of the format, with one clear error line for each way in which a file can be wrong."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from shards.storage import Place, open_seekable
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import format_os_error, hide_secrets, sha256_bytes

THREADS = False
"""Do not read with Arrow's own threads: a thread that still holds our file object when Python exits aborts the process
(once in sixty short commands), and files of this size do not need threads."""
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
    """Opens a file that has the columns of a schema (or `columns` of it), and converts errors while it is read.

    `what` is the file's name in error messages, `fix` the advice. With `sha256` the file must have that hash.

    Raises:
        UserError: if it is missing, damaged or another file, or lacks a column or has one of another type.
        OSError: if the storage fails; a later try may succeed.
    """
    where = hide_secrets(path)
    try:
        # Not read_table, which reads `k=v` in folder names as columns.
        with _raw(path, what, sha256) as raw, pq.ParquetFile(raw) as file:
            found = file.schema_arrow
            names = list(columns or schema.names)
            if missing := sorted(set(names) - set(found.names)):
                raise UserError(f"{where}: the {what} lacks the columns {', '.join(missing)}; pack again")
            for name in names:
                if (given := found.field(name).type) != schema.field(name).type:
                    raise UserError(
                        f"{where}: column {name} of the {what} is {given}, not {schema.field(name).type}; pack again"
                    )
            yield file
    except FileNotFoundError:
        raise UserError(f"{where}: the {what} is missing; {fix}") from None
    except _CLOSED as error:
        raise UserError(f"{where}: the {what} cannot be read ({format_os_error(error)}); {fix}") from None
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:  # column names may be damaged too
        # Arrow also raises OSError for a damaged file, but without a number; a file system's error has one.
        if isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError):
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where}: not a readable {what} ({first}); copy it again") from None


@contextmanager
def _raw(path: Place, what: str, sha256: str | None) -> Iterator[BinaryIO]:
    with open_seekable(path) as file:
        if sha256 is None:
            yield file
            return
        data = file.read()  # once, for the hash and the content
        if sha256_bytes(data) != sha256:
            raise UserError(
                f"{hide_secrets(path)}: the {what} is not the one that was written (SHA-256); copy it again, or check "
                "it with `uniemox shards verify`"
            )
        yield io.BytesIO(data)
