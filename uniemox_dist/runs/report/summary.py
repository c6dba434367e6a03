"""What a page says of a run first: what learns from whom, how far it is, and how it stands."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from uniemox_dist.checkpoints.folders import Checkpoint, newest_complete
from uniemox_dist.config.losses import LOSS_TERMS
from uniemox_dist.core.formatting import is_number, moment
from uniemox_dist.runs.folder import Lock, RunFolder
from uniemox_dist.runs.history import History, Line, of, run_length, steps_done
from uniemox_dist.runs.jobs import job_of, jobs_of
from uniemox_dist.runs.status import Saved, saved_time, standing
from uniemox_dist.scheduler.commands import JobState


def summary(
    folder: RunFolder,
    config: Mapping[str, Any],
    events: Sequence[Line],
    past: History,
    lock: Lock,
    now: float,
    answers: Mapping[int, JobState] | None = None,
) -> dict[str, Any]:
    """What the first sentence and the figures below it say; None is what is not known. `answers` are Slurm's about the
    run's jobs."""
    model, data, losses = (config.get(section) or {} for section in ("model", "data", "loss"))
    batch = (config.get("batch") or {}).get("global_batch")
    starts = [event for event in of(events, "start") if is_number(event.get("time"))]
    last = starts[-1] if starts else {}
    step = steps_done(events, past.lines)
    epochs = past.lines[-1].get("epoch") if past.lines else None
    length = run_length(config, events, past.lines, step)
    newest = newest_complete(folder.checkpoints)
    saved = Saved(newest.step, saved_time(newest.info, newest.completed)) if newest is not None else None
    job = job_of(jobs_of(folder.path), answers)
    stands = standing(events, past.lines, config, lock, length, step=step, saved=saved, now=now, job=job)
    learns = any(term.teacher and losses.get(term.name) for term in LOSS_TERMS)
    return {
        "parameters": _parameters(newest),
        "model": model,
        "teacher": (config.get("teacher") or {}).get("name") if learns else None,
        "teacher_source": last.get("teacher"),
        "ranks": last.get("ranks"),
        "earlier_ranks": list(
            dict.fromkeys(s.get("ranks") for s in starts if s.get("ranks") != last.get("ranks"))
        ),
        "precision": last.get("precision"),
        "zero": (config.get("zero") or {}).get("stage"),
        "step": step,
        "max_steps": f"{'' if length.exact else 'about '}{length.steps:,}" if length.steps else None,
        "share": min(1.0, step / length.steps) if length.steps else None,
        "samples": f"{step * batch:,}" if batch else None,
        "epochs": f"{step * epochs / past.lines[-1]['step']:.3g}" if epochs else None,
        "held_out": bool(data.get("eval_path")),
        "started": moment(starts[0]["time"]) if starts else None,
        "state": stands,
    }


def _parameters(newest: Checkpoint | None) -> str | None:
    """Size of the student, from the newest checkpoint (which lists all shapes)."""
    shapes = newest.info.get("parameters") if newest is not None else None
    if not isinstance(shapes, dict):
        return None
    millions = sum(math.prod(shape) for shape in shapes.values()) / 1e6
    return f"{millions:.2f} M" if millions < 10 else f"{millions:.0f} M"
