"""Memory of hosts and GPUs, compared with the least that a run needs."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from uniemox_dist.core.formatting import counted, format_range
from uniemox_dist.core.formatting import size as format_size
from uniemox_dist.distributed.world import World
from uniemox_dist.doctor.cgroup import read_limits
from uniemox_dist.doctor.findings import (
    Finding,
    Problem,
    RankFacts,
    group_by_host,
    make_findings,
    select_with_facts,
)
from uniemox_dist.doctor.subject import LoaderNeeds, Sizes

HOST, GPU = "memory", "gpu memory"
SPARE = 0.8
"""A run that needs at most this share of the free memory is ok."""
LEAST_BYTES = 1 << 30
"""Free memory required per rank without a recipe."""
FREE_SHARE = 0.9
"""Free share of a GPU; less means that another process uses it."""


@dataclass(frozen=True)
class MemoryFacts:
    """Memory of one rank's host and GPU, in bytes."""

    available: int
    """Available on the host, without swapping."""
    limit: int | None
    """Left in the control group, if there is one."""
    left: int
    """Available to this process: the smaller of both."""
    own: int
    """Resident memory of this process, including its libraries."""
    gpu_free: int | None = None
    gpu_total: int | None = None


def measure(world: World) -> MemoryFacts:
    """Queries the kernel, and the driver of this rank's GPU."""
    available = int(psutil.virtual_memory().available)
    limits = read_limits()
    left = available
    if limits.memory_bytes is not None:
        left = min(left, max(0, limits.memory_bytes - limits.memory_used))
    own = int(psutil.Process(os.getpid()).memory_info().rss)
    free = total = None
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available() and world.local_rank < torch.cuda.device_count():
            free, total = torch.cuda.mem_get_info(world.local_rank)
    return MemoryFacts(available, limits.memory_bytes, left, own, free, total)


def judge_host(gathered: Sequence[RankFacts[MemoryFacts]], loader: LoaderNeeds | None) -> list[Finding]:
    """Fails if loaders alone need more than a host has left; warns if they come close."""
    hosts = group_by_host(gathered)

    def of_rank(one: RankFacts[MemoryFacts], facts: MemoryFacts) -> Problem | None:
        ranks = len(hosts[one.host])
        need = ranks * (LEAST_BYTES if loader is None else _loader_bytes(loader))
        what = f"{format_size(facts.left)} free; {counted(ranks, 'rank')} there need at least {format_size(need)}"
        if loader is None:
            remedy = "ask for more memory (sbatch --mem), or end what else runs there"
            return Problem("warn", what, remedy) if need > facts.left else None
        if need <= SPARE * facts.left:
            return None
        remedy = (
            "ask for more memory (sbatch --mem), or lower data.workers, data.prefetch or data.shuffle_window"
        )
        return Problem("fail" if need > facts.left else "warn", f"{what}, for loading", remedy)

    def all_well(all_facts: list[MemoryFacts]) -> str:
        free = format_range((facts.left / 1e9 for facts in all_facts), "GB")
        limits = {facts.limit for facts in all_facts} - {None}
        bound = f" (limit {format_size(min(x for x in limits if x is not None))})" if limits else ""
        need = "" if loader is None else f"; loading takes {format_size(_loader_bytes(loader))} per rank"
        return f"{free} free per host{bound}{need}"

    return make_findings(HOST, gathered, of_rank, all_well)


def _loader_bytes(loader: LoaderNeeds) -> int:
    return loader.shared_bytes + max(1, loader.workers) * loader.index_bytes


def judge_gpu(gathered: Sequence[RankFacts[MemoryFacts]], sizes: Sizes | None, stage: int) -> list[Finding]:
    """Fails if weights and optimizer states do not fit; warns if another process uses the GPU."""
    if not any(facts.gpu_total for _, facts in select_with_facts(gathered)):
        return []
    need = 0 if sizes is None else sizes.gpu_bytes(len(gathered), stage)

    def of_rank(_: RankFacts[MemoryFacts], facts: MemoryFacts) -> Problem | None:
        if not facts.gpu_total or facts.gpu_free is None:
            return None  # another check reports ranks without a GPU
        what = f"{format_size(facts.gpu_free)} free of {format_size(facts.gpu_total)}"
        if need > facts.gpu_free:
            remedy = "use a higher zero.stage, more ranks or a smaller model"
            return Problem("fail", f"{what}; weights and states alone take {format_size(need)}", remedy)
        if facts.gpu_free < FREE_SHARE * facts.gpu_total:
            return Problem("warn", what, "another process has memory there; see nvidia-smi and end it")
        return None

    def all_well(all_facts: list[MemoryFacts]) -> str:
        free = [facts.gpu_free / 1e9 for facts in all_facts if facts.gpu_free is not None]
        known = f"; weights and states take {format_size(need)}, activations not included" if need else ""
        return f"{format_range(free, 'GB')} free a GPU{known}"

    return make_findings(GPU, gathered, of_rank, all_well)
