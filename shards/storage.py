"""Where files lie: local paths, or anything fsspec knows (s3://, gs://, http(s)://), behind pathlib's words.

Reading only: shards are written to local or network file systems.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from upath import UPath

from uniemox_dist.runtime.errors import UserError

Place = Path
"""A local path, or a remote one (UPath): both have `/`, `name`, `open`, `read_bytes`, `is_file`, `is_dir`, `glob`,
and that is all that is asked of a place. UPath is no Path by inheritance; `is_local` tells them apart."""

# fsspec's protocol -> the package that speaks it.
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
}


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path names something that is not in the local file tree."""
    return "://" in str(path) and not str(path).startswith(("file://", "local://"))


def is_local(where: Place) -> bool:
    """Whether a place is a path of the local file tree, and so has a file descriptor."""
    return isinstance(where, Path)


def place(path: str | Place, field: str = "path") -> Place:
    """The place that a path or URL names.

    Raises:
        UserError: if the URL's protocol is unknown, or its package is not installed.
    """
    if not isinstance(path, str):
        return path
    if not is_remote(path):
        return Path(path.removeprefix("file://").removeprefix("local://"))
    protocol = path.partition("://")[0]
    try:
        found = UPath(path)
        found.fs  # noqa: B018 (opens the file system, which imports its package)
        return cast(Place, found)
    except ImportError:
        package = _PACKAGES.get(protocol, protocol)
        raise UserError(
            f"{field}={path}: {protocol}:// needs {package}; install it with: pip install {package}"
        ) from None
    except ValueError as error:
        raise UserError(f"{field}={path}: {error}; valid are s3://, gs://, http(s)://, file://") from None


def read_range(where: Place, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`; fewer at the end of the file."""
    if is_local(where):
        with open(where, "rb") as file:
            return os.pread(file.fileno(), length, offset)
    remote = cast(Any, where)
    data: bytes = remote.fs.cat_file(remote.path, start=offset, end=offset + length)
    return data


def find_files(where: Place) -> list[str]:
    """Every file below a remote folder, relative to it."""
    remote = cast(Any, where)
    prefix = remote.path.rstrip("/") + "/"
    return [path.removeprefix(prefix) for path in remote.fs.find(remote.path)]


def size_of(where: Place) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        return int(where.stat().st_size) if where.is_file() else None
    except FileNotFoundError:
        return None
