"""The place of this process among the ranks, read once from the environment and passed on as a value."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from uniemox_dist.runtime.errors import UserError


@dataclass(frozen=True)
class World:
    """Rank, number of ranks, rank on this node, and where the ranks meet."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ, *, meets: bool = True) -> "World":
        """Reads torchrun's variables, or else Slurm's; a process without either is a world of its own.

        `meets` is false where ranks share work but never talk to each other, and so need no address.
        """
        if "RANK" in env and "WORLD_SIZE" in env:
            rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
            local = int(env.get("LOCAL_RANK", rank))
        elif "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))) > 1:
            rank = int(env["SLURM_PROCID"])
            size = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
            local = int(env["SLURM_LOCALID"])
        else:
            return cls()
        if not meets:
            return cls(rank, size, local)
        if not env.get("MASTER_ADDR") or not env.get("MASTER_PORT"):
            raise UserError(
                f"MASTER_ADDR and MASTER_PORT are not set, but there are {size} ranks; start with "
                "`uniemox pretrain … --nproc N`, or export both in the batch script"
            )
        return cls(rank, size, local, env["MASTER_ADDR"], int(env["MASTER_PORT"]))
