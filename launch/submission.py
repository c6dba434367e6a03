"""Folders of submissions, RUN/jobs/0001, 0002, …: the resolved configuration, the script and the record of the jobs.

Everything is written before sbatch is called, and removed again if the job is refused.
"""

import fcntl
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from launch.job.lock import find_user
from uniemox_dist.config.load import dump_yaml
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import read_json, write_json, write_text
from uniemox_dist.runs.folder import RunFolder

FORMAT, FORMAT_VERSION = "uniemox-submission", 1
SUBMISSION = "submission.json"


def find_next_folder(above: Path, prefix: str = "") -> Path:
    """The first unused path among 0001, 0002, … in a folder."""
    return next(path for n in count(1) if not (path := above / f"{prefix}{n:04d}").exists())


@contextmanager
def create_next_folder(above: Path, prefix: str = "") -> Iterator[Path]:
    """Creates the next folder, and removes it if the block fails."""
    with ExitStack() as undo:
        for folder in reversed([folder for folder in (above, *above.parents) if not folder.exists()]):
            undo.callback(_remove_empty, folder)
        try:
            above.mkdir(parents=True, exist_ok=True)
            while True:
                path = find_next_folder(above, prefix)
                with suppress(FileExistsError):  # another submission took this number
                    path.mkdir()
                    break
        except OSError as error:
            raise UserError(
                f"{above} cannot be made ({error.strerror}); give a run.dir or --jobs that can be written"
            ) from None
        undo.callback(shutil.rmtree, path, ignore_errors=True)
        yield path
        undo.pop_all()


@contextmanager
def lock_submissions(above: Path) -> Iterator[None]:
    """Waits for other submissions of runs in that folder, so that the second of two simultaneous submissions sees the
    jobs of the first. On file systems without locks only RUN/job.json protects the run."""
    made = [folder for folder in (above, *above.parents) if not folder.exists()]
    with suppress(OSError):  # a later step reports it
        above.mkdir(parents=True, exist_ok=True)
    path = above / ".submitting"
    lock = _hold(path)
    try:
        yield
    finally:
        if lock is not None:
            path.unlink(missing_ok=True)
            os.close(lock)
        for folder in made:
            _remove_empty(folder)


def _hold(path: Path) -> int | None:
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            os.close(lock)
            return None
        with suppress(FileNotFoundError):  # the previous submission has just removed it
            if os.fstat(lock).st_ino == os.stat(path).st_ino:
                return lock
        os.close(lock)


@contextmanager
def delay_interrupts() -> Iterator[list[int]]:
    """Delays Ctrl-C and other stop signals while a job is submitted and recorded; yields the list of those received."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {kind: signal.signal(kind, lambda number, _: received.append(number)) for kind in kinds}
    try:
        yield received
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextmanager
def run_folder(run: Path, *, aside: bool) -> Iterator[Path | None]:
    """Creates a run's folder, and removes the new folders if the block fails. With `aside` an existing folder is
    renamed
    first; yields its new path, and renames it back if the block fails.

    Raises:
        UserError: if it cannot be created.
    """
    old: Path | None = None
    if aside and run.exists():
        old = run.with_name(f"{run.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
        if old.exists():
            raise UserError(f"--force-new: {old} exists already; try again in a second")
        os.rename(run, old)
    was_there = run.exists()
    above = [folder for folder in run.parents if not folder.exists()]
    try:
        RunFolder(run).create()
        yield old
    except BaseException:
        if not was_there:  # no other process uses it yet
            shutil.rmtree(run, ignore_errors=True)
            for folder in above:
                _remove_empty(folder)
        if old is not None:
            os.rename(old, run)
        raise


def write_config(folder: Path, config: Config) -> Path:
    """Writes the resolved configuration into a submission's folder."""
    path = folder / "config.yaml"
    write_text(path, dump_yaml(config))
    return path


def record(folder: Path, job_ids: Sequence[int], **facts: Any) -> None:
    """Writes submission.json, which makes the submission valid."""
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "job_ids": list(job_ids)}
    write_json(folder / SUBMISSION, {**head, "time": round(time.time(), 3), "user": find_user(), **facts})


def job_ids(run: Path) -> list[int]:
    """All jobs ever submitted for a run, and the one that has locked it, in ascending order."""
    found: set[int] = set()
    for path in (run / "job.json", *run.glob(f"jobs/[0-9]*/{SUBMISSION}")):
        try:
            facts = read_json(path)
        except (OSError, ValueError):
            continue
        if isinstance(facts, dict):
            listed = facts.get("job_ids")
            numbers = [*(listed if isinstance(listed, list) else []), facts.get("job_id")]
            found |= {n for n in numbers if isinstance(n, int) and not isinstance(n, bool)}
    return sorted(found)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
