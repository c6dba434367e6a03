"""A submission's own folder, RUN/jobs/0001, 0002, …: the resolved configuration, the script, and what Slurm answered.

All of it is made before sbatch is called; what was made is taken away again if the job is refused.
"""

import fcntl
import getpass
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

from uniemox_dist.config.load import dump_yaml
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import read_json, write_json, write_text
from uniemox_dist.runs.folder import RunFolder

FORMAT, FORMAT_VERSION = "uniemox-submission", 1
SUBMISSION = "submission.json"


def next_folder(above: Path, prefix: str = "") -> Path:
    """The first free of the names 0001, 0002, … in a folder."""
    return next(path for n in count(1) if not (path := above / f"{prefix}{n:04d}").exists())


@contextmanager
def new_folder(above: Path, prefix: str = "") -> Iterator[Path]:
    """Makes that folder, and takes it away again if what follows fails."""
    with ExitStack() as undo:
        for folder in reversed([folder for folder in (above, *above.parents) if not folder.exists()]):
            undo.callback(_remove_empty, folder)
        try:
            above.mkdir(parents=True, exist_ok=True)
            while True:
                path = next_folder(above, prefix)
                with suppress(FileExistsError):  # another submission at the same moment
                    path.mkdir()
                    break
        except OSError as error:
            raise UserError(
                f"{above} cannot be made ({error.strerror}); give a run.dir that can be written"
            ) from None
        undo.callback(shutil.rmtree, path, ignore_errors=True)
        yield path
        undo.pop_all()


@contextmanager
def one_at_a_time(above: Path) -> Iterator[None]:
    """Waits until no other submission goes on for runs in that folder: of two at the same moment, the second is to see
    what the first has submitted. Where files cannot be locked, the run's own lock has to do."""
    made = [folder for folder in (above, *above.parents) if not folder.exists()]
    with suppress(OSError):  # what follows says it
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
        with suppress(FileNotFoundError):  # the one before has just taken it away
            if os.fstat(lock).st_ino == os.stat(path).st_ino:
                return lock
        os.close(lock)


@contextmanager
def delay_interrupts() -> Iterator[list[int]]:
    """Lets Ctrl-C and the like wait while a job is submitted and written down; its value are the signals that came."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {kind: signal.signal(kind, lambda number, _: came.append(number)) for kind in kinds}
    try:
        yield came
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextmanager
def run_folder(run: Path, *, aside: bool) -> Iterator[Path | None]:
    """Makes a run's folder, and takes what is new away again if what follows fails. With `aside` an old folder gets
    another name first, which is the value, and its own name back if what follows fails.

    Raises:
        UserError: if it cannot be made.
    """
    old: Path | None = None
    if aside and run.exists():
        old = run.with_name(f"{run.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
        if old.exists():
            raise UserError(f"--force-new: {old} is there already; try again in a second")
        os.rename(run, old)
    was_there = run.exists()
    above = [folder for folder in run.parents if not folder.exists()]
    try:
        RunFolder(run).create()
        yield old
    except BaseException:
        if not was_there:  # nobody else knows of it yet
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
    """Writes submission.json: from then on the submission counts."""
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "job_ids": list(job_ids)}
    write_json(folder / SUBMISSION, {**head, "time": round(time.time(), 3), "user": _user(), **facts})


def job_ids(run: Path) -> list[int]:
    """All jobs that were ever submitted for a run, or have it now, in rising order."""
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


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
