"""The numbers of ranks that a configuration allows, and how many of the given nodes and GPUs they use.

S streams, G samples of the global batch, W ranks, B the micro-batch: W must divide S, and B must divide G/W
(S divides G in every configuration). Fine-tuning that mixes pictures in pairs also needs an even S/W.
"""

import math

from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def is_legal(config: Config, ranks: int) -> bool:
    """Whether this number of ranks may run with these streams, this global batch and this micro-batch."""
    batch = config.batch
    divides = batch.streams % ranks == 0 and batch.global_batch % (batch.micro_batch * ranks) == 0
    return divides and not (_mixes_pairs(config) and batch.streams // ranks % 2)


def legal_ranks(config: Config) -> list[int]:
    """All legal numbers of ranks, ascending; empty if the micro-batch does not divide the global batch."""
    return [ranks for ranks in divisors(config.batch.streams) if is_legal(config, ranks)]


def micro_batches(config: Config, ranks: int) -> list[int]:
    """All legal micro-batches for so many ranks, ascending: the divisors of a rank's samples per step."""
    found = divisors(config.batch.global_batch // ranks)
    return [micro for micro in found if micro % 2 == 0] if _mixes_pairs(config) else found


def _mixes_pairs(config: Config) -> bool:
    return isinstance(config, FinetuneRun) and config.finetune.mixes


def largest_legal(config: Config, nodes: int, ranks_per_node: int) -> tuple[int, int]:
    """Chooses nodes and ranks per node such that most ranks run. Of several such pairs it takes the one with the
    fewest nodes, so that whole nodes stay idle.

    Raises:
        UserError: if there are no nodes or GPUs, or no number of ranks may run.
    """
    if nodes < 1 or ranks_per_node < 1:
        raise UserError(f"{nodes} nodes with {ranks_per_node} ranks each: needs at least one of both")
    legal = set(legal_ranks(config))
    pairs = [
        (used * each, -used, (used, each))
        for each in range(1, ranks_per_node + 1)
        for used in range(1, nodes + 1)
        if used * each in legal
    ]
    if not pairs:
        raise UserError(_no_ranks(config))
    return max(pairs)[2]


def nearest_legal(config: Config, ranks: int) -> tuple[int | None, int | None]:
    """The nearest numbers of ranks that may run, at most and at least as many as `ranks`."""
    legal = legal_ranks(config)
    below = [n for n in legal if n <= ranks]
    above = [n for n in legal if n >= ranks]
    return (below[-1] if below else None), (above[0] if above else None)


def explain_illegal(config: Config, ranks: int) -> str | None:
    """Explains why so many ranks may not run, with the numbers and a fix; None if they may."""
    batch = config.batch
    if is_legal(config, ranks):
        return None
    if not legal_ranks(config):
        return _no_ranks(config)
    if ranks > batch.streams:
        return (
            f"{ranks} ranks are more than batch.streams={batch.streams}, and each needs a stream of its own; use at "
            f"most {nearest_legal(config, ranks)[0]} ranks, or set {_suggest_fix(config, ranks)}"
        )
    near = " or ".join(str(n) for n in nearest_legal(config, ranks) if n is not None)
    if batch.streams % ranks:
        return (
            f"batch.streams={batch.streams} is not a multiple of {ranks} ranks; use {near} ranks, or set "
            f"{_suggest_fix(config, ranks)}"
        )
    if _mixes_pairs(config) and batch.streams // ranks % 2:
        return (
            f"finetune.mixup and finetune.cutmix mix neighbouring slots: batch.streams={batch.streams} over {ranks} "
            f"ranks are {batch.streams // ranks} each, which is odd; use {near} ranks, or set "
            f"{_suggest_fix(config, ranks)}"
        )
    own = batch.global_batch // ranks
    near_micro = min(micro_batches(config, ranks), key=lambda m: (abs(m - batch.micro_batch), m))
    return (
        f"batch.micro_batch={batch.micro_batch} does not divide a rank's {own} samples of a step "
        f"(batch.global_batch={batch.global_batch} over {ranks} ranks); set batch.micro_batch={near_micro}"
    )


def _suggest_fix(config: Config, ranks: int) -> str:
    """Streams and global batch near the settings that allow so many ranks with this micro-batch."""
    batch, unit = config.batch, ranks * (2 if _mixes_pairs(config) else 1)
    streams = max(1, round(batch.streams / unit)) * unit
    unit = math.lcm(streams, ranks * batch.micro_batch)
    return f"batch.streams={streams} batch.global_batch={max(1, round(batch.global_batch / unit)) * unit}"


def _no_ranks(config: Config) -> str:
    batch = config.batch
    near = min(micro_batches(config, 1), key=lambda m: (abs(m - batch.micro_batch), m))
    return (
        f"batch.micro_batch={batch.micro_batch} does not divide batch.global_batch={batch.global_batch}, so that no "
        f"number of ranks can run; set batch.micro_batch={near}"
    )
