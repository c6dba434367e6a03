"""Files: atomic writes (a file is either whole or absent), hashes, canonical JSON, and errors that name the file and
the fix. Standard library only."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from uniemox_dist.core.errors import UserError

CHUNK_BYTES = 1 << 20
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str], content: bytearray | None = None) -> str:
    """Hex SHA-256 of a file, read in pieces; `content`, as long as the file, receives its bytes."""
    digest, done = hashlib.sha256(), 0
    into = memoryview(content if content is not None else bytearray(CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(into[done : done + CHUNK_BYTES]):
            digest.update(into[done : done + count])
            done += count if content is not None else 0
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value: sorted keys, no spaces, UTF-8. Hashes are taken over this form."""
    return _CANONICAL.encode(value).encode("utf-8")


def fsync_dir(path: str | os.PathLike[str]) -> None:
    """Flushes a folder to the disk, so that renames inside it survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary name beside `path`; on success that file is fsynced and renamed to `path`."""
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=final.parent, prefix=f".{final.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        share(temporary)
        os.replace(temporary, final)
        fsync_dir(final.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def share(path: str | os.PathLike[str]) -> None:
    """Gives a file the permissions of the user's other new files: mkstemp and safetensors create private files."""
    mask = os.umask(0o022)  # the mask cannot be read without setting it
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a whole file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a whole UTF-8 text file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file for people and programs: indented, keys in the given order, final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def publish_dir(temporary: str | os.PathLike[str], final: str | os.PathLike[str]) -> None:
    """Renames a finished folder to its name; `final` must not exist. All files must be fsynced before."""
    fsync_dir(temporary)
    os.rename(temporary, final)
    fsync_dir(Path(final).parent)


def remove_dir(path: str | os.PathLike[str]) -> None:
    """Deletes a folder. Renames it first, so that a reader finds either the whole folder or none."""
    doomed = Path(path).with_name(f".{Path(path).name}.deleted")
    if Path(path).is_symlink():  # the folder behind a link belongs to the user
        os.unlink(path)
        return
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def try_lock(path: Path) -> TextIO | None:
    """Opens and locks a file, which is created if missing. Returns None if another process has deleted or moved it
    meanwhile; then try again.

    Raises:
        BlockingIOError: if another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError), ExitStack() as opened:
        lock = opened.enter_context(open(path, "w"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
            opened.pop_all()
            return lock
    return None


def describe_missing_folder(path: Path) -> str:
    """The reason why a path is not a folder."""
    return "is a file" if path.is_file() else "no such folder"


_FLATTENED_URL = re.compile(r"(s3a?|gcs|gs|https?|hf|az|abfss?|hdfs|s?ftp|ssh):/")
"""The beginning of a URL as pathlib writes it, with one slash."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL outside the local file tree."""
    return "://" in str(path) and not str(path).startswith(("file://", "local://"))


def hide_secrets(path: str | os.PathLike[str]) -> str:
    """A path, a URL or a text with URLs for messages and logs: without users, passwords and queries, which may hold
    keys and signatures."""
    text = re.sub(r"(://)[^/?#\s]*@", r"\1…@", str(path))
    return re.sub(r"(://[^?]*)\?[^\s\"']*=[^\s\"']*", r"\1?…", text)


def require_local(path: str | os.PathLike[str], field: str) -> str:
    """Returns a path without file:// or local://; `field` is the argument, option or setting that names it.

    Raises:
        UserError: if it is a URL of another protocol. pathlib would make a local folder `s3:` of it.
    """
    if is_remote(path) or _FLATTENED_URL.match(str(path)):
        raise UserError(
            f"{field}={hide_secrets(path)}: is a URL, but this must be on a local or network file system; give a path"
        )
    return str(path).removeprefix("file://").removeprefix("local://")


def check_output(path: Path | None, option: str, suffix: str = "") -> None:
    """Checks that a file can be written, without creating it.

    Args:
        path: the file; None if the user requested none.
        option: the option that names it, such as `--json`.
        suffix: the required ending of its name.

    Raises:
        UserError: if it cannot be written, is a folder, or has another ending.
    """
    if path is None:
        return
    if suffix and path.suffix.lower() != suffix:
        raise UserError(
            f"{option}={path}: is written as {suffix[1:].upper()}; give a name that ends with {suffix}"
        )
    if path.is_dir():
        raise UserError(f"{option}={path}: is a folder; give a file")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(
            f"{option}={path}: cannot be written ({error.strerror}); give a file in a folder that can be written"
        ) from None


@contextmanager
def convert_write_errors(target: str, fix: str = "give another place") -> Iterator[None]:
    """Context manager for code that writes files. `target` is the option or argument with its value; `fix` is the
    advice for all errors except a full disk.

    Raises:
        UserError: for any OSError inside. Reads of other files inside must use `convert_read_errors`.
    """
    try:
        yield
    except OSError as error:
        fix = "free disk space, then start again" if error.errno in _NO_ROOM else fix
        raise UserError(f"{target}: cannot be written ({format_os_error(error)}); {fix}") from None


@contextmanager
def convert_read_errors(target: str, fix: str = "copy it again") -> Iterator[None]:
    """Context manager for code that reads local files.

    Raises:
        UserError: for any OSError inside.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{target}: cannot be read ({format_os_error(error)}); {fix}") from None


def format_os_error(error: OSError) -> str:
    """The operating system's text for an error, without the text that libraries add."""
    return os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
