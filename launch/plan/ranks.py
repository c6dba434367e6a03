"""How many ranks may run a configuration, and which of a number of nodes and GPUs stay idle.

S streams, G samples of the global batch, W ranks, B the micro-batch: W must divide S, and B must divide G/W
(S divides G in every configuration).
"""

import math

from uniemox_dist.config.schema import BatchConfig, Config
from uniemox_dist.core.errors import UserError


def divisors(number: int) -> list[int]:
    """All divisors, rising."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def is_legal(batch: BatchConfig, ranks: int) -> bool:
    """Whether so many ranks may run with these streams, this global batch and this micro-batch."""
    return batch.streams % ranks == 0 and batch.global_batch % (batch.micro_batch * ranks) == 0


def legal_ranks(batch: BatchConfig) -> list[int]:
    """All numbers of ranks that may run, rising; empty if the micro-batch does not divide the global batch."""
    return [ranks for ranks in divisors(batch.streams) if is_legal(batch, ranks)]


def micro_batches(batch: BatchConfig, ranks: int) -> list[int]:
    """All legal micro-batches of so many ranks, rising: the divisors of what a rank has in a step."""
    return divisors(batch.global_batch // ranks)


def largest_legal(config: Config, nodes: int, ranks_per_node: int) -> tuple[int, int]:
    """Nodes and ranks on each of them, of those that are there, with which most ranks run; of several such pairs the
    one with the fewest nodes, so that they are full and whole nodes stay idle.

    Raises:
        UserError: if there is nothing to run on, or no number of ranks may run.
    """
    if nodes < 1 or ranks_per_node < 1:
        raise UserError(f"{nodes} nodes with {ranks_per_node} ranks each: needs at least one of both")
    legal = set(legal_ranks(config.batch))
    pairs = [
        (used * each, -used, (used, each))
        for each in range(1, ranks_per_node + 1)
        for used in range(1, nodes + 1)
        if used * each in legal
    ]
    if not pairs:
        raise UserError(_no_ranks(config.batch))
    return max(pairs)[2]


def nearest_legal(batch: BatchConfig, ranks: int) -> tuple[int | None, int | None]:
    """The nearest numbers of ranks that may run, at most and at least as many as `ranks`."""
    legal = legal_ranks(batch)
    below = [n for n in legal if n <= ranks]
    above = [n for n in legal if n >= ranks]
    return (below[-1] if below else None), (above[0] if above else None)


def why_illegal(batch: BatchConfig, ranks: int) -> str | None:
    """Why so many ranks may not run, with the numbers and what would mend it; None if they may."""
    if is_legal(batch, ranks):
        return None
    if not legal_ranks(batch):
        return _no_ranks(batch)
    if ranks > batch.streams:
        return (
            f"{ranks} ranks are more than batch.streams={batch.streams}, and each needs a stream of its own; use at "
            f"most {nearest_legal(batch, ranks)[0]} ranks, or set {_fix(batch, ranks)}"
        )
    if batch.streams % ranks:
        below, above = nearest_legal(batch, ranks)
        near = " or ".join(str(n) for n in (below, above) if n is not None)
        return (
            f"batch.streams={batch.streams} is not a multiple of {ranks} ranks; use {near} ranks, or set "
            f"{_fix(batch, ranks)}"
        )
    own = batch.global_batch // ranks
    near_micro = min(divisors(own), key=lambda m: (abs(m - batch.micro_batch), m))
    return (
        f"batch.micro_batch={batch.micro_batch} does not divide a rank's {own} samples of a step "
        f"(batch.global_batch={batch.global_batch} over {ranks} ranks); set batch.micro_batch={near_micro}"
    )


def _fix(batch: BatchConfig, ranks: int) -> str:
    """Streams and global batch that let so many ranks run with this micro-batch, near to what is set."""
    streams = max(1, round(batch.streams / ranks)) * ranks
    unit = math.lcm(streams, ranks * batch.micro_batch)
    return f"batch.streams={streams} batch.global_batch={max(1, round(batch.global_batch / unit)) * unit}"


def _no_ranks(batch: BatchConfig) -> str:
    near = min(divisors(batch.global_batch), key=lambda m: (abs(m - batch.micro_batch), m))
    return (
        f"batch.micro_batch={batch.micro_batch} does not divide batch.global_batch={batch.global_batch}, so that no "
        f"number of ranks can run; set batch.micro_batch={near}"
    )
