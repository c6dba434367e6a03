"""Files of a source: their names, the folders that belong to it, and the bytes of its pictures, local or remote."""

import errno
import os
import posixpath
import re
import stat
import unicodedata
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from glob import has_magic
from itertools import takewhile
from pathlib import Path
from typing import Literal

from shards.pictures.formats import HEAD_BYTES, BadPicture
from shards.sources import Image, Slice
from shards.sources.download import download, is_web
from shards.sources.stores import read_stored
from shards.storage import Place, is_local, parse_place, read_range
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import hide_secrets, is_remote

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
"""Usual names of splits, in lower case -> the split's name. Every layout uses this table."""
REMOTE_READS = 16
"""Remote pictures that one worker requests at a time, because most of that time is waiting."""
_FORMS: tuple[Literal["NFC"], Literal["NFD"]] = ("NFC", "NFD")
SIDE_BYTES = 16 << 20
"""Largest file of a caption or annotation."""
_LOCAL_PROTOCOLS = frozenset(
    ("asynclocal", "blockcache", "cached", "dir", "filecache", "generic", "git", "libarchive", "memory")
) | {"reference", "simplecache", "tar", "zip"}
"""Protocols of fsspec that may read local files."""
_URL = re.compile(r"\s*[A-Za-z][\w+.-]*://")
_ALLOW = "--allow-outside permits it"
_NO_SUCH_FILE = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}
)
"""Errors that concern one file. All others, of a disk or a network, end the pack: a later try may succeed."""


# ---- names


def split_name(name: str) -> str:
    """The name of a split: train, val or test for their usual names in any case, all others unchanged."""
    return SPLITS.get(name.strip().lower(), name)


def find_split_files(folder: Place, extension: str) -> list[tuple[str, Place]]:
    """The files of a folder that are called like splits (`train.json`, `Validation.json`), in the order train, val,
    test.

    Raises:
        UserError: if two of them mean the same split.
    """
    found: dict[str, Place] = {}
    for name, split in SPLITS.items():
        paths = [folder / f"{spelling}{extension}" for spelling in (name, name.capitalize(), name.upper())]
        path = next((path for path in paths if path.is_file()), None)
        if path is not None and split in found:
            raise UserError(f"SOURCE: {found[split]} and {path} are both of split {split}; remove one")
        if path is not None:
            found[split] = path
    return [(split, found[split]) for split in ("train", "val", "test") if split in found]


def name_below(path: Place, source: str) -> str:
    """The name of one of a source's files: its path below SOURCE, so that names are unique.

    For a pattern it is the path below the folders before the first `*`; if SOURCE is the file itself, its file name.
    """
    base = "/".join(takewhile(lambda part: not has_magic(part), source.split("/")))
    root = str(parse_place(base or ("/" if source.startswith("/") else ".")))
    return path.name if str(path) == root else str(path).removeprefix(root.rstrip("/") + "/")


class Outside(ValueError):
    """A path in a source's file leads out of the source's folder."""


def resolve_path(folder: Place, text: str, *, allow_outside: bool = False) -> str:
    """The place that a file of the source names: a path relative to `folder`, or a URL. A name that does not exist on
    disk matches the one that does in another Unicode form.

    Links are not followed here; `fetch_images` checks where they lead.

    Raises:
        Outside: for a path that leads out of `folder`, unless `allow_outside`.
    """
    if _URL.match(text):
        text = text.strip()
    protocol, is_url, rest = text.partition("://")
    if allow_outside:
        return text if is_url else _in_existing_form(folder / text)
    if is_url and protocol.lower() in ("http", "https"):
        return text
    if is_url and protocol.lower() not in ("file", "local"):
        if protocol.lower() in _LOCAL_PROTOCOLS or "::" in text:
            raise Outside(f"{_escape(hide_secrets(text))} may lead to any local file; {_ALLOW}")
        return text
    path = rest if is_url else text
    if is_local(folder):
        root = os.path.abspath(folder)
        is_below = os.path.normpath(os.path.join(root, path)).startswith(f"{root.rstrip('/')}/")
    else:
        is_below = not (is_url or path.startswith("/") or posixpath.normpath(path).split("/")[0] == "..")
    if not is_below:
        raise Outside(f"{_escape(text)} leads out of the folder {_escape(str(folder))}; {_ALLOW}")
    return text if is_url else _in_existing_form(folder / text)


def find_file(folder: Place, name: str) -> Place:
    """The place of a file in a folder, whose name may exist in another Unicode form."""
    path = folder / name
    return Path(_in_existing_form(path)) if is_local(path) else path


def _in_existing_form(path: Place) -> str:
    """A path with its names in the Unicode form that they have on disk: macOS decomposes (NFD), most others compose
    (NFC). Names that exist stay unchanged, and so do paths that exist in neither form or in both, and remote ones."""
    text = str(path)
    if text.isascii() or not is_local(path) or os.path.lexists(text):
        return text
    found = ""
    for part in text.split("/"):
        forms = (part, *({unicodedata.normalize(form, part) for form in _FORMS} - {part}))
        existing = [form for form in forms if os.path.lexists(f"{found}{form}" or "/")]
        if not existing or (existing[0] != part and len(existing) > 1):
            return text
        found += f"{existing[0]}/"
    return found[:-1]


class NamesInForms:
    """Names of files that may be stated in another Unicode form."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {name for name in names if not name.isascii()}
        self._by_form: dict[str, list[str]] = {}
        for name in self._names:
            self._by_form.setdefault(unicodedata.normalize("NFC", name), []).append(name)

    def find(self, name: str) -> str:
        """The name itself if there is such a file, or else the only one that is equal in another form; the name itself
        if there is none."""
        if name.isascii() or name in self._names:
            return name
        found = self._by_form.get(unicodedata.normalize("NFC", name), ())
        return found[0] if len(found) == 1 else name


def try_path(
    folder: Place, text: str, *, allow_outside: bool = False
) -> tuple[str | bytes, tuple[str, str] | None]:
    """(place, None) of `resolve_path`, or (b"", reason and detail for a refused record)."""
    try:
        return resolve_path(folder, text, allow_outside=allow_outside), None
    except Outside as error:
        return b"", ("outside", str(error))


def is_clutter(folder: str) -> bool:
    """Whether a folder does not belong to the source: hidden folders, and those that macOS adds to archives."""
    return folder.startswith(".") or folder == "__MACOSX"


def is_apple_double(path: str) -> bool:
    """Whether a file has the name of one that macOS writes beside another one (`._x.jpg`), with its attributes."""
    return path.rpartition("/")[2].startswith("._")


# ---- bytes


def read_side_file(path: Place, limit: int = SIDE_BYTES) -> bytes:
    """The bytes of a file that belongs to one picture, such as its caption.

    Raises:
        ValueError: if its name leads to no readable file (missing, a broken link, too long a name, a pipe), or it has
            more than `limit` bytes.
        OSError: for errors of the disk or network.
    """
    data = _read_start(path, limit + 1)
    if len(data) > limit:
        raise ValueError(f"has more than {limit >> 20} MiB")
    return data


def read_head(path: Place) -> bytes:
    """The first bytes of a file, which decide whether it is a picture; none of a pipe or a device.

    Raises:
        ValueError: if it cannot be read.
        OSError: for errors of the disk or network.
    """
    return _read_start(path, HEAD_BYTES, others=b"")


def _read_start(path: Place, length: int, others: bytes | None = None) -> bytes:
    """The first bytes of a file. `others` is returned for a pipe or a device, which is an error if that is None."""
    try:
        if not is_local(path):
            return read_range(path, 0, length)
        with open(path, "rb", buffering=0, opener=_open_nonblocking) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                if others is None:
                    raise ValueError("not a regular file")
                return others
            return file.read(length) or b""
    except OSError as error:
        if error.errno == errno.ENXIO and others is not None:  # a socket
            return others
        if isinstance(error, FileNotFoundError):  # object stores raise it without a number
            raise ValueError("no such file") from None
        if error.errno in _NO_SUCH_FILE:
            raise ValueError(f"cannot be read ({error.strerror})") from None
        raise


def fetch_images(images: Sequence[Image | BadPicture], roots: Sequence[str] = ()) -> list[bytes | BadPicture]:
    """The bytes of several pictures; for a picture without any, the reason.

    Args:
        images: pictures, or the reasons why they are refused.
        roots: local folders; a file named below one of them is refused if a link leads out of it.

    Raises:
        Fault: if servers or stores do not answer any more.
        OSError: for errors of the disk.
    """
    if sum(is_remote(_path(image)) for image in images) < 2:
        return [_fetch(image, roots) for image in images]
    with ThreadPoolExecutor(REMOTE_READS) as threads:
        return list(threads.map(lambda image: _fetch(image, roots), images))


def _path(image: Image | BadPicture) -> str:
    return "" if isinstance(image, bytes | BadPicture) else image if isinstance(image, str) else image.path


def _fetch(image: Image | BadPicture, roots: Sequence[str]) -> bytes | BadPicture:
    if isinstance(image, bytes | BadPicture):
        return image
    path = _path(image)
    try:
        return _read(image, roots)
    except BadPicture as bad:
        return bad
    except OSError as error:
        if error.errno not in _NO_SUCH_FILE | {errno.ENXIO}:  # the latter for a socket
            raise
        return BadPicture("unreadable", f"{error.strerror}: {_escape(path)}")
    except ValueError:  # a zero byte inside the name
        return BadPicture("unreadable", f"not a file name: {_escape(repr(path))}")


def _read(image: Image, roots: Sequence[str]) -> bytes:
    if isinstance(image, str):
        if is_web(image):
            return download(image)
        if is_remote(image):
            return read_stored(image)
        return _read_regular_file(image.removeprefix("file://").removeprefix("local://"), roots)
    assert isinstance(image, Slice), f"{type(image).__name__} is read by tables.CellReader"
    if is_remote(image.path):
        return read_stored(image.path, image.offset, image.length)
    return os.pread(_open_file(image.path), image.length, image.offset)


def _read_regular_file(path: str, roots: Sequence[str]) -> bytes:
    """Raises BadPicture for a pipe or a device, which could block or never end, and for a file outside of its root."""
    with open(path, "rb", buffering=0, opener=_open_nonblocking) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise BadPicture("unreadable", f"not a regular file: {_escape(path)}")
        if roots:
            _check_inside(path, file.fileno(), roots)
        return file.read()


def _check_inside(path: str, fd: int, roots: Sequence[str]) -> None:
    """Checks that an open file is really inside the root below which it is named: a link may lead elsewhere."""
    named = os.path.abspath(path)
    root = next(
        (root for root in map(os.path.abspath, roots) if named.startswith(f"{root.rstrip('/')}/")), None
    )
    if root is None:
        return
    real = os.readlink(f"/proc/self/fd/{fd}")
    if not real.startswith(f"{_real_path(root).rstrip('/')}/"):
        raise BadPicture(
            "outside", f"a link leads out of the folder {_escape(root)}: {_escape(path)}; {_ALLOW}"
        )


@lru_cache(maxsize=64)
def _real_path(folder: str) -> str:
    return os.path.realpath(folder)


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
