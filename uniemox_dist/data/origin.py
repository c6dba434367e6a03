"""Bytes of tars by position, from wherever the data set lies: tried again when a read fails, counted, and from a
copy on the node's own disk where there is one."""

import logging
import os
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from typing import TypeVar

from shards.format.manifest import ShardEntry
from shards.storage import Place, is_local, place, read_range
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.data.cache import ShardCache

T = TypeVar("T")
log = logging.getLogger("uniemox")
HANDLES = 128
"""Tars that one process holds open per data set."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 15.0
_GONE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass
class ReadCounts:
    """What reading has cost this process so far."""

    reads: int = 0
    bytes: int = 0
    """From the origin: what came from the cache is not counted."""
    hits: int = 0
    """Reads that the cache answered."""
    retries: int = 0

    def __add__(self, other: "ReadCounts") -> "ReadCounts":
        return ReadCounts(*(a + b for a, b in zip(astuple(self), astuple(other))))

    def __sub__(self, other: "ReadCounts") -> "ReadCounts":
        return ReadCounts(*(a - b for a, b in zip(astuple(self), astuple(other))))


class ShardOrigin:
    """The tars of one data set. Cheap to pickle, and to fork: files are opened where they are used."""

    def __init__(self, url: str, field: str) -> None:
        self.url, self.field = url, field
        self.retry_s = 0.0
        """Seconds for which a read that fails is tried again."""
        self.cache: ShardCache | None = None
        self.counts = ReadCounts()
        self._handles: OrderedDict[str, int] = OrderedDict()
        self._folder: tuple[int, Place] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handles": OrderedDict(), "_folder": None}

    @property
    def folder(self) -> Place:
        """Where the data set lies; a connection of this process, since none survives a fork."""
        if self._folder is None or self._folder[0] != os.getpid():
            self._folder = (os.getpid(), place(self.url))
        return self._folder[1]

    def read(self, entry: ShardEntry, offset: int, length: int, *, cached: bool = True) -> bytes:
        """Bytes of a tar. Not from the cache where a copy there turned out to be damaged.

        Raises:
            Fault: if they cannot be read, again and again for `retry_s`, or the tar is gone.
        """
        self.counts.reads += 1
        # Opened for each read: a copy that made room for others would keep its space while anybody held it open.
        if cached and self.cache is not None and (copy := self.cache.open(entry)) is not None:
            try:
                data = os.pread(copy, length, offset)
                self.counts.hits += 1
                return data
            except OSError as error:  # the node's disk; the origin has it too
                log.warning("cache %s: %s: %s", self.cache.folder, entry.name, error.strerror)
            finally:
                os.close(copy)
        data = self.persistent(f"shard {entry.name}", lambda: self._all(entry, offset, length))
        self.counts.bytes += len(data)
        if self.cache is not None:
            # Ranges first, so that no step waits for a whole shard; the shard comes behind them.
            self.cache.request(entry, partial(self._whole, entry))
            for problem in self.cache.take_problems():
                log.warning("%s", problem)
        return data

    def close(self) -> None:
        """Closes the files that are open; they are opened again where they are needed."""
        while self._handles:
            os.close(self._handles.popitem()[1])
        if self.cache is not None:
            self.cache.close()

    def _whole(self, entry: ShardEntry, offset: int, length: int) -> bytes:
        """A piece of a shard that comes into the cache: in another thread, which must not share handles with this."""
        data = read_range(self.folder / entry.name, offset, length)
        self.counts.bytes += len(data)
        return data

    def persistent(self, what: str, read: Callable[[], T]) -> T:
        """What `read` returns, at last: tried again for `retry_s`, with longer and longer waits.

        Raises:
            Fault: naming `what`, if it fails to the end, or at once if it is gone.
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
                raise Fault(
                    f"{self.field}={self.url}: {what}: {why}; copy it again, then start again"
                ) from None
            except Exception as error:  # every file system and client has types of its own
                if time.monotonic() + wait_s > deadline:
                    raise Fault(
                        f"{self.field}={self.url}: {what} could not be read for {self.retry_s:g} s ({_short(error)}); "
                        f"the run can go on from its last checkpoint when the source is back"
                    ) from None
            self.counts.retries += 1
            # Ranks that failed together should not come back together.
            time.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(LONGEST_WAIT_S, wait_s * 2)

    def _all(self, entry: ShardEntry, offset: int, length: int) -> bytes:
        data = self._once(entry, offset, length)
        if len(data) < length:  # a connection that broke off, or a tar that was cut: no damage of one picture
            raise OSError(f"{len(data)} bytes instead of {length} at byte {offset}: was it cut?")
        return data

    def _once(self, entry: ShardEntry, offset: int, length: int) -> bytes:
        folder = self.folder
        if not is_local(folder):
            return read_range(folder / entry.name, offset, length)
        handle = self._handles.pop(entry.name, None)
        if handle is None:
            handle = os.open(folder / entry.name, os.O_RDONLY)
        try:
            data = os.pread(handle, length, offset)
        except OSError:
            os.close(handle)  # it may be stale: the next try opens the file anew
            raise
        self._handles[entry.name] = handle  # as the one that was used last
        if len(self._handles) > HANDLES:
            os.close(self._handles.popitem(last=False)[1])
        return data


def _short(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
