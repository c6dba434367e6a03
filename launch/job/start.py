"""The start of an attempt inside a Slurm job: locks the run for the job and chooses the number of ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

from launch.job import lock
from launch.job.attempts import count_attempts
from launch.plan import saving
from launch.plan.ranks import largest_legal
from launch.restarts import find_newest_step
from uniemox_dist.config.load import load_config
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.runs.events.jobs import JobStart
from uniemox_dist.runs.events.training import FaultEvent
from uniemox_dist.runs.folder import RunFolder, read_lines
from uniemox_dist.scheduler.allocation import Allocation
from uniemox_dist.scheduler.commands import LiveJobs


@dataclass(frozen=True)
class StartedAttempt:
    """The facts that the batch script needs to start the ranks."""

    run: Path
    nodes: int
    ranks: int
    ranks_per_node: int
    remarks: list[str] = field(default_factory=list)

    def line(self) -> str:
        """The line that the batch script reads."""
        return f"{self.run}\t{self.nodes}\t{self.ranks}\t{self.ranks_per_node}"


def start_attempt(
    recipe: str, overrides: Sequence[str], live: LiveJobs, allocation: Allocation
) -> StartedAttempt:
    """Locks the run's folder for this job and chooses the number of ranks.

    Raises:
        UserError: for a mistake in the settings, or if another job has locked the run.
        Fault: if run.max_restarts attempts in a row made no progress.
    """
    config = load_config(recipe, overrides)
    nodes, each = largest_legal(config, len(allocation.nodes), allocation.ranks_per_node)
    folder = RunFolder(Path(config.run.dir) / config.run.name)
    remarks = [
        *_describe_idle_parts(allocation, nodes, each),
        *check_times(config, folder, live, allocation, nodes * each),
    ]
    folder.create()
    own = lock.JobLock.for_this_process(
        allocation.job_id,
        allocation.restarts,
        allocation.nodes,
        began_step=find_newest_step(folder) or 0,
        max_restarts=config.run.max_restarts,
    )
    if remark := lock.acquire(folder, own, live):
        remarks.insert(0, remark)
    try:
        _check_attempts_left(config, folder, allocation)
    except Fault:
        lock.release(folder, allocation.job_id)
        raise
    folder.write(
        JobStart(
            job_id=allocation.job_id,
            restarts=allocation.restarts,
            nodes=list(allocation.nodes[:nodes]),
            ranks=nodes * each,
            idle=len(allocation.nodes) * allocation.ranks_per_node - nodes * each,
            after=allocation.after,
        )
    )
    return StartedAttempt(folder.path, nodes, nodes * each, each, remarks)


def _describe_idle_parts(allocation: Allocation, nodes: int, each: int) -> list[str]:
    """Remarks about nodes, tasks and GPUs of the allocation that the run does not use."""
    remarks = []
    if nodes < len(allocation.nodes) or each < allocation.ranks_per_node:
        idle = [f"node {name}" for name in allocation.nodes[nodes:]]
        if each < allocation.ranks_per_node:
            idle.append(
                f"{allocation.ranks_per_node - each} of {allocation.ranks_per_node} tasks on each other node"
            )
        given = f"{len(allocation.nodes)} nodes x {allocation.ranks_per_node} tasks"
        remarks.append(
            f"{nodes * each} ranks is the largest legal number in {given}; idle: {', '.join(idle)}"
        )
    if allocation.gpus_per_node is not None and allocation.gpus_per_node > allocation.ranks_per_node:
        remarks.append(
            f"a node has {allocation.gpus_per_node} GPUs and --ntasks-per-node={allocation.ranks_per_node}: one task "
            f"uses one GPU, the others stay idle; submit with --ntasks-per-node={allocation.gpus_per_node}"
        )
    return remarks


def check_times(
    config: Config, folder: RunFolder, live: LiveJobs, allocation: Allocation, ranks: int
) -> list[str]:
    """Checks that the time limit leaves time to train, and returns a remark if the signal may come too late for a
    complete save.

    Raises:
        UserError: if the time limit leaves no time to train.
    """
    limit_s, lead_s = live.limits_s.get(allocation.job_id), allocation.lead_s
    if limit_s is not None and lead_s is not None and limit_s <= lead_s:
        raise UserError(
            f"--time: the limit of {limit_s:g} s leaves nothing before the signal, which comes {lead_s} s earlier "
            f"(--signal=USR2@{lead_s}); give more time"
        )
    needed = saving.signal_lead(config, folder, ranks=ranks)
    if limit_s is not None and limit_s <= needed.seconds:
        raise UserError(
            f"--time: the limit of {limit_s:g} s is shorter than what a save before its end may take, "
            f"{needed.seconds:.0f} s ({needed.source}); give more time"
        )
    if lead_s is not None and lead_s < needed.seconds:
        seconds = ceil(needed.seconds)
        return [
            f"--signal=USR2@{lead_s} may come too late for a complete save, which takes {seconds} s ({needed.source}); "
            f"submit with --signal=USR2@{seconds} and UNIEMOX_LEAD_S={seconds}"
        ]
    return []


def _check_attempts_left(config: Config, folder: RunFolder, allocation: Allocation) -> None:
    """Ends a job after too many attempts without progress: Slurm would requeue it forever if its nodes fail.

    Raises:
        Fault: after run.max_restarts such attempts.
    """
    found = count_attempts(read_lines(folder.events))
    if (allocation.restarts or allocation.after is not None) and found.in_vain >= config.run.max_restarts > 0:
        tried = (
            f"{found.in_vain} restarts without a new checkpoint (run.max_restarts={config.run.max_restarts})"
        )
        text = f"given up after {tried}; the last fault: {found.reason(1)}"
        folder.write(FaultEvent(error=text, ends=True, restart=False))
        raise Fault(text)
