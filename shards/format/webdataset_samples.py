"""The samples of tars as webdataset groups them: its own code decides, and finds where each member's content is.

Needs webdataset, which is imported when it is first used: it brings torch, and this package works without both.
"""

import hashlib
import io
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from shards.format.tar_headers import BLOCK, BadTar
from uniemox_dist.core.errors import UserError, missing_extra

_META = re.compile(r"__[^/]*__($|/)")
"""Names that webdataset's `tar_file_iterator` skips."""
_READ_AT_ONCE = 1 << 16
_BAD = (tarfile.TarError, RecursionError, OverflowError, ValueError, EOFError)
"""What `tarfile` raises for files that are no complete tars."""

Refuse = Callable[[str, str, str], None]
"""Receives a member that is left out: its name, the reason, and details."""


class Content(NamedTuple):
    """The content of a member, and its position in the tar."""

    data: bytes
    offset: int

    def __bool__(self) -> bool:
        """True as that of the bytes in webdataset's samples."""
        return bool(self.data)


@dataclass(frozen=True)
class Grouped:
    """A sample: its `__key__`, and its members by webdataset's extension, in tar order."""

    key: str
    members: dict[str, Content]


def load_webdataset() -> Any:
    """webdataset's module `tariterators`.

    Raises:
        UserError: if webdataset is not installed.
    """
    try:
        from webdataset import tariterators
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "webdataset", "stream") from None
    return tariterators


class TarPass:
    """One sequential pass over a tar, which finds its samples and computes its hash.

    After the iteration `size` and `sha256` are those of the file.
    """

    def __init__(self, raw: BinaryIO, refuse: Refuse) -> None:
        self.size = 0
        self._raw, self._refuse = raw, refuse
        self._digest = hashlib.sha256()
        self._data_end = 0

    def __iter__(self) -> Iterator[Grouped]:
        """Yields the samples.

        Raises:
            BadTar: if the file is not a complete tar.
        """
        try:
            with tarfile.open(fileobj=self, mode="r|", bufsize=_READ_AT_ONCE) as tar:  # type: ignore[call-overload]
                yield from group(self._members(tar), self._refuse)
                end: int = tar.offset
        except UserError:
            raise
        except _BAD as error:
            raise _as_bad(error) from None
        while self.read(1 << 20):
            pass
        # tarfile also stops, without an error, at a damaged header and at the end of a truncated file.
        if end + BLOCK > self.size:
            raise BadTar("has no end mark")
        if self._data_end > end:
            self._check_end(end)

    @property
    def sha256(self) -> str:
        """SHA-256 of what was read."""
        return self._digest.hexdigest()

    def read(self, size: int) -> bytes:
        """Reads the next bytes of the file; for `tarfile`."""
        data = self._raw.read(size)
        self._digest.update(data)
        if content := len(data.rstrip(b"\0")):
            self._data_end = self.size + content
        self.size += len(data)
        return data

    def _members(self, tar: tarfile.TarFile) -> Iterator[tuple[str, Content]]:
        for name, info in list_members(tar, self._refuse):
            file = tar.extractfile(info)
            assert file is not None
            yield name, Content(file.read(), info.offset_data)

    def _check_end(self, end: int) -> None:
        """Checks what follows the block at which tarfile stopped, if that is not the end of the data."""
        self._raw.seek(end)
        if any(self._raw.read(BLOCK)):
            raise BadTar(f"no valid header at byte {end}")
        detail = (
            f"bytes from {end} on follow the end mark, where webdataset stops (several tars in one file?)"
        )
        self._refuse("", "after_end", detail)


def read_piece(data: bytes) -> list[Grouped]:
    """The samples in a piece of a tar, from one header to another. Offsets count from its start.

    Raises:
        BadTar: if it is not made of complete members.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            found = list(list_members(tar, _ignore))
            end: int = tar.offset  # type: ignore[attr-defined]
    except _BAD as error:
        raise _as_bad(error) from None
    if end != len(data):
        raise BadTar(f"no valid header at byte {end}")
    contents = (
        (name, Content(data[info.offset_data : info.offset_data + info.size], info.offset_data))
        for name, info in found
    )
    return list(group(contents, _ignore))


def list_members(tar: tarfile.TarFile, refuse: Refuse) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Names and headers of the members of an open tar that webdataset reads, except those that cannot be read by
    position."""
    while (info := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # as webdataset does, so that memory does not grow
        name = info.name
        if not info.isreg() or ("/" not in name and name.startswith("__") and name.endswith("__")):
            continue
        if _META.match(name):
            continue
        if info.size < 0:
            raise BadTar(f"{name} has a size that is negative")
        if info.issparse():
            refuse(
                name,
                "sparse",
                "a sparse file, whose content is not in one piece; write the tar without --sparse",
            )
        elif not _is_text(name):
            refuse(ascii(name)[1:-1], "member_name", "the name is not UTF-8")
        else:
            yield name, info


def group(members: Iterable[tuple[str, Content]], refuse: Refuse) -> Iterator[Grouped]:
    """Groups members by webdataset's `group_by_keys`. Of a sample's members with one extension it keeps the first."""
    now = ""

    def feed() -> Iterator[dict[str, Any]]:
        nonlocal now
        for now, content in members:
            yield {"fname": now, "data": content, "__url__": ""}

    def leave_out(error: Exception) -> bool:
        if not isinstance(error, ValueError):
            raise error
        refuse(now, "duplicate_member", "an earlier member of the sample has the same extension")
        return True

    for sample in load_webdataset().group_by_keys(feed(), handler=leave_out):
        found = {name: content for name, content in sample.items() if name not in ("__key__", "__url__")}
        if found:
            yield Grouped(sample["__key__"], found)


def _as_bad(error: Exception) -> BadTar:
    if isinstance(error, RecursionError):
        return BadTar("too many extended headers in a row")
    return BadTar(str(error) or type(error).__name__)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _ignore(*_: str) -> None:
    """Records nothing."""
