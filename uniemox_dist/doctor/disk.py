"""The run folder's disk: whether ranks can write to it, how fast, and how many checkpoints fit."""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uniemox_dist.core.errors import Fault
from uniemox_dist.core.formatting import format_range
from uniemox_dist.core.formatting import size as format_size
from uniemox_dist.doctor.findings import Finding, Problem, RankFacts, make_findings, select_with_facts
from uniemox_dist.doctor.subject import Sizes

WHAT = "run folder"
PIECE = 1 << 20
"""Bytes written at once."""
PROBE_BYTES, SHORT_BYTES = 64 << 20, 1 << 16
LONGEST_S = 3.0
"""Longest time that a probe writes, without the last fsync."""
LEAST_BYTES, LITTLE_BYTES = 100 << 20, 10 << 30
"""Free bytes below which a disk fails, or gives a warning, if the size of checkpoints is unknown."""
REMEDY = "set run.dir to a folder that every rank may write, with enough free space and quota"
INODES = 1000
"""Number of files that it must be possible to create."""
SLOW_S = 300.0
"""A checkpoint that takes longer to write gives a warning."""
SLOW_BYTES_PER_S = 20e6
"""Rate of one rank, bytes/s, below which a disk gives a warning if the size of checkpoints is unknown."""


@dataclass(frozen=True)
class DiskFacts:
    """The measurements of one rank."""

    folder: str
    """The folder of the probe: the run folder, or its nearest parent that exists."""
    free: int
    """Bytes that this user may still write."""
    inodes: int | None
    """Files that may still be created; None if the file system does not count them."""
    written: int
    """Size of the probe."""
    seconds: float
    """Time of the probe with fsync, while all ranks wrote."""
    saved: int = 0
    """Checkpoints that exist there."""

    @property
    def bytes_per_s(self) -> float:
        """Write speed of this rank."""
        return self.written / max(self.seconds, 1e-9)


def measure(run_folder: Path, size: int = PROBE_BYTES) -> DiskFacts:
    """Writes a file of `size` random bytes, or as much as takes a few seconds, and removes it.

    Raises:
        Fault: if the file cannot be written.
    """
    folder = run_folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        written, seconds, room = _write(folder, size)
    except OSError as error:  # without the probe's name, which differs between ranks
        raise Fault(f"{folder} cannot be written ({error.strerror}); {REMEDY}") from None
    saved = len(list((run_folder / "checkpoints").glob("step_*")))
    inodes = room.f_favail if room.f_files else None
    # The space of the probe was not free while it existed.
    return DiskFacts(str(folder), room.f_bavail * room.f_frsize + written, inodes, written, seconds, saved)


def _write(folder: Path, size: int) -> tuple[int, float, os.statvfs_result]:
    """Bytes written, seconds, and the free space at that time."""
    piece = memoryview(np.random.default_rng().bytes(min(size, PIECE)))
    written = 0
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor.", suffix=".tmp", buffering=0) as file:
        began = time.perf_counter()
        while written < size and time.perf_counter() - began < LONGEST_S:
            # Every piece contains a number, because a file system with deduplication would store equal pieces once.
            written += file.write(written.to_bytes(8, "little")) + file.write(piece)
        os.fsync(file.fileno())
        return written, time.perf_counter() - began, os.statvfs(folder)


def judge(
    gathered: Sequence[RankFacts[DiskFacts]],
    sizes: Sizes | None,
    keep: int,
    *,
    speed: bool = True,
    lenient: bool = False,
) -> list[Finding]:
    """Fails if the disk is not writable or two checkpoints do not fit; warns if not all checkpoints to keep fit.

    `keep` is run.keep_last. `speed` is False if the probe was too small to measure it. With `lenient`, too little
    space is only a warning: a run continues without saving, and space may become free.
    """
    rate = sum(facts.bytes_per_s for _, facts in select_with_facts(gathered))

    def of_rank(_: RankFacts[DiskFacts], facts: DiskFacts) -> Problem | None:
        free = f"{format_size(facts.free)} free in {facts.folder}"
        room = "free space there, or set run.dir to a larger disk"
        if facts.inodes is not None and facts.inodes < INODES:
            return Problem("fail", f"only {facts.inodes} more files can be created in {facts.folder}", room)
        if sizes is None:
            if facts.free < LITTLE_BYTES:
                return Problem("fail" if facts.free < LEAST_BYTES else "warn", free, room)
        else:
            one = sizes.checkpoint_bytes
            # While the newest checkpoint is written there is one more than are kept; a run needs space for at least
            # two.
            need = max(1, keep + 1 - facts.saved) * one
            if facts.free < need:
                value = f"{free}; a checkpoint takes {format_size(one)}, run.keep_last={keep}"
                few = facts.free < max(1, 2 - facts.saved) * one
                return Problem(
                    "fail" if few and not lenient else "warn", value, f"{room}, or lower run.keep_last"
                )
        if not speed:
            return None
        if sizes is not None and sizes.checkpoint_bytes / rate > SLOW_S:
            value = (
                f"{format_size(rate)}/s with fsync: a checkpoint takes {sizes.checkpoint_bytes / rate:.0f} s"
            )
            return Problem("warn", value, "set run.dir to a faster disk, or a larger run.save_every")
        if sizes is None and facts.bytes_per_s < SLOW_BYTES_PER_S:
            return Problem(
                "warn", f"{format_size(facts.bytes_per_s)}/s with fsync", "set run.dir to a faster disk"
            )
        return None

    def all_well(all_facts: list[DiskFacts]) -> str:
        where = min(all_facts, key=lambda facts: facts.free)
        text = f"{format_size(where.free)} free in {where.folder}"
        if speed:
            each = (
                f" ({format_range((f.bytes_per_s / 1e6 for f in all_facts), 'MB/s')} per rank)"
                if len(gathered) > 1
                else ""
            )
            text += f"; writes {format_size(rate)}/s with fsync{each}"
        else:
            text += "; can be written"
        if sizes is not None:
            text += f"; a checkpoint takes {format_size(sizes.checkpoint_bytes)}"
            text += f", {sizes.checkpoint_bytes / rate:.2g} s" if speed else ""
        return text

    return make_findings(WHAT, gathered, of_rank, all_well)
