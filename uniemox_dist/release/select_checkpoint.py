"""Which checkpoint of a run is released."""

import math
from collections.abc import Sequence
from pathlib import Path

from uniemox_dist.checkpoints.folders import (
    COMPLETE,
    Checkpoint,
    complete_checkpoints,
    open_checkpoint,
    step_folder,
)
from uniemox_dist.core.errors import UserError
from uniemox_dist.runs.folder import RunFolder, read_lines
from uniemox_dist.runs.history import History, Line, number


def choose(run: Path, step: str) -> Checkpoint:
    """The checkpoint of a run by `step`: `last` (the newest sound one), `best`, or a number; or a checkpoint's own
    folder. Its files have their hashes.

    `best` is the one before which the mean loss was lowest: over the lines of metrics.jsonl of the `run.save_every`
    steps before it, steps that were skipped left out. Of equal ones it is the newest.

    Raises:
        UserError: if there is none of that kind, it is damaged, or the run's metrics cannot tell which is best.
    """
    if step == "last":
        return open_checkpoint(run, "RUN")
    if (run / COMPLETE).is_file():
        raise UserError(
            f"--step={step}: RUN={run} is a checkpoint already; give its run's folder, or no --step"
        )
    there = complete_checkpoints(run / "checkpoints")
    if not there:
        return open_checkpoint(run, "RUN")  # which says so
    if step == "best":
        return open_checkpoint(_best(run, there).folder, "RUN")
    if step.isascii() and step.isdigit() and int(step) in {c.step for c in there}:
        return open_checkpoint(run / "checkpoints" / step_folder(int(step)), "RUN")
    known = [f"{c.step}" for c in there]
    shown = ", ".join(known if len(known) <= 8 else [*known[:3], "…", *known[-3:]])
    raise UserError(f"--step={step}: RUN={run} has no such checkpoint; it has {shown} (or give last or best)")


def mean_loss(lines: Sequence[Line], step: int, window: int) -> float:
    """The mean of the finite losses in the `window` steps up to `step`; infinite where there is none."""
    losses = [number(line.get("loss")) for line in lines if step - window < line["step"] <= step]
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.inf


def _best(run: Path, there: Sequence[Checkpoint]) -> Checkpoint:
    folder = RunFolder(run)
    past = History(read_lines(folder.metrics), read_lines(folder.events))
    skipped = set(past.skips)
    lines = [line for line in past.lines if line["step"] not in skipped]
    window = max(1, *(int(c.info["config"]["run"]["save_every"]) for c in there))
    means = {c.step: mean_loss(lines, c.step, window) for c in there}
    if not any(map(math.isfinite, means.values())):
        raise UserError(
            f"--step=best: {folder.metrics} has no losses that tell; give --step last or a step's number"
        )
    return min(reversed(there), key=lambda checkpoint: means[checkpoint.step])
