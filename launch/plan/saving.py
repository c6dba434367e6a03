"""The size of a checkpoint, the time of a save, how often to save, and when to signal a job before its time limit.

P trained numbers, P_e of them the encoder's, F fixed ones (positions that are not trained), W ranks.
"""

import math
from dataclasses import dataclass

from launch.plan.model import list_trained_parameters, read_tower
from launch.plan.pace import read_measured_pace
from uniemox_dist.config.schema import Config
from uniemox_dist.core.formatting import duration
from uniemox_dist.models.parameters import ENCODER, Parameter
from uniemox_dist.runs.folder import RunFolder

KINDS = 3
"""fp32 weights and both moments of Adam, 4 bytes each."""
HEADER_BYTES = 110
"""Bytes of a fragment's entry in the header of its file: name, type, shape and offset."""
DISK_GB_S = 1.0
"""Assumed write speed of a shared file system for all ranks together, 10^9 bytes per second."""
HASH_GB_S = 1.2
"""Speed at which a rank's writer hashes, which it does between its writes: in docs/benchmarks/checkpoint.md, 1.34 GB
took 4.16 s on a disk of 0.44 GB/s."""
COPY_GB_S = 2.1
"""Speed of the copy from the state to host memory by one thread (same page). From a GPU to pinned memory it is
faster."""
EXCHANGES_S = 0.05
"""Assumed time that steps wait besides the copy: two small collectives, and a rename."""
NODE_MTBF_HOURS = 6300.0
"""Assumed mean time between failures of a node of eight GPUs: 419 unexpected interruptions in 54 days on 16,384 GPUs
(Llama 3, Dubey et al. 2024, section 3.3.4)."""


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of one checkpoint."""

    total: int
    """All files together, with estimated headers."""
    per_rank: int
    """The mean share of a rank."""
    kept: int
    """Largest total of the run's checkpoints: run.keep_last, one more while it is written, and those of
    run.keep_every."""


def checkpoint_size(
    config: Config, parameters: tuple[Parameter, ...], ranks: int, max_steps: int | None = None
) -> CheckpointSize:
    """The size of a run's checkpoints; `max_steps` decides how many run.keep_every keeps."""
    trained = [p for p in parameters if p.trained]
    # In stages 0 and 3 each parameter is cut among all ranks; in stages 1 and 2 each cut divides at most one per
    # group.
    cut = config.zero.stage in (0, 3)
    numbers = 0
    pieces = 0 if cut else KINDS * 2 * (ranks - 1)
    for p in trained:
        kinds = KINDS + (config.optim.ema_decay > 0 and p.name.startswith(ENCODER))
        numbers += kinds * p.numbers
        pieces += kinds * (min(ranks, p.numbers) if cut else 1)
    parts = 4 * numbers + pieces * HEADER_BYTES
    fixed = 4 * sum(p.numbers for p in parameters if not p.trained)
    kept = config.run.keep_last + 1
    if config.run.keep_every is not None and max_steps is not None:
        kept += max_steps // math.lcm(config.run.keep_every, config.run.save_every)
    return CheckpointSize(parts + fixed, math.ceil(parts / ranks), kept * (parts + fixed))


@dataclass(frozen=True)
class SaveTime:
    """Seconds of one save."""

    waits_s: float
    """Seconds that steps wait: the copy, and two small collectives."""
    seconds: float
    """Seconds until it is complete, while training continues."""
    source: str
    """Where these numbers come from."""


def estimate_save(size: CheckpointSize, disk_gb_s: float | None = None) -> SaveTime:
    """Estimates a save, given the disk's write speed for all ranks together. Each rank alternates between hashing and
    writing."""
    disk = disk_gb_s or DISK_GB_S
    copy = size.per_rank / (COPY_GB_S * 1e9) + EXCHANGES_S
    write = size.total / (disk * 1e9) + size.per_rank / (HASH_GB_S * 1e9)
    stated = f"a disk of {disk:g} GB/s" + ("" if disk_gb_s else ", which is assumed (set it with --disk)")
    return SaveTime(copy, copy + write, f"{stated}; hashed at {HASH_GB_S:g} GB/s per rank")


@dataclass(frozen=True)
class Interval:
    """How often to save."""

    job_mtbf_s: float
    seconds: float
    """Seconds between saves by Daly's formula, and at least the duration of a save."""
    steps: int
    lost_share: float
    """Share of the time lost with that interval: to saves, and per failure to half an interval and a save."""
    lost_share_now: float
    """The same with run.save_every."""


def advise_interval(
    save: SaveTime, *, step_s: float, nodes: int, node_mtbf_h: float, save_every: int, max_steps: int
) -> Interval:
    """The interval with the least loss of time: sqrt(2 d M) - d, where d is the time that a save blocks training and M
    is a job's mean time between failures, that of a node divided by the number of nodes (Young, CACM 17:9, 1974; Daly,
    Future Generation Computer Systems 22:3, 2006). It is no longer than the run, and no shorter than a save, because
    only one save is written at a time."""
    mtbf = node_mtbf_h * 3600 / nodes
    held = max(save.waits_s, 1e-3)
    best = mtbf if held >= mtbf / 2 else math.sqrt(2 * held * mtbf) - held
    best = min(max(best, save.seconds, step_s), max_steps * step_s)
    steps = max(1, round(best / step_s))

    def lost(seconds: float) -> float:
        return min(1.0, held / seconds + (seconds / 2 + save.seconds) / mtbf)

    return Interval(mtbf, best, steps, lost(steps * step_s), lost(save_every * step_s))


STEP_S = 30.0
"""Assumed time of a step that was not measured."""


@dataclass(frozen=True)
class Lead:
    """Seconds before a time limit at which a run must be signalled: it finishes its step, waits for a save that may be
    in progress, and makes its own."""

    seconds: float
    source: str
    """How the seconds were obtained."""

    def __float__(self) -> float:
        return self.seconds


def signal_lead(
    config: Config,
    run: RunFolder | None,
    *,
    ranks: int = 1,
    disk_gb_s: float | None = None,
    step_s: float | None = None,
) -> Lead:
    """Computes twice a save plus a step, from measurements of the run if it has any, otherwise from estimates.

    Args:
        run: the run's folder, if it has run before.
        ranks: ranks that save, for an estimate.
        disk_gb_s: write speed of the disk for all ranks together, 10^9 bytes per second, for an estimate.
        step_s: assumed seconds of a step if it was not measured.
    """
    seen = read_measured_pace(run) if run is not None and run.path.is_dir() else None
    if seen is not None and seen.save_s is not None:
        save_s, save_source = seen.save_s, f"the longest of the last saves measured, {seen.save_s:.3g} s"
    else:
        parameters = list_trained_parameters(config, read_tower(config))
        save = estimate_save(checkpoint_size(config, parameters, ranks), disk_gb_s)
        save_s, save_source = save.seconds, f"a save estimated at {save.seconds:.3g} s (with {save.source})"
    if seen is not None and seen.step_s is not None:
        step, step_source = seen.step_s, f"a step measured, {seen.step_s:.3g} s"
    elif step_s is not None:
        step, step_source = step_s, f"a step estimated at {step_s:.3g} s"
    else:
        step, step_source = STEP_S, f"{duration(STEP_S)} for a step that was not measured"
    return Lead(2 * save_s + step, f"2 x {save_source}, plus {step_source}")
