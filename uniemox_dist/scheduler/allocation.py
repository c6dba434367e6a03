"""What Slurm gave a job, read once from the variables of its batch script."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from uniemox_dist.core.errors import UserError
from uniemox_dist.scheduler.hostlist import expand

UNLIMITED = ("UNLIMITED", "INFINITE", "NOT_SET", "INVALID", "N/A")


@dataclass(frozen=True)
class Allocation:
    """Nodes and tasks of a Slurm job."""

    job_id: int
    restarts: int
    """How often Slurm has queued this job again."""
    nodes: tuple[str, ...]
    ranks_per_node: int
    """Tasks asked for on each node: one for each GPU, or CPU rank."""
    gpus_per_node: int | None = None
    """None where no GPUs were asked for."""
    lead_s: int | None = None
    """Seconds between the signal and the time limit; None where the script does not say."""
    after: int | None = None
    """The job that submitted this one in its place, because of its nodes."""

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Allocation":
        """Reads the variables.

        Raises:
            UserError: outside of a Slurm job, or if GPUs and tasks do not fit together.
        """
        if not env.get("SLURM_JOB_ID", "").isdigit() or not env.get("SLURM_JOB_NODELIST"):
            raise UserError(
                "SLURM_JOB_ID and SLURM_JOB_NODELIST are not set: this command is for the inside of a Slurm job; "
                "submit with sbatch slurm/pretrain.sbatch or `uniemox launch slurm`"
            )
        gpus = env.get("SLURM_GPUS_ON_NODE", "")
        found = cls(
            job_id=int(env["SLURM_JOB_ID"]),
            restarts=int(env.get("SLURM_RESTART_COUNT") or 0),
            nodes=tuple(expand(env["SLURM_JOB_NODELIST"])),
            ranks_per_node=_ranks_per_node(env),
            gpus_per_node=int(gpus) if gpus.isdigit() and int(gpus) else None,
            lead_s=int(env["UNIEMOX_LEAD_S"]) if env.get("UNIEMOX_LEAD_S", "").isdigit() else None,
            after=int(env["UNIEMOX_AFTER_JOB"]) if env.get("UNIEMOX_AFTER_JOB", "").isdigit() else None,
        )
        if found.gpus_per_node is not None and found.gpus_per_node < found.ranks_per_node:
            raise UserError(
                f"--ntasks-per-node={found.ranks_per_node}: there are {found.gpus_per_node} GPUs on a node, and each "
                f"task needs one; use --ntasks-per-node={found.gpus_per_node}"
            )
        return found


def _ranks_per_node(env: Mapping[str, str]) -> int:
    """The tasks that every node has: of `2(x3),1` one."""
    told = env.get("SLURM_NTASKS_PER_NODE", "")
    if told.isdigit() and int(told):
        return int(told)
    counts = [int(found) for found in re.findall(r"(\d+)(?:\(x\d+\))?", env.get("SLURM_TASKS_PER_NODE", ""))]
    return max(1, min(counts, default=1))


def parse_time(text: str) -> float | None:
    """Seconds of one of Slurm's times (`1-02:03:04`, `2:03:04`, `3:04`); None for no limit, or no time.

    squeue prints a limit with at least minutes and seconds.
    """
    text = text.strip()
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if text in UNLIMITED or found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
