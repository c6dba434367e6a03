"""Whole shards on a node's own disk, brought in behind the reads of ranges and shared by its processes.

<folder>/lock            node-wide flock: files are made, renamed and evicted under it
<folder>/<sha256>.part   being brought in: of full size, flocked by its writer; without a flock its writer was killed
<folder>/<sha256>.tar    complete; its modification time is when it was last opened
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

from shards.format.manifest import MANIFEST, ShardEntry
from uniemox_dist.core.errors import UserError

_SHA256 = re.compile(r"[0-9a-f]{64}")


class _Process:
    """What one process has asked for, guarded by `lock`; problems are added without it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.thread: threading.Thread | None = None
        self.stop = False
        # By SHA-256, in order, the first being brought in: shards, and what reads (offset, length) of their origin.
        self.asked: dict[str, tuple[ShardEntry, Callable[[int, int], bytes]]] = {}
        self.rests_until: dict[str, float] = {}  # monotonic seconds, by SHA-256; infinite for a wrong shard
        self.paused_until = 0.0
        self.problems: deque[str] = deque(maxlen=100)


class ShardCache:
    """Whole shards on a node's own disk, shared by its processes. May be pickled and forked."""

    PAUSE_S = 60.0
    """Seconds without new shards after the cache's disk was full or failed."""
    RETRY_S = 1.0
    """Seconds until a shard is tried again that failed, has no room or is brought in elsewhere: readers ask often."""
    CLOSE_S = 10.0
    """Longest wait of close() for the current chunk: an origin that hangs must not hold up the end of a run."""

    def __init__(self, folder: Path, max_bytes: int, *, chunk_bytes: int = 8 << 20) -> None:
        """A cache of at most `max_bytes`, filled by reads of `chunk_bytes`; the folder is created.

        Raises:
            UserError: if the folder cannot be written.
        """
        self.folder, self.max_bytes, self.chunk_bytes = Path(folder), max_bytes, chunk_bytes
        self._processes: dict[int, _Process] = {}
        if (self.folder / MANIFEST).exists():
            raise UserError(
                f"data.cache_dir={folder}: is a data set itself (it has a {MANIFEST}); name an empty folder"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()  # os.access would grant root everything
        except OSError as error:
            why = f"cannot be written ({error.strerror})"
            fix = "name a folder on the node's own disk that you may write, or leave data.cache_dir out"
            raise UserError(f"data.cache_dir={folder}: {why}; {fix}") from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_processes": {}}

    def open(self, entry: ShardEntry) -> int | None:
        """A file descriptor of the complete copy, which the caller closes, or None. Marks the copy as used.

        The copy had the manifest's SHA-256 when it was written, but it is not fsynced, since a cache may be lost:
        after a crash of the machine it can have holes. So readers still check the hash of each picture.
        """
        try:
            handle = os.open(self._tar(entry), os.O_RDONLY)
        except OSError:  # whatever the cache's disk has, the origin can be read
            return None
        if os.fstat(handle).st_size == entry.bytes:
            with suppress(OSError):  # another user's file, or a disk that became read-only
                os.utime(handle)
            return handle
        os.close(handle)
        self.discard(entry)
        return None

    def discard(self, entry: ShardEntry) -> None:
        """Deletes a copy whose content turned out to be damaged; it may be asked for again."""
        with suppress(OSError):
            os.unlink(self._tar(entry))

    def request(self, entry: ShardEntry, fetch: Callable[[int, int], bytes]) -> None:
        """Asks that a shard be brought in by this process's thread, in order; returns at once and raises nothing.

        Nothing happens when the shard is there, asked for already, larger than the bound, known to differ from
        the manifest or tried less than RETRY_S ago, and while the cache is paused.
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
                except RuntimeError as error:  # the user's limit of threads
                    self._pause(mine, str(error))

    def take_problems(self) -> list[str]:
        """What went wrong in this process since the last call, each line once."""
        mine = self._mine()
        with mine.lock:
            return list(dict.fromkeys(mine.problems.popleft() for _ in range(len(mine.problems))))

    def close(self) -> None:
        """Ends this process's thread after its current chunk and forgets what waits; later requests start anew."""
        mine = self._mine()
        with mine.lock:
            mine.asked.clear()
            thread, mine.stop = mine.thread, mine.thread is not None
        if thread is not None:
            thread.join(self.CLOSE_S)

    def _mine(self) -> _Process:
        # By process id: a forked child has no threads, and a lock that was held at the fork stays held there.
        # setdefault is atomic, so that two threads get the same object.
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
        """The thread: it lives while something is asked for."""
        while True:
            with mine.lock:
                if mine.stop or not mine.asked:
                    mine.thread, mine.stop = None, False
                    return
                entry, fetch = next(iter(mine.asked.values()))
            rest_s = 0.0
            try:
                rest_s = self._bring(mine, entry, fetch)
            except OSError as error:  # of the cache's own files: full, over quota, read-only, broken, gone
                self._pause(mine, error.strerror or repr(error))
            with mine.lock:
                mine.asked.pop(entry.sha256, None)
                mine.rests_until[entry.sha256] = monotonic() + rest_s

    def _bring(self, mine: _Process, entry: ShardEntry, fetch: Callable[[int, int], bytes]) -> float:
        """Brings a shard in; returns the seconds for which it rests. Raises OSError, but not that of `fetch`."""
        part = self._tar(entry).with_suffix(".part")
        handle = self._reserve(entry, part)
        if handle is None:
            return self.RETRY_S
        whole, digest = False, hashlib.sha256()
        try:
            for offset in range(0, entry.bytes, self.chunk_bytes):
                if mine.stop:
                    return 0.0
                length = min(self.chunk_bytes, entry.bytes - offset)
                try:
                    data = fetch(offset, length)[:length]
                except Exception as error:  # not all that remote file systems raise is an OSError
                    mine.problems.append(
                        f"shard {entry.name}: {str(error) or repr(error)}; it was not cached"
                    )
                    return self.RETRY_S
                digest.update(data)
                while data:  # the write before a full disk's error is a short one
                    data = data[os.write(handle, data) :]
            whole = digest.hexdigest() == entry.sha256
            if whole:
                return 0.0
            why = "its copy has another SHA-256 than the manifest; it was not cached"
            mine.problems.append(f"shard {entry.name}: {why}")
            return math.inf
        finally:
            self._settle(handle, part, self._tar(entry) if whole else None)

    def _reserve(self, entry: ShardEntry, part: Path) -> int | None:
        """A new, locked part of full size; None if the shard is there or being brought in, or has no room."""
        with self._locked():
            if self._is_there(entry) or _living_bytes(part) or not self._make_room(entry.bytes):
                return None
            part.touch(exist_ok=False)  # without a flock yet: should a line fail, what is left counts as dead
            os.truncate(part, entry.bytes)
            handle = os.open(part, os.O_WRONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            return handle

    def _make_room(self, needed: int) -> bool:
        """Deletes dead parts and, if `needed` bytes fit then, the complete shards that were used longest ago."""
        taken = sum(_living_bytes(part) for part in self._own(".part"))
        if taken + needed > self.max_bytes:
            return False
        tars: list[tuple[int, int, Path]] = []  # modification time in ns, bytes, path
        for tar in self._own(".tar"):
            with suppress(FileNotFoundError):  # open() deletes a cut one without the lock
                tars.append((tar.stat().st_mtime_ns, tar.stat().st_size, tar))
        taken += sum(size for _, size, _ in tars)
        for _, size, tar in sorted(tars):
            if taken + needed > self.max_bytes:
                tar.unlink(missing_ok=True)  # who has it open reads on: POSIX keeps its bytes until then
                taken -= size
        return True

    def _own(self, suffix: str) -> list[Path]:
        """The cache's own files: whatever else lies in the folder is somebody's, and stays."""
        found = self.folder.glob(f"*{suffix}")
        return [path for path in found if _SHA256.fullmatch(path.name.removesuffix(suffix))]

    def _settle(self, handle: int, part: Path, tar: Path | None) -> None:
        """Gives a part its final name, or deletes it, and lets go of it."""
        try:
            with self._locked(), suppress(FileNotFoundError):
                # Had somebody deleted ours, another process may have begun one of the same name.
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
    """Size of a part that a living process writes; 0 if there is none, or if it was left behind and is now deleted."""
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
    # Said, not left to closing: a child that was forked meanwhile has the descriptor too, and would hold the lock on.
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)
