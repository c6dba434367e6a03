"""Files of a source: their names, the folders that belong to it, and the bytes of its pictures, local or remote."""

import errno
import os
import stat
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from glob import has_magic
from itertools import takewhile

from shards.pictures import BadPicture
from shards.sources import Image, Slice
from shards.storage import Place, parse_place, read_range
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import is_remote

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Folder names that mean a split, in lower case -> the split's name."""
REMOTE_READS = 16
"""Remote pictures that one worker requests at a time, because most of that time is waiting."""
TRIES = 3
_NO_SUCH_FILE = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}
)
"""Errors that concern one file. All others, of a disk or a network, end the pack: a later try may succeed."""


# ---- names


def name_below(path: Place, source: str) -> str:
    """The name of one of a source's files: its path below SOURCE, so that names are unique.

    For a pattern it is the path below the folders before the first `*`; if SOURCE is the file itself, its file name.
    """
    base = "/".join(takewhile(lambda part: not has_magic(part), source.split("/")))
    root = str(parse_place(base or ("/" if source.startswith("/") else ".")))
    return path.name if str(path) == root else str(path).removeprefix(root.rstrip("/") + "/")


def is_clutter(folder: str) -> bool:
    """Whether a folder does not belong to the source: hidden folders, and those that macOS adds to archives."""
    return folder.startswith(".") or folder == "__MACOSX"


# ---- bytes


def read_side_file(path: Place) -> bytes:
    """The bytes of a file that belongs to one picture, such as its caption.

    Raises:
        ValueError: if its name leads to no readable file (missing, a broken link, too long a name).
        OSError: for errors of the disk or network.
    """
    try:
        return bytes(path.read_bytes())
    except OSError as error:
        if isinstance(error, FileNotFoundError):  # object stores raise it without a number
            raise ValueError("no such file") from None
        if error.errno in _NO_SUCH_FILE:
            raise ValueError(f"cannot be read ({error.strerror})") from None
        raise


def fetch_images(images: list[Image]) -> list[bytes | BadPicture]:
    """The bytes of several pictures; for a picture without any, the reason.

    Raises:
        OSError: for errors of the disk or network; remote reads are tried three times.
    """
    if sum(is_remote(_path(image)) for image in images) < 2:
        return [_fetch(image) for image in images]
    with ThreadPoolExecutor(REMOTE_READS) as threads:
        return list(threads.map(_fetch, images))


def _path(image: Image) -> str:
    return "" if isinstance(image, bytes) else image if isinstance(image, str) else image.path


def _fetch(image: Image) -> bytes | BadPicture:
    if isinstance(image, bytes):
        return image
    path = _path(image)
    for attempt in range(TRIES):
        try:
            return _read(image)
        except OSError as error:
            no_such_file = _NO_SUCH_FILE | {errno.ENXIO}  # the latter for a socket
            if isinstance(error, FileNotFoundError | PermissionError) or error.errno in no_such_file:
                return BadPicture("unreadable", f"{error.strerror or 'no such file'}: {_escape(path)}")
            if attempt == TRIES - 1 or not is_remote(path):
                raise
            time.sleep(2**attempt)
        except BadPicture as bad:
            return bad
        except UserError as error:  # an unknown protocol, or its package is missing
            return BadPicture("unreadable", str(error))
        except ValueError:  # a zero byte inside the name
            return BadPicture("unreadable", f"not a file name: {_escape(repr(path))}")
    raise AssertionError("unreachable: the last try returns or raises")


def _read(image: Image) -> bytes:
    if isinstance(image, str):
        if is_remote(image):
            return bytes(parse_place(image).read_bytes())
        return _read_regular_file(image.removeprefix("file://"))
    assert isinstance(image, Slice), f"{type(image).__name__} is read by tables.CellReader"
    if is_remote(image.path):
        return read_range(parse_place(image.path), image.offset, image.length)
    return os.pread(_open_file(image.path), image.length, image.offset)


def _read_regular_file(path: str) -> bytes:
    """Raises BadPicture for a pipe or a device, which could block or never end."""
    with open(path, "rb", buffering=0, opener=_open_nonblocking) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise BadPicture("unreadable", f"not a regular file: {_escape(path)}")
        return file.read()


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


_open_files: OrderedDict[str, int] = OrderedDict()


def _open_file(path: str) -> int:
    """The descriptor of a file that this process keeps open, because many slices of one tar are read."""
    if path not in _open_files:
        _open_files[path] = os.open(path, os.O_RDONLY)
        if len(_open_files) > 64:
            os.close(_open_files.popitem(last=False)[1])
    _open_files.move_to_end(path)
    return _open_files[path]


def _escape(path: str) -> str:
    return os.fsencode(path[:200]).decode("utf-8", "backslashreplace")
