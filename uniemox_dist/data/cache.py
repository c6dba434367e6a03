"""Cache of whole shards on a node's disk, filled in the background and shared by all processes of the node.

<folder>/lock            node-wide flock, held while files are created, renamed or evicted
<folder>/<sha256>.part   being copied: full size, flocked by its writer; without a flock its writer was killed
<folder>/<sha256>.tar    complete; its modification time is the time of its last use
"""

import fcntl
import hashlib
import math
import os
import re
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

from shards.format.entries import ShardEntry
from shards.format.manifest import MANIFEST
from uniemox_dist.core.errors import UserError

_SHA256 = re.compile(r"[0-9a-f]{64}")


class _Process:
    """Requests of one process, guarded by `lock`; `problems` is appended to without it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.thread: threading.Thread | None = None
        self.stop = False
        # Requested shards by SHA-256, in order, with functions that read (offset, length) from the origin.
        self.asked: dict[str, tuple[ShardEntry, Callable[[int, int], bytes]]] = {}
        self.rests_until: dict[
            str, float
        ] = {}  # monotonic seconds by SHA-256; infinite for a shard with a wrong hash
        self.paused_until = 0.0
        self.problems: deque[str] = deque(maxlen=100)


class ShardCache:
    """Whole shards on a node's disk, shared by its processes. Safe to pickle and fork."""

    PAUSE_S = 60.0
    """Pause after an error of the cache's disk, such as no space."""
    RETRY_S = 1.0
    """Wait before retrying a shard that failed, has no space or is being copied elsewhere; readers request often."""
    CLOSE_S = 10.0
    """Longest wait of close() for the current chunk, so that a hanging origin does not delay the end of a run."""

    def __init__(
        self, folder: Path, max_bytes: int, *, chunk_bytes: int = 8 << 20, field: str = "data.cache_dir"
    ) -> None:
        """Creates a cache of at most `max_bytes`, filled by reads of `chunk_bytes`, and its folder; `field` is what
        errors call the folder.

        Raises:
            UserError: if the folder cannot be written.
        """
        self.folder, self.max_bytes, self.chunk_bytes = Path(folder), max_bytes, chunk_bytes
        self._processes: dict[int, _Process] = {}
        if (self.folder / MANIFEST).exists():
            raise UserError(f"{field}={folder}: is a data set (it has a {MANIFEST}); give an empty folder")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()  # os.access always succeeds for root
        except (OSError, ValueError) as error:  # ValueError: a zero byte
            why = f"cannot be written ({getattr(error, 'strerror', error)})"
            fix = f"give a writable folder on the node's disk, or leave {field} out"
            raise UserError(f"{field}={folder}: {why}; {fix}") from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_processes": {}}

    def open(self, entry: ShardEntry) -> int | None:
        """Returns a file descriptor of the complete copy, to be closed by the caller, or None. Marks the copy as used.

        The copy had the manifest's SHA-256 when it was written. It is not fsynced, because losing a cache is
        acceptable, so it can have holes after a crash of the machine. Readers check the hash of each picture.
        """
        try:
            handle = os.open(self._tar(entry), os.O_RDONLY)
        except OSError:  # after any error the origin can still be read
            return None
        if os.fstat(handle).st_size == entry.bytes:
            with suppress(OSError):  # a file of another user, or a disk that became read-only
                os.utime(handle)
            return handle
        os.close(handle)
        self.discard(entry)
        return None

    def discard(self, entry: ShardEntry) -> None:
        """Deletes a damaged copy; it may be requested again."""
        with suppress(OSError):
            os.unlink(self._tar(entry))

    def request(self, entry: ShardEntry, fetch: Callable[[int, int], bytes]) -> None:
        """Requests that this process's thread copies a shard; returns at once and raises nothing.

        Ignored if the shard is present, requested already, larger than the cache, known to differ from the manifest or
        tried less than RETRY_S ago, and while the cache is paused.
        """
        if entry.bytes > self.max_bytes or self._is_there(entry):
            return
        mine = self._mine()
        with mine.lock:
            rests_until = max(mine.paused_until, mine.rests_until.get(entry.sha256, 0.0))
            if mine.stop or entry.sha256 in mine.asked or monotonic() < rests_until:
                return
            mine.asked[entry.sha256] = (entry, fetch)
            if mine.thread is None:
                thread = threading.Thread(target=self._serve, args=(mine,), name="shard-cache", daemon=True)
                try:
                    thread.start()
                    mine.thread = thread
                except RuntimeError as error:  # the limit on threads
                    self._pause(mine, str(error))

    def take_problems(self) -> list[str]:
        """Returns this process's problems since the last call, each line once."""
        mine = self._mine()
        with mine.lock:
            return list(dict.fromkeys(mine.problems.popleft() for _ in range(len(mine.problems))))

    def close(self) -> None:
        """Stops this process's thread after its current chunk and drops its requests; a later request restarts it."""
        mine = self._mine()
        with mine.lock:
            mine.asked.clear()
            thread, mine.stop = mine.thread, mine.thread is not None
        if thread is not None:
            thread.join(self.CLOSE_S)

    def _mine(self) -> _Process:
        # By pid: a forked child has no threads, and a lock held at the time of the fork stays locked in it.
        # setdefault is atomic, so two threads get the same object.
        return self._processes.get(os.getpid()) or self._processes.setdefault(os.getpid(), _Process())

    def _tar(self, entry: ShardEntry) -> Path:
        return self.folder / f"{entry.sha256}.tar"

    def _is_there(self, entry: ShardEntry) -> bool:
        with suppress(OSError):
            return os.stat(self._tar(entry)).st_size == entry.bytes
        return False

    def _pause(self, mine: _Process, reason: str) -> None:
        mine.problems.append(f"cache {self.folder}: {reason}; paused for {self.PAUSE_S:g} s")
        with mine.lock:
            mine.paused_until = monotonic() + self.PAUSE_S
            mine.asked.clear()

    def _serve(self, mine: _Process) -> None:
        """Runs in the thread, which ends when no request is left."""
        while True:
            with mine.lock:
                if mine.stop or not mine.asked:
                    mine.thread, mine.stop = None, False
                    return
                entry, fetch = next(iter(mine.asked.values()))
            rest_s = 0.0
            try:
                rest_s = self._copy(mine, entry, fetch)
            except OSError as error:  # on the cache's disk: full, over quota, read-only, broken, gone
                self._pause(mine, error.strerror or repr(error))
            with mine.lock:
                mine.asked.pop(entry.sha256, None)
                mine.rests_until[entry.sha256] = monotonic() + rest_s

    def _copy(self, mine: _Process, entry: ShardEntry, fetch: Callable[[int, int], bytes]) -> float:
        """Copies a shard; returns the seconds until it may be tried again. Raises OSError, but not from `fetch`."""
        part = self._tar(entry).with_suffix(".part")
        handle = self._reserve(entry, part)
        if handle is None:
            return self.RETRY_S
        complete, digest = False, hashlib.sha256()
        try:
            for offset in range(0, entry.bytes, self.chunk_bytes):
                if mine.stop:
                    return 0.0
                length = min(self.chunk_bytes, entry.bytes - offset)
                try:
                    data = fetch(offset, length)[:length]
                except Exception as error:  # remote file systems raise other types than OSError
                    mine.problems.append(
                        f"shard {entry.name}: {str(error) or repr(error)}; it was not cached"
                    )
                    return self.RETRY_S
                digest.update(data)
                while data:  # a write to a nearly full disk may be short
                    data = data[os.write(handle, data) :]
            complete = digest.hexdigest() == entry.sha256
            if complete:
                return 0.0
            why = "its copy has another SHA-256 than the manifest; it was not cached"
            mine.problems.append(f"shard {entry.name}: {why}")
            return math.inf
        finally:
            self._finish(handle, part, self._tar(entry) if complete else None)

    def _reserve(self, entry: ShardEntry, part: Path) -> int | None:
        """Creates a locked part of full size; None if the shard is present, being copied elsewhere, or has no space."""
        with self._locked():
            if self._is_there(entry) or _living_bytes(part) or not self._make_room(entry.bytes):
                return None
            part.touch(exist_ok=False)  # not flocked yet: if a line below fails, the part counts as abandoned
            os.truncate(part, entry.bytes)
            handle = os.open(part, os.O_WRONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            return handle

    def _make_room(self, needed: int) -> bool:
        """Deletes abandoned parts and, if `needed` bytes can fit, the least recently used complete shards."""
        taken = sum(_living_bytes(part) for part in self._own(".part"))
        if taken + needed > self.max_bytes:
            return False
        tars: list[tuple[int, int, Path]] = []  # modification time in ns, bytes, path
        for tar in self._own(".tar"):
            with suppress(FileNotFoundError):  # open() deletes a truncated one without the lock
                tars.append((tar.stat().st_mtime_ns, tar.stat().st_size, tar))
        taken += sum(size for _, size, _ in tars)
        for _, size, tar in sorted(tars):
            if taken + needed > self.max_bytes:
                tar.unlink(
                    missing_ok=True
                )  # processes that have it open can still read: POSIX keeps its bytes
                taken -= size
        return True

    def _own(self, suffix: str) -> list[Path]:
        """Lists the cache's own files; other files in the folder are left alone."""
        paths = self.folder.glob(f"*{suffix}")
        return [path for path in paths if _SHA256.fullmatch(path.name.removesuffix(suffix))]

    def _finish(self, handle: int, part: Path, tar: Path | None) -> None:
        """Gives a part its final name, or deletes it, and unlocks it."""
        try:
            with self._locked(), suppress(FileNotFoundError):
                # If ours was deleted, another process may have created a part with the same name.
                if os.path.samestat(os.stat(part), os.fstat(handle)):
                    part.unlink() if tar is None else part.replace(tar)
        finally:
            _unlock(handle)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self.folder / "lock", os.O_RDONLY | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            _unlock(handle)


def _living_bytes(part: Path) -> int:
    """Returns the size of a part that a living process writes; 0 if there is none. Deletes an abandoned part."""
    try:
        handle = os.open(part, os.O_RDONLY)
    except FileNotFoundError:
        return 0
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        part.unlink(missing_ok=True)
        return 0
    except BlockingIOError:
        return os.fstat(handle).st_size
    finally:
        os.close(handle)


def _unlock(handle: int) -> None:
    # Closing is not enough: a child forked in between has the descriptor too and would keep the lock.
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)
