"""The Slurm jobs of a run: which its folder names, and what Slurm's answer about them says. Nothing is asked here."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from uniemox_dist.core.files import read_json
from uniemox_dist.core.formatting import cut, duration, is_number

SUBMISSIONS_READ = 20
"""The newest ones: a chain of jobs that follow each other is queued in advance."""
WAITS = frozenset(["PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"])
RUNS = frozenset(["RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "SUSPENDED", "STOPPED"])
REASONS = {
    "Resources": "for free nodes",
    "Priority": "behind jobs of higher priority",
    "BeginTime": "for its begin time, which a requeue moves by some minutes",
    "Dependency": "for a job that it depends on",
    "DependencyNeverSatisfied": "for a job that can never do what it waits for: cancel it",
    "JobHeldUser": "because its user holds it: `scontrol release` it",
    "JobHeldAdmin": "because the administrators hold it",
    "ReqNodeNotAvail": "for nodes that are down or reserved",
    "Nodes required for job are DOWN": "for nodes that are down, drained or reserved",
    "Licenses": "for licences",
    "Reservation": "for its reservation",
    "PartitionDown": "because its partition is down",
    "PartitionTimeLimit": "for ever: its time limit is above the partition's",
    "PartitionNodeLimit": "for ever: it asks for more nodes than its partition has",
}
"""What people ask about most of Slurm's reasons; others are shown as they are."""


class Answer(Protocol):
    """What Slurm says of a job (uniemox_dist.scheduler.commands.JobState)."""

    @property
    def state(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def nodes(self) -> str: ...
    @property
    def start(self) -> float | None: ...
    @property
    def time_left(self) -> float | None: ...


@dataclass(frozen=True)
class Job:
    """A job that a run's folder names."""

    id: int
    hosts: tuple[str, ...] = ()
    """The nodes that it had when it began, as it wrote itself; empty if it has not begun."""
    began: float | None = None
    """When it began, as it wrote itself."""
    state: str | None = None
    """Slurm's word, such as PENDING; empty: Slurm knows it no more; None: Slurm was not asked, or did not answer."""
    reason: str = ""
    """Why it waits, in Slurm's word."""
    nodes: str = ""
    """The nodes that it has, in Slurm's short form."""
    start: float | None = None
    """When it started, or is expected to, in seconds since 1970."""
    time_left_s: float | None = None
    """Seconds to its time limit."""

    @property
    def name(self) -> str:
        """How it is spoken of."""
        return f"job {self.id}"

    @property
    def waits(self) -> bool:
        """Whether it is in the queue."""
        return self.state in WAITS

    @property
    def runs(self) -> bool:
        """Whether it has nodes."""
        return self.state in RUNS

    @property
    def gone(self) -> bool:
        """Whether Slurm said that it is over."""
        return self.state is not None and not self.waits and not self.runs

    def waiting(self, now: float) -> str:
        """What it waits for, and how long."""
        if self.state == "CONFIGURING":
            return f"{self.name}: its nodes are being started"
        reason = self.reason.strip("()").partition(",")[0]
        for_what = REASONS.get(reason, cut(f"in the queue ({reason})" if reason else "in the queue", 80))
        when = ""
        if self.start is not None and self.start > now:
            when = f"; expected to start in {duration(self.start - now)}"
        return f"{self.name} waits {for_what}{when}"

    def over(self) -> str:
        """How it ended."""
        return f"{self.name} is over" + (f" ({self.state})" if self.state else "")


def jobs_of(run: Path) -> list[Job]:
    """The jobs that a run's folder names, the newest first: the one that wrote job.json, and those of submissions. What
    is damaged names none."""
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


def job_of(jobs: Sequence[Job], answers: Mapping[int, Answer] | None) -> Job | None:
    """The one of a run's jobs that counts: the one that runs, or else the first that waits, or else the newest.

    Args:
        answers: Slurm's, by number; None if it did not answer.
    """
    if answers is None:
        began = [job for job in jobs if job.hosts]
        return next(iter(began or jobs), None)
    told = [_told(job, answers.get(job.id)) for job in jobs]
    waiting = sorted((job for job in told if job.waits), key=lambda job: job.id)
    ordered = [*(job for job in told if job.runs), *waiting, *(job for job in told if job.gone)]
    return ordered[0] if ordered else None


def _told(job: Job, answer: Answer | None) -> Job:
    if answer is None:
        return replace(job, state="")
    return replace(
        job,
        state=answer.state,
        reason=answer.reason,
        nodes=answer.nodes,
        start=answer.start,
        time_left_s=answer.time_left,
    )


def _submissions(jobs: Path) -> list[Path]:
    """Newest first."""
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
