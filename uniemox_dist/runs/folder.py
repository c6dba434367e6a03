"""The folder of a run: where everything lies, the lock, and the two files that tell its story line by line.

Losing a line of metrics must never end a run: a full disk there is reported once and training goes on.
"""

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

from uniemox_dist.core.errors import UserError
from uniemox_dist.core.logs import report_once, stop_logging
from uniemox_dist.runs.events import Event

LOCK_TRIES, LOCK_PAUSE_S = 5, 0.1
"""A look at the lock holds it for a moment, which must not keep a run from starting."""


@dataclass(frozen=True)
class Lock:
    """What a look at a run's lock tells."""

    held: bool | None = None
    """Whether a process trains there; None where that cannot be told."""
    holder: str = ""
    """The last process that took it, as `HOST pid PID`."""
    since: float | None = None
    """When it was taken, in seconds since 1970."""


class RunFolder:
    """Paths of a run, and appending to its event and metric files."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.logs = self.path / "logs"
        self.samples = self.path / "samples"
        self.report = self.path / "report.html"
        self.job = self.path / "job.json"
        self.bad_nodes = self.path / "nodes.jsonl"
        self._lock: TextIO | None = None
        self._made: list[Path] = []

    def create(self) -> None:
        """Makes the folders.

        Raises:
            UserError: if they cannot be made.
        """
        for folder in (*reversed(self.path.parents), self.path, self.checkpoints, self.logs, self.samples):
            try:
                if not folder.is_dir():
                    folder.mkdir(exist_ok=True)
                    self._made.append(folder)
            except OSError as error:
                raise UserError(
                    f"run.dir/run.name={self.path}: {folder} cannot be made ({error.strerror}); give another run.dir"
                ) from None

    def discard_unused(self) -> None:
        """Deletes the folders that `create` has made, with what `lock` and `start_logging` put into them, where nothing
        has happened yet: there was a mistake to mend first. What was there before, and what others put there, stays."""
        if self.path not in self._made or self.events.exists():
            return
        stop_logging(self.logs)
        with suppress(OSError):
            for path in (*self.logs.glob("rank*.log"), self.path / "lock"):
                path.unlink(missing_ok=True)
            for folder in reversed(self._made):
                folder.rmdir()  # fails where it is not empty

    def lock(self) -> None:
        """Takes the run for this process; the kernel frees it when the process ends, however it ends.

        Raises:
            UserError: if another process is training here, or the file cannot be opened.
        """
        path, where = self.path / "lock", f"run.dir/run.name={self.path}"
        for left in reversed(range(LOCK_TRIES)):
            try:
                file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (held while the process lives)
            except OSError as error:
                fix = "give a run.dir that can be written"
                raise UserError(f"{where}: {path} cannot be opened ({error.strerror}); {fix}") from None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                holder = file.read(200).strip() or "another process"
                file.close()
            else:
                if _is_at(file, path):
                    self._lock = file
                    break
                file.close()  # deleted while this process waited: a lock that nobody else would see
                holder = "another process"
            if not left:
                raise UserError(
                    f"{where}: {holder} is training here; wait, stop it, or give another run.name"
                )
            time.sleep(LOCK_PAUSE_S)
        with suppress(OSError):  # who holds it is for people; the lock is the kernel's
            file.truncate(0)
            file.write(f"{socket.gethostname()} pid {os.getpid()}\n")
            file.flush()

    def unlock(self) -> None:
        """Gives the run back, for a process that lives on."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def look_at_lock(self) -> Lock:
        """Whether a process holds the run's lock, without waiting and without an error."""
        path = self.path / "lock"
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                holder, since = file.read(200).strip(), os.fstat(file.fileno()).st_mtime
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError as error:
                    # Anything else means that this file system has no such locks.
                    held = True if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
                    return Lock(held, holder, since)
                return Lock(False, holder, since)
        except OSError:
            return Lock()

    def write(self, event: Event) -> None:
        """Appends an event to events.jsonl, with the time."""
        append_line(self.events, {"time": round(time.time(), 3), **event.line()})

    def metric(self, line: dict[str, Any]) -> None:
        """Appends one line of metrics."""
        append_line(self.metrics, line)


def read_lines(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The lines of a .jsonl file, or of its last bytes; what a crash cut or a writer has not finished is left out."""
    try:
        with open(path, "rb") as file:
            if last_bytes is not None:
                file.seek(max(0, file.seek(0, os.SEEK_END) - last_bytes))
            data = file.read()
    except FileNotFoundError:
        return []
    lines = []
    for text in data.decode("utf-8", errors="replace").split("\n"):  # texts may hold other line ends
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Appends a line to a .jsonl file; a disk that is full costs the line and no more."""
    try:
        with open(path, "a+b") as file:
            text = json.dumps(line, ensure_ascii=False).encode() + b"\n"
            if file.tell() and _torn(file):  # by a crash or a full disk: it must not take this line with it
                text = b"\n" + text
            file.write(text)
    except OSError as error:
        report_once(path, error)


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False


def _torn(file: IO[bytes]) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"
