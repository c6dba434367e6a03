"""Events that the launcher or a Slurm job writes between the attempts of a run."""

from dataclasses import dataclass

from uniemox_dist.core.formatting import counted, short
from uniemox_dist.runs.events.base import Event, Facts, Lane


@dataclass(frozen=True, kw_only=True)
class Restart(Event):
    """The launcher starts the ranks again after a fault."""

    kind = "restart"
    tone = "wait"
    lane = Lane("restarts", ">", "restart", row=80)
    between = True
    attempt: int
    """Number of the new attempt."""
    left: int
    """Further restarts without a new checkpoint that `run.max_restarts` allows."""
    code: int
    """Exit code of the last attempt."""
    step: int | None
    """Step of the newest checkpoint."""
    reason: str
    pause_s: float

    @staticmethod
    def describe(facts: Facts) -> str:
        counts = [
            facts.number("attempt", "", before="attempt "),
            facts.number("left", "", after=" left without progress"),
        ]
        about = ", ".join(part for part in counts if part)
        code = facts.number("code", "", before=" after exit code ")
        step = facts.number("step", before=", from step ")
        pause = facts.number("pause_s", ".3g", before=" in ", after=" s") if facts("pause_s") else ""
        reason = facts.text("reason", before=": ")
        return (
            f"the launcher restarts the ranks{pause}{code}{step}" + (f" ({about})" if about else "") + reason
        )


@dataclass(frozen=True, kw_only=True)
class Requeue(Event):
    """A Slurm job saved and goes back into the queue."""

    kind = "requeue"
    tone = "wait"
    lane = Lane("requeues", ">", "requeue", row=90)
    between = True
    step: int | None
    job_id: int
    by: str
    """slurm, or job if the job requeued itself."""

    @staticmethod
    def describe(facts: Facts) -> str:
        job = facts.number("job_id", "", before="job ") or "the job"
        how = " by Slurm" if facts("by") == "slurm" else ""
        step = facts.number("step", before=", continues from step ")
        return f"{job} was requeued{how}{step}" + facts.text("reason", before=": ")


@dataclass(frozen=True, kw_only=True)
class Resubmit(Event):
    """A Slurm job submits another one that leaves out its bad nodes."""

    kind = "resubmit"
    tone = "wait"
    lane = Requeue.lane
    between = True
    job_id: int
    nodes: list[str]
    """The excluded nodes."""
    reason: str

    @staticmethod
    def describe(facts: Facts) -> str:
        job = facts.number("job_id", "", before="job ") or "the job"
        nodes, reason = facts.text("nodes", before=" without "), facts.text("reason", before=": ")
        return f"{job} was submitted again{nodes}{reason}"


@dataclass(frozen=True, kw_only=True)
class JobStart(Event):
    """A Slurm job begins its first attempt in an allocation."""

    kind = "job"
    lane = Lane("jobs start", "|", "requeue", row=100)
    between = True
    job_id: int
    restarts: int
    """How often Slurm has requeued the job."""
    nodes: list[str]
    ranks: int
    idle: int
    """Tasks of the allocation that no rank uses."""
    after: int | None = None
    """The job that submitted this one in its place."""

    @staticmethod
    def describe(facts: Facts) -> str:
        nodes, ranks, idle, restarts = facts("nodes"), facts("ranks"), facts("idle"), facts("restarts")
        parts = [
            counted(ranks, "rank") if isinstance(ranks, int) else "",
            f"on {counted(len(nodes), 'node')} ({short(nodes)})" if isinstance(nodes, list) else "",
        ]
        about = " ".join(part for part in parts if part)
        times = restarts if isinstance(restarts, int) and restarts > 0 else 0
        again = f", requeued {'once' if times == 1 else f'{times} times'}" if times else ""
        instead = facts.number("after", "", before=", in place of job ")
        left = f"; {counted(idle, 'task')} idle" if isinstance(idle, int) and idle else ""
        job = facts.number("job_id", "", before="Slurm job ") or "a Slurm job"
        return f"{job}{again}{instead}" + (f": {about}" if about else "") + left
