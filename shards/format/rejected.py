"""What `rejected.parquet` beside some data sets lists: every record that was refused, and why."""

from shards.format.parquet import THREADS, open_parquet
from shards.pack.pipeline import REJECTED
from shards.storage import Place
from uniemox_dist.core.errors import UserError

NAME = "rejected.parquet"


def read_rejected(folder: Place) -> list[dict[str, str]] | None:
    """The rows of a folder's rejected.parquet; None where there is none.

    Raises:
        UserError: if it cannot be read, or is no such list.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    with open_parquet(path, REJECTED, what="list of refused records", fix="copy it again") as file:
        table = file.read(columns=REJECTED.names, use_threads=THREADS)
        table.validate(full=True)
    if any(column.null_count for column in table.columns):
        raise UserError(f"{path}: the list of refused records has an empty field; copy it again")
    rows: list[dict[str, str]] = table.to_pylist()
    return rows
