"""The nodes and tasks that Slurm gave a job, read once from the variables of its batch script."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from uniemox_dist.core.errors import UserError
from uniemox_dist.scheduler.hostlist import expand_hostlist


@dataclass(frozen=True)
class Allocation:
    """Nodes and tasks of a Slurm job."""

    job_id: int
    restarts: int
    """How often Slurm has requeued this job."""
    nodes: tuple[str, ...]
    ranks_per_node: int
    """Tasks requested on each node: one for each GPU, or one for each CPU rank."""
    gpus_per_node: int | None = None
    """None if no GPUs were requested."""
    lead_s: int | None = None
    """Seconds between the signal and the time limit; None if the script does not set it."""
    after: int | None = None
    """The job that submitted this one in its place, because its own nodes were bad."""

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Allocation":
        """Reads the variables of the batch script.

        Raises:
            UserError: outside of a Slurm job, or if there are fewer GPUs than tasks on a node.
        """
        if not env.get("SLURM_JOB_ID", "").isdigit() or not env.get("SLURM_JOB_NODELIST"):
            raise UserError(
                "SLURM_JOB_ID and SLURM_JOB_NODELIST are not set: this command only works inside a Slurm job; "
                "submit with sbatch slurm/pretrain.sbatch or `uniemox launch slurm`"
            )
        gpus = env.get("SLURM_GPUS_ON_NODE", "")
        found = cls(
            job_id=int(env["SLURM_JOB_ID"]),
            restarts=int(env.get("SLURM_RESTART_COUNT") or 0),
            nodes=tuple(expand_hostlist(env["SLURM_JOB_NODELIST"])),
            ranks_per_node=_ranks_per_node(env),
            gpus_per_node=int(gpus) if gpus.isdigit() and int(gpus) else None,
            lead_s=int(env["UNIEMOX_LEAD_S"]) if env.get("UNIEMOX_LEAD_S", "").isdigit() else None,
            after=int(env["UNIEMOX_AFTER_JOB"]) if env.get("UNIEMOX_AFTER_JOB", "").isdigit() else None,
        )
        if found.gpus_per_node is not None and found.gpus_per_node < found.ranks_per_node:
            raise UserError(
                f"--ntasks-per-node={found.ranks_per_node}: a node has {found.gpus_per_node} GPUs, and each "
                f"task needs one; use --ntasks-per-node={found.gpus_per_node}"
            )
        return found


def _ranks_per_node(env: Mapping[str, str]) -> int:
    """Tasks that every node can run: the smallest count, which is 1 in `2(x3),1`."""
    requested = env.get("SLURM_NTASKS_PER_NODE", "")
    if requested.isdigit() and int(requested):
        return int(requested)
    counts = [int(found) for found in re.findall(r"(\d+)(?:\(x\d+\))?", env.get("SLURM_TASKS_PER_NODE", ""))]
    return max(1, min(counts, default=1))
