"""The folder of a run: its paths, its lock, and the files that grow by lines.

On a full disk, lines of events and metrics are lost, but the run continues; the loss is reported once.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import describe_missing_folder
from uniemox_dist.core.formatting import is_number
from uniemox_dist.core.logs import report_once, stop_logging
from uniemox_dist.runs.events.base import Event

LOCK_TRIES, LOCK_PAUSE_S = 5, 0.1
"""Number of attempts of `lock`, and the pause between them. A process that tests the lock holds it for a moment, which
must not prevent a run from starting."""
BAD_NODE_S = 24 * 3600.0
"""Seconds for which submissions exclude a node whose preflight failed; later it may be repaired."""


@dataclass(frozen=True)
class Lock:
    """The state of a run's lock."""

    held: bool | None = None
    """Whether a process trains there; None if the file system has no locks."""
    holder: str = ""
    """The process that took it last, as `HOST pid PID`."""
    since: float | None = None
    """When it was taken, in seconds since 1970."""


class RunFolder:
    """Paths of a run, its lock, and appending to its files of lines."""

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
                    f"run.dir/run.name={self.path}: {folder} cannot be created ({error.strerror}); give another run.dir"
                ) from None

    def discard_unused(self) -> None:
        """Deletes the folders that `create` made, with the files of `lock` and `start_logging`, if there are no events:
        the user has a mistake to fix first. Older files, and files of others, stay."""
        if self.path not in self._made or self.events.exists():
            return
        stop_logging(self.logs)
        with suppress(OSError):
            for path in (*self.logs.glob("rank*.log"), self.path / "lock"):
                path.unlink(missing_ok=True)
            for folder in reversed(self._made):
                folder.rmdir()  # fails where it is not empty

    def lock(self) -> None:
        """Takes the run for this process; the kernel releases it when the process ends in any way.

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
                file.close()  # the file was deleted meanwhile, so other processes would not see this lock
                holder = "another process"
            if not left:
                raise UserError(
                    f"{where}: {holder} is training here; wait, stop it, or give another run.name"
                )
            time.sleep(LOCK_PAUSE_S)
        with suppress(OSError):  # only for people to read; the kernel holds the lock
            file.truncate(0)
            file.write(f"{socket.gethostname()} pid {os.getpid()}\n")
            file.flush()

    def unlock(self) -> None:
        """Releases the run, for a process that continues."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def check_lock(self) -> Lock:
        """Tests whether a process holds the run's lock; never waits, never raises."""
        path = self.path / "lock"
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                holder, since = file.read(200).strip(), os.fstat(file.fileno()).st_mtime
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError as error:
                    # Any other error means that the file system has no locks.
                    held = True if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
                    return Lock(held, holder, since)
                return Lock(False, holder, since)
        except OSError:
            return Lock()

    def write(self, event: Event) -> None:
        """Appends an event to events.jsonl, with the time."""
        append_line(self.events, {"time": round(time.time(), 3), **event.to_line()})

    def write_metric(self, line: dict[str, Any]) -> None:
        """Appends one line of metrics."""
        append_line(self.metrics, line)


def read_lines(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The lines of a .jsonl file, or of its last bytes. Lines that are cut or unfinished are skipped."""
    try:
        with open(path, "rb") as file:
            if last_bytes is not None:
                file.seek(max(0, file.seek(0, os.SEEK_END) - last_bytes))
            data = file.read()
    except FileNotFoundError:
        return []
    lines = []
    for text in data.decode("utf-8", errors="replace").split("\n"):  # strings may have other line breaks
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Appends a line to a .jsonl file. On a full disk only this line is lost."""
    try:
        with open(path, "a+b") as file:
            text = json.dumps(line, ensure_ascii=False).encode() + b"\n"
            if file.tell() and _torn(
                file
            ):  # the last line is incomplete; a new line must not be appended to it
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


def open_run(path: Path) -> RunFolder:
    """The folder of an existing run.

    Raises:
        UserError: if the path is not a run folder.
    """
    if is_run(path):
        return RunFolder(path)
    if not path.is_dir():
        problem = describe_missing_folder(path)
        raise UserError(f"RUN={path}: {problem}; give run.dir/run.name, such as demo/runs/demo")
    inside = [run.path for run in find_runs(path)]
    hint = f"did you mean {inside[0]}?" if inside else "give run.dir/run.name, such as demo/runs/demo"
    raise UserError(
        f"RUN={path}: holds no config.yaml and no events.jsonl, so it is not a run folder; {hint}"
    )


def is_run(path: Path) -> bool:
    """Whether a folder is a run's: it has a configuration or events, or was submitted and waits in a queue."""
    written = (path / "config.yaml").is_file() or (path / "events.jsonl").is_file()
    return written or next(path.glob("jobs/[0-9]*/submission.json"), None) is not None


def find_runs(path: Path, depth: int = 3) -> list[RunFolder]:
    """The runs in a folder and in the folders inside it, down to a depth, by name. Runs inside a run are left out."""
    found: list[RunFolder] = []
    try:
        folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return []
    for folder in folders:
        if is_run(folder):
            found.append(RunFolder(folder))
        elif depth > 1:
            found += find_runs(folder, depth - 1)
    return found


def report_bad_nodes(folder: RunFolder, findings: Mapping[str, str], job_id: int | None) -> None:
    """Writes to nodes.jsonl which nodes failed the preflight of a job, and why."""
    for node, finding in findings.items():
        line = {"time": round(time.time(), 3), "node": node, "job_id": job_id, "finding": finding}
        append_line(folder.bad_nodes, line)


def read_bad_nodes(folder: RunFolder) -> list[dict[str, Any]]:
    """The valid lines of nodes.jsonl, oldest first."""
    lines = read_lines(folder.bad_nodes)
    return [line for line in lines if isinstance(line.get("node"), str) and is_number(line.get("time"))]


def nodes_to_exclude(folder: RunFolder, now: float) -> list[str]:
    """The nodes that the next submission should leave out, each once."""
    lines = read_bad_nodes(folder)
    return list(dict.fromkeys(line["node"] for line in lines if now - line["time"] < BAD_NODE_S))
