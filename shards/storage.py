"""Local and remote paths behind pathlib's interface; remote ones are read with fsspec (s3://, gs://, http(s)://).

`remote_folder.py` writes to remote places.
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from glob import has_magic
from pathlib import Path
from typing import Any, BinaryIO, cast

from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import hide_secrets, is_remote
from uniemox_dist.core.formatting import cut

log = logging.getLogger("uniemox")

Place = Path
"""A local path, or a remote one (UPath). Both have `/`, `name`, `open`, `read_bytes`, `is_file`, `is_dir` and `glob`;
use nothing else. UPath does not inherit from Path; `is_local` distinguishes them."""

_SECRETS = re.compile(r"[\w+%=-]{40,}")
"""Long words in a store's error text, such as signatures and tokens."""
# fsspec's protocol -> the package that implements it.
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "adl": "adlfs",
    "oss": "ossfs",
    "oci": "ocifs",
    "tos": "tosfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "smb": "smbprotocol",
    "hf": "huggingface_hub",
    "hdfs": "pyarrow",
}


def is_local(where: Place) -> bool:
    """Whether a place is in the local file tree, so that it has a file descriptor."""
    return isinstance(where, Path)


def parse_place(path: str | Place, field: str = "path") -> Place:
    """Converts a path or URL to a place; `field` is its name in error lines.

    Raises:
        UserError: if the URL's protocol is unknown, or its package is not installed.
    """
    if not isinstance(path, str):
        return path
    if not is_remote(path):
        return Path(path.removeprefix("file://").removeprefix("local://"))
    protocol, _, rest = path.partition("://")
    if protocol in ("s3", "s3a", "gs", "gcs") and "@" in rest.partition("/")[0]:
        raise UserError(
            f"{field}={hide_secrets(path)}: keys are not part of such a URL; set them in the environment, such as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    from upath import UPath  # imported here, because local packing does not need it

    try:
        found = UPath(path)
        found.fs  # noqa: B018 (imports the file system's package)
        return cast(Place, found)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        fix = (
            f"needs {package}; install it with: pip install {package}"
            if package
            else f"needs a package ({error})"
        )
        raise UserError(f"{field}={hide_secrets(path)}: {protocol}:// {fix}") from None
    except ValueError as error:
        is_known = protocol in _PACKAGES
        fix = (
            "set the store's credentials"
            if is_known
            else "valid are s3://, gs://, az://, http(s)://, file://"
        )
        raise UserError(f"{field}={hide_secrets(path)}: {str(error).rstrip('!')}; {fix}") from None


def read_range(where: Place, offset: int, length: int) -> bytes:
    """Reads `length` bytes from `offset`; fewer at the end of the file."""
    if is_local(where):
        with open(where, "rb") as file:
            return os.pread(file.fileno(), length, offset)
    if _has_ranges(where):
        remote = cast(Any, where)
        data: bytes = remote.fs.cat_file(remote.path, start=offset, end=offset + length)
        return data
    _warn_of_whole_reads(str(where).split("/", 3)[2])
    return _whole(str(where))[offset : offset + length]


def open_seekable(where: Place) -> BinaryIO:
    """Opens a seekable file. A remote file is read by ranges if the server supports them, otherwise whole."""
    if is_local(where) or _has_ranges(where):
        return cast(BinaryIO, where.open("rb"))
    return io.BytesIO(_whole(str(where)))


def _has_ranges(where: Place) -> bool:
    """Whether a server sends ranges of files. Every object store does; a plain HTTP server may not."""
    remote = cast(Any, where)
    if not _is_http(where):
        return True
    server = str(where).split("/", 3)[2]
    if server not in _RANGES:
        _RANGES[server] = len(remote.fs.cat_file(remote.path, start=0, end=1)) <= 1
    return _RANGES[server]


_RANGES: dict[str, bool] = {}


def _is_http(where: Place) -> bool:
    return cast(Any, where).protocol in ("http", "https")


@lru_cache  # once for each server
def _warn_of_whole_reads(server: str) -> None:
    log.warning(
        "%s: the server sends no byte ranges, so each read of a sample transfers a whole file; copy the files, or use "
        "a server with ranges",
        server.rpartition("@")[2],
    )


@lru_cache(maxsize=2)  # readers walk few files at a time
def _whole(url: str) -> bytes:
    return bytes(parse_place(url).read_bytes())


def match_pattern(pattern: str, field: str = "path") -> list[Place] | None:
    """The places that match a pattern with `*`, `?` or `[…]`, sorted; None for a path that is not a pattern."""
    parts = pattern.split("/")
    first = next((i for i, part in enumerate(parts) if has_magic(part)), None)
    if first is None:
        return None
    base = "/".join(parts[:first]) or ("/" if pattern.startswith("/") else ".")
    return sorted(parse_place(base, field).glob("/".join(parts[first:])), key=str)


def find_files(where: Place) -> list[str]:
    """Lists every file below a folder, relative to it. In a local one it follows links, except into a folder that
    contains the link."""
    if is_local(where):
        return list(_walk(where))
    remote = cast(Any, where)
    prefix = remote.path.rstrip("/") + "/"
    return [path.removeprefix(prefix) for path in remote.fs.find(remote.path)]


def list_folders(where: Place) -> list[Place]:
    """The folders in a folder, sorted by name. A store is asked once, not for each entry."""
    if is_local(where):
        with os.scandir(where) as entries:
            return [where / name for name in sorted(entry.name for entry in entries if entry.is_dir())]
    remote = cast(Any, where)
    found = (
        entry["name"].rstrip("/")
        for entry in remote.fs.ls(remote.path, detail=True)
        if entry["type"] == "directory"
    )
    return [where / name.rpartition("/")[2] for name in sorted(found)]


def _walk(root: Path) -> Iterator[str]:
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        relative, above = pending.pop()
        status = os.stat(root / relative)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            continue
        with os.scandir(root / relative) as entries:
            for entry in entries:
                path = f"{relative}{entry.name}"
                try:
                    is_folder = entry.is_dir()
                except OSError:  # a link to itself; treated as a file
                    is_folder = False
                if is_folder:
                    pending.append((f"{path}/", above | {identity}))
                else:
                    yield path


def file_size(where: Place) -> int | None:
    """Size of a file in bytes; None if there is no such file."""
    try:
        if is_local(where):
            return where.stat().st_size if where.is_file() else None
        remote = cast(Any, where)
        # Not is_file(), which requests the whole file from a web server.
        info = remote.fs.info(remote.path)
        return int(info["size"]) if info["type"] == "file" and info["size"] is not None else None
    except FileNotFoundError as error:
        # fsspec raises this for every failed HTTP request; only some mean that the file is missing.
        cause = error.__cause__
        status = getattr(cause, "status", None)
        if status is None and isinstance(cause, Exception) and _is_http(where) and is_storage_error(cause):
            raise OSError(f"{hide_secrets(where)}: no answer ({describe_error(cause)})") from None
        if status not in (None, 404, 410):
            raise OSError(f"{hide_secrets(where)}: the server answers {status}") from None
        return None


def file_sizes(folder: Place, names: Sequence[str]) -> list[int | None]:
    """Sizes of several files of one folder in bytes; None for a missing file.

    An object store lists its folder; a web server gets one request per file, many at a time.
    """
    if is_local(folder):
        return [file_size(folder / name) for name in names]
    remote = cast(Any, folder)
    if remote.protocol not in ("http", "https") and len(names) > 4:
        listed = {
            entry["name"].rpartition("/")[2]: entry["size"]
            for entry in remote.fs.ls(remote.path, detail=True)
        }
        return [listed.get(name) for name in names]
    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(lambda name: file_size(folder / name), names))


# ---- errors


def is_bucket_missing(error: FileNotFoundError) -> bool:
    """Whether a store lacks the bucket rather than the file."""
    response = getattr(error.__cause__, "response", None) or {}
    return (
        "bucket does not exist" in str(error).lower()
        or response.get("Error", {}).get("Code") == "NoSuchBucket"
    )


def has_bucket(where: Place) -> bool:
    """False if the store of a remote place has no bucket of its name."""
    if is_local(where):
        return True
    remote = cast(Any, where)
    try:
        remote.fs.ls(remote.path)
    except FileNotFoundError as error:
        return not is_bucket_missing(error)
    return True


def is_storage_error(error: Exception) -> bool:
    """Whether an error comes from storage or network rather than from this program."""
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError | TimeoutError) or module in (
        "botocore",
        "aiohttp",
        "aiobotocore",
        "gcsfs",
        "urllib3",
        "azure",
        "google",
        "requests",
        "paramiko",
        "ftplib",
        "smbprotocol",
        "huggingface_hub",
    )


def describe_error(error: Exception) -> str:
    """The first line of an error's text, without addresses' queries and long words that may be keys."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = text.splitlines() or [type(error).__name__]
    return _SECRETS.sub("…", cut(hide_secrets(lines[0]).rstrip("."), 160))
