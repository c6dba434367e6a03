"""Collective operations among ranks: correct results, and their speed.

Every rank contributes small whole numbers, whose sum is exact in fp32 in any order, and checks every number that it
receives.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from uniemox_dist.core.formatting import format_range
from uniemox_dist.core.formatting import size as format_size
from uniemox_dist.distributed.world import World
from uniemox_dist.doctor.findings import Finding, Problem, RankFacts, make_findings, select_with_facts
from uniemox_dist.doctor.ranks import barrier

RESULTS, SPEED, LINKS = "collectives", "all_reduce", "links"
SIZES = {"cuda": (1 << 20, 1 << 24, 1 << 28), "cpu": (1 << 16, 1 << 20, 1 << 24)}
"""Bytes of the vectors, in ascending order."""
SHORT_SIZE = 1 << 16
SECONDS = 0.5
"""Approximate time for each size."""
MOST_REPEATS = 20
PLACES, RANKS = 97, 89
"""Moduli of the contributed numbers; sums stay below 2^24 for 90,000 ranks."""
SLOW_GPU_BYTES_PER_S = 1e9
LINK_SHARE = 0.5
"""A link slower than this share of the median of its kind gives a warning."""
NETWORK = (
    "see NCCL_DEBUG=INFO for the transport in use, NCCL_SOCKET_IFNAME and the InfiniBand state (ibstat); take the node "
    "out (sbatch --exclude) if it stays so"
)


@dataclass(frozen=True)
class CollectiveFacts:
    """The results and times of one rank."""

    wrong: dict[str, int]
    """Wrong numbers in the result, by operation."""
    seconds: dict[int, float]
    """Seconds of one all_reduce on this rank, by bytes of the vector."""
    link_bytes: int = 0
    link_s: float = 0.0
    """Seconds to receive `link_bytes` from the previous rank while sending as many to the next one, on all ranks at
    once."""
    gpu: bool = False

    def bus_bytes_per_s(self, size: int, ranks: int) -> float:
        """Rate of each link in a ring all_reduce: 2 (W - 1) / W times the vector (NCCL's "bus bandwidth")."""
        return 2 * (ranks - 1) / ranks * size / max(self.seconds[size], 1e-9)


def measure(world: World, device: Any, *, short: bool = False) -> CollectiveFacts:
    """Runs operations on a torch device. Collective."""
    sizes = (SHORT_SIZE,) if short else SIZES[device.type]
    wrong: dict[str, int] = {}
    seconds: dict[int, float] = {}
    for size in sizes:
        took = _all_reduce(world, device, size, wrong, repeat=not short)
        if not short:
            seconds[size] = took
    wrong["all_gather"] = _all_gather(world, device)
    link_bytes = 0 if short or world.size == 1 else sizes[-1]
    link_s = _ring(world, device, link_bytes) if link_bytes else 0.0
    return CollectiveFacts(wrong, seconds, link_bytes, link_s, device.type == "cuda")


def make_contribution(rank: int, count: int, device: Any) -> Any:
    """A rank's vector: fp32 whole numbers that differ by place and by rank."""
    import torch

    places = torch.arange(count, device=device) % PLACES
    return (places + rank % RANKS).to(torch.float32)


def compute_sum(ranks: int, count: int, device: Any) -> Any:
    """The sum of all ranks' vectors."""
    return ranks * make_contribution(0, count, device) + sum(rank % RANKS for rank in range(ranks))


def _all_reduce(world: World, device: Any, size: int, wrong: dict[str, int], *, repeat: bool) -> float:
    """Times an all_reduce; counts wrong numbers in one before and in one after the timed ones."""
    import torch
    import torch.distributed as dist

    count = size // 4
    name = f"all_reduce of {size} bytes"
    expected = compute_sum(world.size, count, device)

    def checked() -> None:
        values = make_contribution(world.rank, count, device)
        dist.all_reduce(values)
        wrong[name] = wrong.get(name, 0) + int((values != expected).sum())

    checked()
    if not repeat:
        return 0.0
    zeros = torch.zeros(count, device=device)  # sums of zeros stay zero
    once = torch.tensor([_timed(lambda: dist.all_reduce(zeros), device)], device=device)
    dist.all_reduce(once, op=dist.ReduceOp.MAX)  # all ranks must repeat the same number of times
    repeats = max(2, min(MOST_REPEATS, int(SECONDS / max(float(once), 1e-6))))
    total = _timed(lambda: [dist.all_reduce(zeros) for _ in range(repeats)], device)
    checked()
    return total / repeats


def _all_gather(world: World, device: Any) -> int:
    """Counts wrong numbers in an all_gather."""
    import torch
    import torch.distributed as dist

    own = make_contribution(world.rank, 1024, device)
    rows = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(rows, own)
    return sum(int((row != make_contribution(rank, 1024, device)).sum()) for rank, row in enumerate(rows))


def _ring(world: World, device: Any, size: int) -> float:
    """Times sending a vector to the next rank while receiving one. Unlike a sum over all ranks, this ends on each rank
    as soon as its own links are done."""
    import torch
    import torch.distributed as dist

    out, come = (torch.zeros(size // 4, device=device) for _ in range(2))
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size

    def pass_on() -> None:
        operations = [dist.P2POp(dist.isend, out, after), dist.P2POp(dist.irecv, come, before)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()

    _timed(pass_on, device)  # opens the connections
    times = []
    for _ in range(3):
        barrier()
        times.append(_timed(pass_on, device))
    return min(times)


def _timed(work: Callable[[], Any], device: Any) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def judge_results(gathered: Sequence[RankFacts[CollectiveFacts]]) -> list[Finding]:
    """Fails for every rank that got a wrong number."""

    def of_rank(_: RankFacts[CollectiveFacts], facts: CollectiveFacts) -> Problem | None:
        bad = [f"{count} wrong numbers from {name}" for name, count in facts.wrong.items() if count]
        remedy = (
            "exclude that host (sbatch --exclude) and have its memory, GPU and network card tested; if it is on all "
            "hosts, update NCCL and the driver"
        )
        return Problem("fail", ", ".join(bad), remedy) if bad else None

    def all_well(all_facts: list[CollectiveFacts]) -> str:
        return f"{len(all_facts[0].wrong)} operations gave the exact result on " + (
            f"all {len(gathered)} ranks" if len(gathered) > 1 else "one rank"
        )

    return make_findings(RESULTS, gathered, of_rank, all_well)


def judge_speed(gathered: Sequence[RankFacts[CollectiveFacts]], gradient_bytes: int | None) -> list[Finding]:
    """States the bandwidth by size, and the slowest rank; warns if GPUs exchange data slower than over a plain
    network."""
    everyone = select_with_facts(gathered)
    ranks = len(gathered)
    if ranks == 1 or not everyone or not everyone[0][1].seconds:
        return []
    sizes = sorted(everyone[0][1].seconds)
    slowest, slow = min(everyone, key=lambda pair: pair[1].bus_bytes_per_s(sizes[-1], ranks))
    rates = ", ".join(
        f"{min(f.bus_bytes_per_s(size, ranks) for _, f in everyone) / 1e9:.3g} GB/s at {format_size(size)}"
        for size in sizes
    )
    rate = slow.bus_bytes_per_s(sizes[-1], ranks)
    text = f"{rates}; slowest: rank {slowest.rank} on {slowest.host}"
    if gradient_bytes:
        seconds = 2 * (ranks - 1) / ranks * gradient_bytes / rate
        text += f"; a step's gradients ({format_size(gradient_bytes)}) take {seconds:.2g} s"
    if slow.gpu and rate < SLOW_GPU_BYTES_PER_S:
        return [Finding("warn", SPEED, text, NETWORK, slowest.rank, slowest.host)]
    return [Finding("ok", SPEED, text)]


def judge_links(gathered: Sequence[RankFacts[CollectiveFacts]]) -> list[Finding]:
    """Warns of ranks that receive data much slower than others over a link of the same kind."""
    if len(gathered) == 1 or not any(facts.link_bytes for _, facts in select_with_facts(gathered)):
        return []
    kinds: dict[bool, list[float]] = {False: [], True: []}
    rates: dict[int, tuple[bool, float]] = {}
    for one, facts in select_with_facts(gathered):
        between_hosts = gathered[one.rank - 1].host != one.host
        rates[one.rank] = between_hosts, facts.link_bytes / max(facts.link_s, 1e-9)
        kinds[between_hosts].append(rates[one.rank][1])

    def of_rank(one: RankFacts[CollectiveFacts], _: CollectiveFacts) -> Problem | None:
        between_hosts, rate = rates[one.rank]
        median = statistics.median(kinds[between_hosts])
        if rate >= LINK_SHARE * median:
            return None
        before = gathered[one.rank - 1]
        value = (
            f"{rate / 1e9:.3g} GB/s from rank {before.rank} on {before.host}, the median of such links is "
            f"{median / 1e9:.3g} GB/s"
        )
        return Problem("warn", value, NETWORK)

    def all_well(_: list[CollectiveFacts]) -> str:
        names = {False: "within a host", True: "between hosts"}
        parts = [
            f"{format_range((r / 1e9 for r in found), 'GB/s')} {names[k]}"
            for k, found in kinds.items()
            if found
        ]
        return "; ".join(parts) + ", each rank to the next"

    return make_findings(LINKS, gathered, of_rank, all_well)
