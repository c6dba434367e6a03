"""Encoded pictures by their place: files, slices of tars, cells of tables; local or remote."""

import errno
import os
import stat
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from shards.pictures import BadPicture
from shards.sources import Image, Slice
from shards.storage import is_remote, place, read_range
from uniemox_dist.core.errors import UserError

REMOTE_READS = 16
"""Remote pictures that one worker asks for at a time: what takes long there is waiting."""
TRIES = 3
# What is wrong with a name, for good. Other errors (a disk, a network) end the pack: the data would change.
_NO_SUCH_FILE = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EACCES,
        errno.EPERM,
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.ENXIO,  # a socket
    }
)


def fetch_all(images: list[Image]) -> list[bytes | BadPicture]:
    """The bytes of several pictures, or why one of them has none."""
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
            gone = isinstance(error, FileNotFoundError | PermissionError) or error.errno in _NO_SUCH_FILE
            if gone:
                return BadPicture("unreadable", f"{error.strerror or 'no such file'}: {_shown(path)}")
            if attempt == TRIES - 1 or not is_remote(path):
                raise
            time.sleep(2**attempt)
        except BadPicture as bad:
            return bad
        except UserError as error:  # a protocol that nobody speaks, or whose package is missing
            return BadPicture("unreadable", str(error))
        except ValueError:  # a zero byte inside the name
            return BadPicture("unreadable", f"not a file name: {_shown(repr(path))}")
    raise AssertionError("unreachable: the last try returns or raises")


def _read(image: Image) -> bytes:
    if isinstance(image, str):
        if is_remote(image):
            return bytes(place(image).read_bytes())
        return _read_file(image.removeprefix("file://"))
    assert isinstance(image, Slice), f"{type(image).__name__} is fetched by cells.CellReader"
    if is_remote(image.path):
        return read_range(place(image.path), image.offset, image.length)
    return os.pread(_handle(image.path), image.length, image.offset)


def _read_file(path: str) -> bytes:
    """Raises BadPicture for a pipe or a device: it would be waited for, or read, without end."""
    with open(path, "rb", buffering=0, opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise BadPicture("unreadable", f"not a regular file: {_shown(path)}")
        return file.read()


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


_handles: OrderedDict[str, int] = OrderedDict()


def _handle(path: str) -> int:
    """An open file of this process: slices of one tar are asked for many times."""
    if path not in _handles:
        _handles[path] = os.open(path, os.O_RDONLY)
        if len(_handles) > 64:
            os.close(_handles.popitem(last=False)[1])
    _handles.move_to_end(path)
    return _handles[path]


def _shown(path: str) -> str:
    return os.fsencode(path[:200]).decode("utf-8", "backslashreplace")
