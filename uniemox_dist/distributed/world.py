"""The place of this process among the ranks: read once from the environment, then passed on as a value."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from uniemox_dist.core.errors import UserError
from uniemox_dist.scheduler.hostlist import expand_hostlist

FIRST_PORT, PORTS = 20_000, 20_000
"""Ports at which the ranks of a Slurm job may meet."""
STEP_PORTS = 7919
"""Distance between the ports of a job's steps, so that a step started after a fault uses another port."""


@dataclass(frozen=True)
class World:
    """Rank, number of ranks, rank on this node, and the address at which ranks meet."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0

    @property
    def is_main(self) -> bool:
        """True for rank 0, which writes everything that is written once."""
        return self.rank == 0

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ, *, meets: bool = True) -> "World":
        """Reads torchrun's variables, or else Slurm's; a process without either is the only rank.

        `meets` is False if ranks share work but never communicate, and so need no address.
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
        if not meets and "RANK" not in env and "SLURM_STEP_ID" not in env:
            return cls()  # a batch script has these variables but is not a rank; it does all the work
        if not meets:
            return cls(rank, size, local)
        address, port = _meeting_place(env)
        if not address or not port:
            raise UserError(
                f"MASTER_ADDR and MASTER_PORT are not set, but there are {size} ranks; start with "
                "`uniemox pretrain … --nproc N`, or with srun in a batch job"
            )
        return cls(rank, size, local, address, int(port))


def find_world(rank: int | None = None, world_size: int | None = None) -> World:
    """The place of a process of any program: as given; else from torch.distributed, if the program has initialised it;
    else from the variables of torchrun or Slurm.

    Raises:
        UserError: if only one of both is given, they are out of range, or the process has another rank by
            torch.distributed or torchrun than the one given, so that two processes would have the same.
    """
    found, source = World.from_env(meets=False), "its environment (RANK, WORLD_SIZE)"
    if is_joined():
        dist = sys.modules["torch"].distributed
        found, source = World(dist.get_rank(), dist.get_world_size()), "torch.distributed"
    if (rank is None) != (world_size is None):
        raise UserError(f"rank={rank}, world_size={world_size}: give both or none")
    if rank is None or world_size is None:
        return found
    if type(rank) is not int or type(world_size) is not int or not 0 <= rank < world_size:
        raise UserError(f"rank={rank!r}, world_size={world_size!r}: a rank is one of 0…world_size-1")
    if world_size == found.size and rank != found.rank:
        raise UserError(
            f"rank={rank}: this process has rank {found.rank} of {found.size} by {source}, so another process would "
            f"read the same samples; leave rank and world_size out"
        )
    return World(rank, world_size)


def check_found(world: World) -> None:
    """Checks that torch.distributed, if the program has initialised it since `find_world`, has the same ranks.

    Raises:
        UserError: if it has others, so that several processes would read the same samples.
    """
    if not is_joined():
        return
    dist = sys.modules["torch"].distributed
    rank, size = dist.get_rank(), dist.get_world_size()
    if (rank, size) != (world.rank, world.size):
        raise UserError(
            f"rank={world.rank}, world_size={world.size}: were found before torch.distributed was initialised, where "
            f"this is rank {rank} of {size}; open the stream after that (in Lightning in train_dataloader()), or give "
            "rank and world_size"
        )


def is_joined() -> bool:
    """Whether this process is in a process group of torch.distributed. Does not import torch."""
    dist = getattr(sys.modules.get("torch"), "distributed", None)
    return dist is not None and dist.is_available() and dist.is_initialized()


def _meeting_place(env: Mapping[str, str]) -> tuple[str, str]:
    """Address and port at which the ranks meet: from the environment; else the first node of the job step, where rank 0
    runs, and a port derived from the job's number, so that two jobs on one node use different ports."""
    address, port = env.get("MASTER_ADDR", ""), env.get("MASTER_PORT", "")
    if "SLURM_STEP_ID" not in env:  # a batch script knows its job's nodes, but no other process joins it
        return address, port
    nodes, job = (
        env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "",
        env.get("SLURM_JOB_ID", ""),
    )
    if not address and nodes:
        address = expand_hostlist(nodes)[0]
    if not port and job.isdigit():
        step = env["SLURM_STEP_ID"]
        number = int(job) + STEP_PORTS * (int(step) if step.isdigit() else 0)
        port = str(FIRST_PORT + number % PORTS)
    return address, port
