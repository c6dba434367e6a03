"""Positioned reads of local or remote tars: retried on failure, counted, and served from the node's cache."""

import logging
import os
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from typing import TypeVar

from shards.format.entries import ShardEntry
from shards.storage import Place, is_local, parse_place, read_range
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.core.files import hide_secrets
from uniemox_dist.core.formatting import counted
from uniemox_dist.data.cache import ShardCache

T = TypeVar("T")
log = logging.getLogger("uniemox")
HANDLES = 128
"""Open tars per process and data set."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 15.0
_GONE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass
class ReadCounts:
    """Reads of this process so far."""

    reads: int = 0
    bytes: int = 0
    """Bytes from the origin; bytes from the cache do not count."""
    hits: int = 0
    """Reads served from the cache."""
    retries: int = 0

    def __add__(self, other: "ReadCounts") -> "ReadCounts":
        return ReadCounts(*(a + b for a, b in zip(astuple(self), astuple(other))))

    def __sub__(self, other: "ReadCounts") -> "ReadCounts":
        return ReadCounts(*(a - b for a, b in zip(astuple(self), astuple(other))))


class ShardOrigin:
    """The tars of one data set. Cheap to pickle and safe to fork: each process opens files on first use."""

    def __init__(self, url: str, field: str) -> None:
        self.url, self.field = url, field
        self.retry_s = 0.0
        """Seconds for which a failing read is retried."""
        self.cache: ShardCache | None = None
        self.counts = ReadCounts()
        self._handles: OrderedDict[str, int] = OrderedDict()
        self._folder: tuple[int, Place] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handles": OrderedDict(), "_folder": None}

    @property
    def folder(self) -> Place:
        """Folder of the data set, with a connection of this process: connections do not survive a fork."""
        if self._folder is None or self._folder[0] != os.getpid():
            self._folder = (os.getpid(), parse_place(self.url, self.field))
        return self._folder[1]

    def read(self, entry: ShardEntry, offset: int, length: int, *, cached: bool = True) -> bytes:
        """Reads bytes of a tar. `cached=False` skips the cache, because its copy is damaged.

        Raises:
            UserError: if the tar has no such bytes, so that the index is not that of the tar.
            Fault: if the bytes cannot be read within `retry_s`, or the tar is gone.
        """
        if offset + length > entry.bytes:
            raise UserError(
                f"{self._name()}: {entry.name}: the index states bytes {offset} to {offset + length} of a tar of "
                f"{counted(entry.bytes, 'byte')}; copy the index again, or index the tars again"
            )
        self.counts.reads += 1
        # Opened for each read: an evicted copy would occupy its space as long as a process held it open.
        if cached and self.cache is not None and (copy := self.cache.open(entry)) is not None:
            try:
                data = os.pread(copy, length, offset)
                self.counts.hits += 1
                return data
            except OSError as error:  # an error of the node's disk; the origin has the bytes too
                log.warning("cache %s: %s: %s", self.cache.folder, entry.name, error.strerror)
            finally:
                os.close(copy)
        data = self.retry(f"shard {entry.name}", lambda: self._read_exactly(entry, offset, length))
        self.counts.bytes += len(data)
        if self.cache is not None:
            # The range comes first, so that no step waits for a whole shard, which follows in the background.
            self.cache.request(entry, partial(self._read_chunk, entry))
            for problem in self.cache.take_problems():
                log.warning("%s", problem)
        return data

    def close(self) -> None:
        """Closes open files; the next read opens them again."""
        while self._handles:
            os.close(self._handles.popitem()[1])
        if self.cache is not None:
            self.cache.close()

    def _read_chunk(self, entry: ShardEntry, offset: int, length: int) -> bytes:
        """Reads a piece of a shard for the cache, in the cache's thread, which must not share handles with this one."""
        data = read_range(self.folder / entry.name, offset, length)
        self.counts.bytes += len(data)
        return data

    def retry(self, what: str, read: Callable[[], T]) -> T:
        """Returns the result of `read`, retrying it for `retry_s` with increasing waits.

        Raises:
            Fault: naming `what`, if it keeps failing, or at once if the file is gone.
        """
        deadline = time.monotonic() + self.retry_s
        wait_s = FIRST_WAIT_S
        while True:
            try:
                return read()
            except UserError:
                raise
            except _GONE as error:
                why = error.strerror or "no such file"
                raise Fault(f"{self._name()}: {what}: {why}; copy it again, then start again") from None
            except Exception as error:  # every file system and client raises its own types
                if time.monotonic() + wait_s > deadline:
                    raise Fault(
                        f"{self._name()}: {what} could not be read for {self.retry_s:g} s "
                        f"({_first_line(error)}); resume the run when the source is available again"
                    ) from None
            self.counts.retries += 1
            # Random waits spread the retries of ranks that failed at the same time.
            time.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(LONGEST_WAIT_S, wait_s * 2)

    def _name(self) -> str:
        return f"{self.field}={hide_secrets(self.url)}"

    def _read_exactly(self, entry: ShardEntry, offset: int, length: int) -> bytes:
        data = self._read_once(entry, offset, length)
        if len(data) < length:  # a lost connection or a truncated tar, not damage of one picture
            raise OSError(f"{len(data)} bytes instead of {length} at byte {offset}: is the file truncated?")
        return data

    def _read_once(self, entry: ShardEntry, offset: int, length: int) -> bytes:
        folder = self.folder
        if not is_local(folder):
            return read_range(folder / entry.name, offset, length)
        handle = self._handles.pop(entry.name, None)
        if handle is None:
            handle = os.open(folder / entry.name, os.O_RDONLY)
        try:
            data = os.pread(handle, length, offset)
        except OSError:
            os.close(handle)  # it may be stale; the next attempt opens the file again
            raise
        self._handles[entry.name] = handle  # now the most recently used
        if len(self._handles) > HANDLES:
            os.close(self._handles.popitem(last=False)[1])
        return data


def _first_line(error: Exception) -> str:
    return hide_secrets((str(error).strip().splitlines() or [type(error).__name__])[0])[:200]
