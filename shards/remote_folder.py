"""Writes to a folder of an object store, or of another remote file system of fsspec: complete files only, with retries,
and with one clear error line for each way in which a store can refuse."""

import errno
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from glob import has_magic
from pathlib import Path
from typing import Any, TypeVar

from shards.storage import Place, describe_error, is_bucket_missing, is_local, is_storage_error
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.core.files import check_output, convert_write_errors, hide_secrets, try_lock, write_bytes

T = TypeVar("T")
RETRY_S = 60.0
"""Seconds for which a failing request is repeated, in addition to the retries of the store's own library."""
AT_ONCE = 16
"""Small requests at a time."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 10.0
PART_BYTES, PARTS_AT_ONCE = 16 << 20, 4
"""Size and number of the parts of a large upload that are in memory at a time (S3)."""
ABORTS = 4
"""How often the uploads of a file that failed are looked for and aborted."""
_READ_ONLY = {"http", "https", "github", "data", "zip", "tar"}
_ATOMIC = {"s3", "s3a", "gs", "gcs", "az", "adl", "abfs", "abfss", "oss", "oci", "tos", "memory"}
"""Stores in which an object appears only when its upload is complete. In others a file is renamed when it is."""
_SETTINGS = {errno.EINVAL, errno.ENAMETOOLONG, errno.ENOSYS, errno.EPERM, getattr(errno, "EREMCHG", 0)}
"""Errors that repeating does not repair, such as a bucket of another region."""
_DATA_FILE = re.compile(
    r"\.partial/.*|([^/]+/)?(([^/]*-)?\d{6,}\.tar|index/([^/]*-)?\d{6,}\.parquet|manifest\.json|sizes\.json)"
    r"|rejected\.parquet|part\.json"
)
_SCRATCH = "uniemox-upload-"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


@dataclass(frozen=True)
class Stored:
    """A file of a store."""

    size: int
    tag: str
    """Changes with the content; "" if the store has none."""


class RemoteFolder:
    """A remote folder that a command writes. `field` is its name in error lines."""

    def __init__(
        self, place: Place, field: str = "OUT", *, again: str = "start again", is_reached: bool = False
    ) -> None:
        """`again` is the advice for when a store that does not answer does so again. Until the first answer an error of
        the network means a wrong address, and is not retried, unless `is_reached`."""
        self.place, self.field, self.again = place, field, again
        remote: Any = place
        self._fs, self._root = remote.fs, remote.path.rstrip("/")
        self._protocol = str(remote.protocol)
        self._is_reached = is_reached

    def __str__(self) -> str:
        return hide_secrets(str(self.place)).rstrip("/")

    def check_access(self, probe: str) -> None:
        """Checks early that files can be written, listed, read and deleted, with a small file of that name.

        Raises:
            UserError: if not, naming the reason.
        """
        self.write(probe, b"")
        self.list_files()
        self.read(probe)
        self.delete([probe])

    def upload(self, source: Path, name: str) -> None:
        """Stores a local file; it appears only when it is complete."""
        if self._protocol in ("s3", "s3a"):
            self._put(name, lambda path: self._put_parts(source, path))
        else:
            self._put(name, lambda path: self._fs.put_file(str(source), path))

    def write(self, name: str, data: bytes) -> None:
        """Stores bytes; the file appears only when it is complete."""
        self._put(name, lambda path: self._fs.pipe_file(path, data))

    def copy(self, source: Place, name: str) -> None:
        """Stores a copy of a local or remote file. Within one store no data pass through this machine."""
        if is_local(source):
            self.upload(source, name)
            return
        remote: Any = source
        if remote.fs is self._fs:
            self._put(name, lambda path: self._fs.cp_file(remote.path, path))
            return
        with tempfile.NamedTemporaryFile(prefix="uniemox-copy-") as file:
            RemoteFolder(source.parent, "SOURCE", is_reached=True).download(source.name, Path(file.name))
            self.upload(Path(file.name), name)

    def download(self, name: str, target: Path) -> None:
        """Writes a file of the folder to a local path."""
        self._do("read", lambda: self._fs.get_file(self._path(name), str(target)))

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is no such file."""
        return self._do("read", lambda: self._read(name))

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """The contents of existing files."""
        names = list(names)
        with ThreadPoolExecutor(AT_ONCE) as threads:
            found = threads.map(self.read, names)
            return {name: data for name, data in zip(names, found) if data is not None}

    def list_files(self) -> dict[str, Stored]:
        """All files below the folder, by name."""
        return self._do("list", self._list_files)

    def stat(self, names: Iterable[str]) -> dict[str, Stored]:
        """Sizes and tags of existing files."""
        return {name: self._do("read", partial(self._stat, name)) for name in names}

    def delete(self, names: Iterable[str]) -> None:
        """Deletes files; missing ones do not matter."""
        with ThreadPoolExecutor(AT_ONCE) as threads:
            list(threads.map(lambda name: self._do("delete", lambda: self._delete_file(name)), list(names)))

    def abort_uploads(self) -> None:
        """Aborts uploads into this folder that a killed process left: stores keep and charge their parts."""
        if self._protocol in ("s3", "s3a"):
            with suppress(UserError):  # a store or a policy may not allow to list them
                self._do("delete", self._abort_uploads)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _put(self, name: str, put: Callable[[str], Any]) -> None:
        path = self._path(name)
        if self._protocol in _ATOMIC:
            self._do("write", lambda: put(path))
            return
        folder, _, base = path.rpartition("/")
        temporary = f"{folder}/.{base}.tmp"

        def put_and_rename() -> None:
            self._fs.makedirs(folder, exist_ok=True)
            put(temporary)
            self._fs.mv(temporary, path)

        self._do("write", put_and_rename)

    def _put_parts(self, source: Path, path: str) -> None:
        """Uploads to S3, a large file in parts. s3fs aborts a failed upload while parts are still on their way, and the
        store may keep those: they are looked for until there are none."""
        try:
            self._fs.put_file(str(source), path, chunksize=PART_BYTES, max_concurrency=PARTS_AT_ONCE)
        except Exception:
            with suppress(Exception):
                for _ in range(ABORTS):
                    if not self._abort_uploads(path):
                        break
            raise

    def _read(self, name: str) -> bytes | None:
        try:
            return bytes(self._fs.cat_file(self._path(name)))
        except FileNotFoundError as error:
            if is_bucket_missing(error):
                raise
            return None

    def _list_files(self) -> dict[str, Stored]:
        self._fs.invalidate_cache()
        prefix = f"{self._root}/"
        try:
            found = self._fs.find(self._root, detail=True)
        except FileNotFoundError as error:
            if is_bucket_missing(error):
                raise
            return {}
        return {
            path.removeprefix(prefix): Stored(int(info["size"] or 0), _tag(info))
            for path, info in found.items()
            if path.startswith(prefix) and not path.endswith("/")
        }

    def _stat(self, name: str) -> Stored:
        self._fs.invalidate_cache()
        info = self._fs.info(self._path(name))
        return Stored(int(info["size"] or 0), _tag(info))

    def _delete_file(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))  # unlike `rm`, it does not read names as patterns

    def _abort_uploads(self, of: str | None = None) -> int:
        """Aborts the uploads of one path, or of all below the folder; returns their number."""
        bucket, _, prefix = (of or f"{self._root}/").partition("/")
        found = self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix).get("Uploads") or []
        uploads = [upload for upload in found if of is None or upload["Key"] == prefix]
        for upload in uploads:
            self._fs.call_s3(
                "abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
            )
        return len(uploads)

    def _do(self, action: str, call: Callable[[], T]) -> T:
        """Makes a request, repeatedly if it fails by an error that may pass.

        Raises:
            UserError: if the store refuses it, or was never reached.
            Fault: if the store does not answer any more.
        """
        deadline, wait_s = time.monotonic() + RETRY_S, FIRST_WAIT_S
        while True:
            try:
                result = call()
                self._is_reached = True
                return result
            except (UserError, Fault):
                raise
            except Exception as error:
                if (mistake := self._describe_mistake(error, action)) is not None:
                    raise UserError(f"{self.field}={self}: {mistake}") from None
                if not is_storage_error(error):
                    raise
                if not self._is_reached:
                    raise UserError(
                        f"{self.field}={self}: cannot be reached ({describe_error(error)}); check the address, and the "
                        "store's settings such as AWS_ENDPOINT_URL"
                    ) from None
                if time.monotonic() + wait_s > deadline:
                    raise Fault(
                        f"{self.field}={self}: the store does not {action} any more ({describe_error(error)}); "
                        f"{self.again} when it does"
                    ) from None
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _describe_mistake(self, error: Exception, action: str) -> str | None:
        """The reason and fix of an error that repeating does not repair; None for others."""
        name = type(error).__name__
        if isinstance(error, PermissionError):
            return (
                f"no permission to {action} ({describe_error(error)}); check the credentials, and that they may list, "
                "read, write and delete there"
            )
        if "Credentials" in name or name == "ProfileNotFound":
            return f"{describe_error(error)}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        if isinstance(error, FileNotFoundError):
            return f"no such bucket ({describe_error(error)}); create it, or correct its name"
        if isinstance(error, NotImplementedError):
            return f"{self._protocol}:// cannot be written; give s3://, gs:// or a local folder"
        if name in ("ParamValidationError", "InvalidRegionError") or isinstance(error, ValueError):
            return f"not a valid address ({describe_error(error)}); correct it"
        if isinstance(error, OSError) and error.errno in _SETTINGS:
            return f"the store refuses to {action} ({describe_error(error)}); correct the address or its settings"
        return None


def open_remote_folder(place: Place, field: str = "OUT", *, again: str = "start again") -> RemoteFolder:
    """The folder of a remote place.

    Raises:
        UserError: if its kind of store can only be read.
    """
    remote: Any = place
    protocol = str(remote.protocol)
    if protocol in _READ_ONLY or "::" in str(place):
        raise UserError(
            f"{field}={hide_secrets(str(place))}: {protocol}:// can only be read; give s3://, gs:// or a local folder"
        )
    if has_magic(remote.path) or not remote.path.strip("/"):
        problem = (
            "has one of * ? [, which stand for patterns" if remote.path.strip("/") else "names no bucket"
        )
        raise UserError(
            f"{field}={hide_secrets(str(place))}: {problem}; give a name such as s3://bucket/folder"
        )
    return RemoteFolder(place, field, again=again)


@contextmanager
def open_scratch() -> Iterator[Path]:
    """Yields an empty folder below TMPDIR for files that are to be uploaded, and deletes it at the end. Deletes also
    those that killed processes of this user left.

    Raises:
        UserError: if the disk is full or cannot be written.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        with suppress(OSError):  # in use, or just being made
            if folder.stat().st_uid == os.getuid():
                with open(folder / "lock") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
    scratch, held = None, None
    try:
        while held is None:
            scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH))
            # Another process may be deleting it, as if a killed one had left it.
            with suppress(BlockingIOError):
                held = try_lock(scratch / "lock")
        assert scratch is not None
        with held:
            (scratch / "files").mkdir()
            yield scratch / "files"
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise UserError(
            f"TMPDIR={tempfile.gettempdir()}: {error.strerror}; set TMPDIR to a folder with space for two shards, then "
            "start the same command again"
        ) from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def is_data_file(name: str) -> bool:
    """Whether a file below OUT has a name that our commands write; other files there belong to the user."""
    return _DATA_FILE.fullmatch(name) is not None


def check_writable(place: Place, field: str) -> None:
    """Checks that a file, local or remote, can be written, without creating it.

    Raises:
        UserError: if it cannot.
    """
    if is_local(place):
        check_output(place, field)
    else:
        folder = open_remote_folder(place.parent, field)
        folder.write(f".{place.name}.access", b"")
        folder.delete([f".{place.name}.access"])


def write_anywhere(place: Place, data: bytes, field: str) -> None:
    """Writes a whole file atomically, local or remote.

    Raises:
        UserError: if it cannot be written.
    """
    if is_local(place):
        with convert_write_errors(f"{field}={place}", "give a file in a folder that can be written"):
            write_bytes(place, data)
    else:
        open_remote_folder(place.parent, field).write(place.name, data)


def _tag(info: dict[str, Any]) -> str:
    for name in ("ETag", "etag", "md5Hash", "content_md5"):
        if info.get(name):
            return str(info[name]).strip('"')
    return ""
