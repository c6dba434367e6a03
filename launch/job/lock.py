"""RUN/job.json: the lock of a run by a Slurm job. A new job takes over the lock of a job that Slurm no longer knows.

The file is created by a link, which is atomic on every shared file system, unlike file locks.
"""

import getpass
import json
import os
import socket
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import share
from uniemox_dist.runs.folder import RunFolder
from uniemox_dist.scheduler.commands import LiveJobs

TRIES, PAUSE_S = 50, 0.1
CLAIM_S = 60.0
"""Seconds after which an unfinished takeover no longer counts."""


@dataclass(frozen=True)
class JobLock:
    """The contents of job.json."""

    job_id: int
    restarts: int
    """Requeues of that job before it locked the run."""
    nodes: tuple[str, ...]
    host: str
    user: str
    time: float
    """Start of the present attempt, in seconds since 1970."""
    began_step: int = 0
    """Step of the newest complete checkpoint at that time; 0 without one."""
    max_restarts: int = 2
    """The run's run.max_restarts."""
    cluster: str = ""
    """Slurm's name of the cluster; job numbers are unique only within it."""

    @classmethod
    def for_this_process(
        cls, job_id: int, restarts: int, nodes: tuple[str, ...], *, began_step: int = 0, max_restarts: int = 2
    ) -> "JobLock":
        """The lock of this process's job, with the present time."""
        now, cluster = round(time.time(), 3), os.environ.get("SLURM_CLUSTER_NAME", "")
        return cls(
            job_id, restarts, nodes, socket.gethostname(), find_user(), now, began_step, max_restarts, cluster
        )


def read(path: Path) -> JobLock | None:
    """Reads a lock; None if the file is missing or invalid."""
    try:
        facts: Any = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(JobLock)}
        facts["nodes"] = tuple(facts["nodes"])
        lock = JobLock(**{key: value for key, value in facts.items() if key in known})
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
    numbers = (lock.job_id, lock.restarts, lock.began_step, lock.max_restarts)
    sane = all(isinstance(number, int) for number in numbers) and isinstance(lock.time, int | float)
    return lock if sane else None


def acquire(folder: RunFolder, own: JobLock, live: LiveJobs) -> str | None:
    """Locks the run for this job; returns a remark if the lock was taken over from another job.

    Raises:
        UserError: if another job that is queued, running or ending has the lock.
    """
    path = folder.job
    for _ in range(TRIES):
        if _link(path, own):
            return None
        held = read(path)
        if held is None and not path.exists():
            continue
        remark = None
        if held is not None and (held.job_id != own.job_id or _is_elsewhere(held, own)):
            remark = _refuse_or_take_over(folder, held, own, live)
        if _replace(path, held, own):
            return remark
        time.sleep(PAUSE_S)
    raise UserError(f"{path}: other jobs keep locking it; check squeue, and keep only one job of this run")


def update(folder: RunFolder, own: JobLock) -> None:
    """Rewrites the lock of this job."""
    with suppress(OSError):
        temporary = _write_temporary(folder.job, own)
        os.replace(temporary, folder.job)


def release(folder: RunFolder, job_id: int) -> None:
    """Removes the lock, if it is this job's."""
    held = read(folder.job)
    if held is not None and held.job_id == job_id:
        folder.job.unlink(missing_ok=True)


def _refuse_or_take_over(folder: RunFolder, held: JobLock, own: JobLock, live: LiveJobs) -> str:
    state = live.states.get(held.job_id)
    if not live.knows(own.job_id):
        # Without squeue the other job's state is unknown, but the kernel knows whether a process holds the run.
        if folder.check_lock().held is not False:
            raise UserError(
                f"run.dir/run.name={folder.path}: job {held.job_id} holds the run, a process may be training, and "
                f"squeue does not answer; wait, or give another run.name"
            )
        return f"took the run over from job {held.job_id}: no process trains, and squeue does not answer"
    if _is_elsewhere(held, own) or (state is None and held.user != own.user):
        # squeue shows only this cluster's jobs, and on some sites only the user's own.
        if folder.check_lock().held:
            whose = f"{held.user} on {held.cluster or held.host}"
            raise UserError(
                f"run.dir/run.name={folder.path}: job {held.job_id} of {whose} is training this run; wait for it, end "
                f"it, or give another run.name"
            )
        state = None
    if state is None:
        return f"took the run over from job {held.job_id}, which no longer runs"
    raise UserError(
        f"run.dir/run.name={folder.path}: job {held.job_id} of {held.user} holds the run ({state.lower()}); wait for "
        f"it, end it with `scancel {held.job_id}`, or give another run.name"
    )


def _is_elsewhere(held: JobLock, own: JobLock) -> bool:
    """Whether the lock belongs to a job of another cluster."""
    return bool(held.cluster and own.cluster) and held.cluster != own.cluster


def _link(path: Path, own: JobLock) -> bool:
    """Creates the file; False if it exists."""
    temporary = _write_temporary(path, own)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(
            f"{path} cannot be made ({error.strerror}); give a run.dir that can be written"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _replace(path: Path, seen: JobLock | None, own: JobLock) -> bool:
    """Replaces a lock by this job's, if the lock has not changed since it was read. Of several jobs that try, the one
    that creates the claim file succeeds."""
    claim = path.with_name(f".{path.name}.taken_over")
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        with suppress(OSError):
            if time.time() - claim.stat().st_mtime > CLAIM_S:  # its job died
                claim.unlink()
        return False
    try:
        if read(path) != seen:
            return False
        os.replace(_write_temporary(path, own), path)
        return True
    finally:
        claim.unlink(missing_ok=True)


def _write_temporary(path: Path, own: JobLock) -> Path:
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise UserError(
            f"{path} cannot be made ({error.strerror}); give a run.dir that can be written"
        ) from None
    with open(handle, "w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(own), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    share(name)
    return Path(name)


def find_user() -> str:
    """The name of the user who runs this process; the number if there is no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without this user's name
        return str(os.getuid())
