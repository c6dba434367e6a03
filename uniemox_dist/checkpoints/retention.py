"""Which checkpoints are kept, and whether there is room for another. Torch-free."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from uniemox_dist.checkpoints.folders import NAME, complete_checkpoints
from uniemox_dist.runtime.files import remove_dir


def superfluous(steps: Iterable[int], keep_last: int, keep_every: int | None = None) -> list[int]:
    """The steps whose checkpoints the policy does not keep, oldest first: kept are the newest `keep_last`, and for ever
    those whose step is a multiple of `keep_every`. The newest is always kept."""
    older = sorted(steps)[: -max(1, keep_last)]
    return [step for step in older if keep_every is None or step % keep_every]


def prune(folder: Path, keep_last: int, keep_every: int | None = None) -> list[str]:
    """Deletes what the policy does not keep of the complete checkpoints below a run's checkpoints/; returns names. Each
    is renamed before it is deleted, so that none is ever seen in part."""
    by_step = {checkpoint.step: checkpoint for checkpoint in complete_checkpoints(folder)}
    doomed = [by_step[step].folder for step in superfluous(by_step, keep_last, keep_every)]
    for path in doomed:
        remove_dir(path)
    return [path.name for path in doomed]


def clear_unfinished(folder: Path) -> list[str]:
    """Deletes what killed saves and deletions left below checkpoints/; only while no save is under way."""
    left = [p for p in folder.glob(".step_*") if NAME.match(p.name[1:]) and p.suffix in (".tmp", ".deleted")]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in left)


def free_bytes(folder: Path) -> int:
    """What may still be written into the file system of a folder."""
    return shutil.disk_usage(folder).free
