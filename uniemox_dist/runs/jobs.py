"""The Slurm jobs that a run's folder names, with what Slurm reports about them; this module does not call Slurm."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from uniemox_dist.core.files import read_json
from uniemox_dist.core.formatting import cut, duration, is_number
from uniemox_dist.scheduler.commands import JobState
from uniemox_dist.scheduler.states import Phase, find_phase

SUBMISSIONS_READ = 20
"""The newest submissions that are read: a chain of jobs is submitted in advance."""
REASONS = {
    "Resources": "for free nodes",
    "Priority": "behind jobs of higher priority",
    "BeginTime": "for its begin time, which a requeue delays by some minutes",
    "Dependency": "for a job that it depends on",
    "DependencyNeverSatisfied": "for a dependency that can never be met: cancel the job",
    "JobHeldUser": "because its user holds it: run `scontrol release`",
    "JobHeldAdmin": "because an administrator holds it",
    "ReqNodeNotAvail": "for nodes that are down or reserved",
    "Nodes required for job are DOWN": "for nodes that are down, drained or reserved",
    "Licenses": "for licences",
    "Reservation": "for its reservation",
    "PartitionDown": "because its partition is down",
    "PartitionTimeLimit": "forever: its time limit is above the partition's",
    "PartitionNodeLimit": "forever: it asks for more nodes than its partition has",
}
"""Plain text for Slurm's most frequent reasons; others are printed as they are."""


@dataclass(frozen=True)
class Job:
    """A job that a run's folder names."""

    id: int
    hosts: tuple[str, ...] = ()
    """The nodes that the job recorded when it began; empty if it has not begun."""
    began: float | None = None
    """When the job recorded its beginning, in seconds since 1970."""
    state: str | None = None
    """Slurm's state, such as PENDING. Empty if Slurm has forgotten the job; None if Slurm was not asked, or did not
    answer."""
    reason: str = ""
    """Slurm's word for the reason why the job waits."""
    nodes: str = ""
    """The job's nodes in Slurm's short form."""
    start: float | None = None
    """When the job started, or is expected to start, in seconds since 1970."""
    time_left_s: float | None = None
    """Seconds until the time limit."""

    @property
    def name(self) -> str:
        """The job in a sentence, such as `job 17`."""
        return f"job {self.id}"

    @property
    def waits(self) -> bool:
        """Whether the job is in the queue."""
        return bool(self.state) and find_phase(str(self.state)) is Phase.WAITING

    @property
    def runs(self) -> bool:
        """Whether the job holds its nodes."""
        return bool(self.state) and find_phase(str(self.state)) is Phase.RUNNING

    @property
    def ended(self) -> bool:
        """Whether Slurm reported that the job has ended, or has forgotten it."""
        return self.state is not None and not self.waits and not self.runs

    def describe_wait(self, now: float) -> str:
        """A phrase about the reason for which the job waits, and until when."""
        if self.state in ("CONFIGURING", "POWER_UP_NODE"):
            return f"{self.name}: its nodes are being started"
        reason = self.reason.strip("()").partition(",")[0]
        for_what = REASONS.get(reason, cut(f"in the queue ({reason})" if reason else "in the queue", 80))
        if self.state == "RESV_DEL_HOLD":
            for_what = "because its reservation was deleted: run `scontrol release`, or cancel it"
        when = ""
        if self.start is not None and self.start > now:
            when = f"; expected to start in {duration(self.start - now)}"
        return f"{self.name} waits {for_what}{when}"

    def describe_end(self) -> str:
        """A phrase about the end of the job."""
        return f"{self.name} has ended" + (f" ({self.state})" if self.state else "")


def read_jobs(run: Path) -> list[Job]:
    """The jobs that a run's folder names, newest first: the job of job.json and the submitted jobs.

    Damaged files are skipped.
    """
    found: dict[int, Job] = {}
    own = _read(run / "job.json")
    if _is_id(own.get("job_id")):
        nodes = own.get("nodes")
        hosts = tuple(str(node) for node in nodes) if isinstance(nodes, list) else ()
        began = own["time"] if is_number(own.get("time")) else None
        found[own["job_id"]] = Job(own["job_id"], hosts, began)
    for path in _submissions(run / "jobs")[:SUBMISSIONS_READ]:
        ids = _read(path).get("job_ids")
        for number in ids if isinstance(ids, list) else []:
            if _is_id(number):
                found.setdefault(number, Job(number))
    return sorted(found.values(), key=lambda job: -job.id)


def choose_job(jobs: Sequence[Job], answers: Mapping[int, JobState] | None) -> Job | None:
    """The job that decides a run's state: the one that runs, else the first that waits, else the newest.

    Args:
        answers: states by job number; None if Slurm did not answer.
    """
    if answers is None:
        began = [job for job in jobs if job.hosts]
        return next(iter(began or jobs), None)
    updated = [_update(job, answers.get(job.id)) for job in jobs]
    waiting = sorted((job for job in updated if job.waits), key=lambda job: job.id)
    ordered = [*(job for job in updated if job.runs), *waiting, *(job for job in updated if job.ended)]
    return ordered[0] if ordered else None


def _update(job: Job, answer: JobState | None) -> Job:
    """The job with Slurm's answer, whose fields have the same names."""
    return replace(job, state="") if answer is None else replace(job, **vars(answer))


def _submissions(jobs: Path) -> list[Path]:
    """The submission files, newest first."""
    try:
        folders = [path for path in jobs.iterdir() if re.fullmatch(r"\d+", path.name)]
    except OSError:
        return []
    return [path / "submission.json" for path in sorted(folders, key=lambda path: -int(path.name))]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_id(value: Any) -> bool:
    return is_number(value) and isinstance(value, int) and value > 0
