"""/dev/shm, open files and processes, compared with what ranks and their loader processes need."""

import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uniemox_dist.core.formatting import counted, format_range, size
from uniemox_dist.data.origin import HANDLES
from uniemox_dist.doctor.cgroup import read_limits
from uniemox_dist.doctor.findings import Finding, Problem, RankFacts, group_by_host, make_findings
from uniemox_dist.doctor.subject import LoaderNeeds

SHM, FILES, PROCESSES = "/dev/shm", "open files", "processes"
SHM_LEAST = 1 << 20
"""Bytes per rank, for semaphores of Python's multiprocessing and small shared tensors of torch."""
SHM_NCCL = 1 << 30
"""Bytes that NCCL's documentation recommends if several GPUs of a node communicate through shared memory."""
FILES_BASE = 256
"""Open files of one rank: libraries, logs, pipes and sockets."""
FILES_PER_PEER = 2
"""Largest number of sockets to another rank."""
THREADS = 64
"""Threads of one process with torch, NCCL and OpenMP."""


@dataclass(frozen=True)
class LimitFacts:
    """The limits of one rank."""

    shm_free: int | None
    """Free bytes in /dev/shm; None if it does not exist."""
    shm_total: int
    files: int
    """Soft limit of open files."""
    files_hard: int
    processes: int | None
    """Processes and threads that may still be started; None without a limit."""
    gpu: bool = False
    """True if the rank uses a GPU."""


def measure(*, gpu: bool, shm: Path = Path("/dev/shm")) -> LimitFacts:
    """Queries the kernel."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        room = os.statvfs(shm)
        free: int | None = room.f_bavail * room.f_frsize
        total = room.f_blocks * room.f_frsize
    except OSError:
        free, total = None, 0
    most = 1 << 30
    files = [most if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard)]
    return LimitFacts(free, total, files[0], files[1], _processes_left(), gpu)


def _processes_left() -> int | None:
    left = []
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and os.geteuid() != 0:  # the kernel does not apply the limit to root
        # All threads of the node, of other users too: an upper bound that needs no walk through all processes.
        running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])
        left.append(max(0, soft - running))
    limits = read_limits()
    if limits.pids is not None:
        left.append(max(0, limits.pids - limits.pids_used))
    return min(left, default=None)


def judge_shm(gathered: Sequence[RankFacts[LimitFacts]], loader: LoaderNeeds | None) -> list[Finding]:
    """Fails without shared memory; warns if there is less than loaders and NCCL may use."""
    hosts = group_by_host(gathered)
    remedy = "enlarge it: docker run --shm-size=8g (or --ipc=host), or mount -o remount,size=8g /dev/shm"

    def of_rank(one: RankFacts[LimitFacts], facts: LimitFacts) -> Problem | None:
        ranks = len(hosts[one.host])
        if facts.shm_free is None:
            return Problem("fail", "there is none", "mount a tmpfs there; torch and NCCL need it")
        need = ranks * (SHM_LEAST + (loader.handover_bytes if loader else 0))
        need += SHM_NCCL if facts.gpu and ranks > 1 else 0
        what = f"{size(facts.shm_free)} free of {size(facts.shm_total)}"
        if facts.shm_free < ranks * SHM_LEAST:
            return Problem("fail", what, remedy)
        if facts.shm_free < need:
            return Problem("warn", f"{what}; {counted(ranks, 'rank')} there may take {size(need)}", remedy)
        return None

    def all_well(all_facts: list[LimitFacts]) -> str:
        free = format_range(((facts.shm_free or 0) / 1e6 for facts in all_facts), "MB", 6)
        return f"{free} free" + (
            f"; loaders may take {size(loader.handover_bytes)} per rank" if loader else ""
        )

    return make_findings(SHM, gathered, of_rank, all_well)


def judge_files(gathered: Sequence[RankFacts[LimitFacts]], loader: LoaderNeeds | None) -> list[Finding]:
    """Fails if a rank could not open its shards and its connections; warns below twice that number."""
    need = FILES_BASE + HANDLES * (loader.data_sets if loader else 1) + FILES_PER_PEER * (len(gathered) - 1)

    def of_rank(_: RankFacts[LimitFacts], facts: LimitFacts) -> Problem | None:
        if facts.files >= 2 * need:
            return None
        raised = f"ulimit -n {max(4096, 4 * need)}"
        if facts.files_hard < 2 * need:
            raised += f" after raising the hard limit, {facts.files_hard}, in /etc/security/limits.conf"
        value = f"limit {facts.files}, a rank may need {need}"
        return Problem("fail" if facts.files < need else "warn", value, raised)

    def all_well(all_facts: list[LimitFacts]) -> str:
        limit = min(facts.files for facts in all_facts)
        return f"limit {limit} per process; a rank may need {need}"

    return make_findings(FILES, gathered, of_rank, all_well)


def judge_processes(gathered: Sequence[RankFacts[LimitFacts]], loader: LoaderNeeds | None) -> list[Finding]:
    """Fails if the ranks of a host could not start their threads; warns if loader processes might not start."""
    hosts = group_by_host(gathered)
    workers = loader.workers if loader else 0

    def of_rank(one: RankFacts[LimitFacts], facts: LimitFacts) -> Problem | None:
        ranks = len(hosts[one.host])
        need = ranks * (
            THREADS + 2 * workers
        )  # a loader process has its main thread, and one that fills its queue
        if facts.processes is None or facts.processes >= need:
            return None
        value = f"{facts.processes} more may be started, {counted(ranks, 'rank')} there may need {need}"
        remedy = "raise ulimit -u, or the container's pids limit (docker run --pids-limit)"
        return Problem("fail" if facts.processes < need // 4 else "warn", value, remedy)

    def all_well(all_facts: list[LimitFacts]) -> str:
        left = [facts.processes for facts in all_facts if facts.processes is not None]
        return f"{min(left)} more may be started" if left else "no limit"

    return make_findings(PROCESSES, gathered, of_rank, all_well)
