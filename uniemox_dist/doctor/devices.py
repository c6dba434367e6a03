"""The devices and cores of each rank."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from uniemox_dist.core.formatting import counted
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

DEVICES, CORES = "devices", "cores"


@dataclass(frozen=True)
class DeviceFacts:
    """The device and cores of one rank."""

    visible: tuple[str, ...]
    """Names of the GPUs that this process sees."""
    own: int | None
    """Index of this rank's GPU among them; None on a CPU."""
    uuid: str | None
    """UUID of this rank's GPU."""
    cores: tuple[int, ...]
    """CPU cores that this process may run on."""
    quota: float | None
    """CPU quota of its control group, in cores."""
    threads: int | None
    """Threads of one torch operation; None without torch."""

    @property
    def name(self) -> str:
        """Name of the device."""
        if self.own is None:
            return "CPU"
        return self.visible[self.own] if self.own < len(self.visible) else "none"


def measure(world: World) -> DeviceFacts:
    """Queries torch, if it is imported, and the kernel."""
    visible: list[str] = []
    threads: int | None = None
    uuid = None
    if "torch" in sys.modules:
        import torch

        threads = torch.get_num_threads()
        if torch.cuda.is_available():
            visible = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
            if world.local_rank < len(visible):
                uuid = str(getattr(torch.cuda.get_device_properties(world.local_rank), "uuid", "")) or None
    own = world.local_rank if visible else None
    cores = tuple(sorted(os.sched_getaffinity(0)))
    return DeviceFacts(tuple(visible), own, uuid, cores, read_limits().cores, threads)


def judge_devices(gathered: Sequence[RankFacts[DeviceFacts]]) -> list[Finding]:
    """Fails if a rank has no GPU of its own while others have one; warns if GPUs differ."""
    everyone = select_with_facts(gathered)
    on_gpu = any(facts.own is not None for _, facts in everyone)
    usual = Counter(facts.name for _, facts in everyone).most_common(1)[0][0] if everyone else ""
    first: dict[tuple[str, str], int] = {}
    for one, facts in everyone:
        if facts.uuid is not None:
            first.setdefault((one.host, facts.uuid), one.rank)

    def of_rank(one: RankFacts[DeviceFacts], facts: DeviceFacts) -> Problem | None:
        if facts.own is None and on_gpu:
            remedy = "see nvidia-smi there, CUDA_VISIBLE_DEVICES, and that torch's build is the same"
            return Problem("fail", "sees no GPU, while other ranks do", remedy)
        if facts.own is not None and facts.own >= len(facts.visible):
            remedy = (
                "start no more ranks on a node than it has GPUs, and let every rank see them all "
                "(srun --gpus-per-node, not --gpus-per-task)"
            )
            return Problem(
                "fail", f"is local rank {facts.own} and sees {counted(len(facts.visible), 'GPU')}", remedy
            )
        if facts.uuid is not None and first[one.host, facts.uuid] != one.rank:
            other = first[one.host, facts.uuid]
            return Problem("fail", f"has the same GPU as rank {other}", "set one rank per GPU")
        if facts.name != usual:
            remedy = "the slowest sets the pace; ask for nodes of one kind"
            return Problem("warn", f"computes on {facts.name}, most ranks on {usual}", remedy)
        return None

    def all_well(all_facts: list[DeviceFacts]) -> str:
        hosts = group_by_host(gathered)
        where = f"{counted(len(gathered), 'rank')} on {counted(len(hosts), 'host')}"
        seen = (
            f", {counted(len(all_facts[0].visible), 'GPU')} visible" if all_facts[0].visible else ", no GPU"
        )
        return f"{all_facts[0].name}{seen}; {where}"

    return make_findings(DEVICES, gathered, of_rank, all_well)


def count_cores(gathered: Sequence[RankFacts[DeviceFacts]]) -> dict[int, float]:
    """Cores available to each rank. Cores that several ranks of a host may use are divided among them."""
    share: dict[int, float] = {}
    for ranks in group_by_host(gathered).values():
        users = Counter(core for _, facts in select_with_facts(ranks) for core in facts.cores)
        for one, facts in select_with_facts(ranks):
            own = sum(1 / users[core] for core in facts.cores)
            # A quota counts for all ranks of the host: batch systems set it for the whole job.
            share[one.rank] = min(own, facts.quota / len(ranks)) if facts.quota else own
    return share


def judge_cores(gathered: Sequence[RankFacts[DeviceFacts]], workers: int | None) -> list[Finding]:
    """Warns if a rank has more threads or loader processes than cores; `workers` is None without a recipe."""
    share = count_cores(gathered)

    def of_rank(one: RankFacts[DeviceFacts], facts: DeviceFacts) -> Problem | None:
        own = share[one.rank]
        most = max(1, int(own))
        cores = f"{own:.3g} core{'' if own == 1 else 's'}"
        if facts.threads is not None and facts.threads > most:
            remedy = f"export OMP_NUM_THREADS={most}, or give each task more cores (srun --cpus-per-task)"
            return Problem("warn", f"{facts.threads} threads per operation on {cores}", remedy)
        if workers is not None and workers > most:
            remedy = f"set data.workers={most}, or give each task more cores (srun --cpus-per-task)"
            return Problem("warn", f"{workers} loader processes on {cores}", remedy)
        return None

    def all_well(all_facts: list[DeviceFacts]) -> str:
        own = sorted(share.values())
        low, high = f"{own[0]:.3g}", f"{own[-1]:.3g}"
        cores = low if low == high else f"{low} … {high}"
        threads = all_facts[0].threads
        asked = "" if threads is None else f", {counted(threads, 'thread')} per operation"
        return f"{cores} per rank{asked}" + ("" if workers is None else f", data.workers={workers}")

    return make_findings(CORES, gathered, of_rank, all_well)
