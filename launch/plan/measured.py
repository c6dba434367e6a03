"""What an earlier run measured: its pace, its saves."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from uniemox_dist.core.errors import UserError
from uniemox_dist.core.formatting import is_number
from uniemox_dist.runs.find import is_run
from uniemox_dist.runs.folder import RunFolder, read_lines

RECENT = 50
"""Last lines of metrics.jsonl that a pace is the median of."""
METRICS_BYTES = 1 << 18
SAVES = 10
"""Last saves that are looked at."""


@dataclass(frozen=True)
class Measured:
    """Of one run, as far as its files tell."""

    samples_per_s: float | None = None
    """Of all its ranks."""
    step_s: float | None = None
    mfu: float | None = None
    tflops_per_s: float | None = None
    """Useful FLOPs of one rank, 10^12 per second."""
    ranks: int | None = None
    save_s: float | None = None
    """The longest of its last saves, from the copy to the name."""
    waits_s: float | None = None
    """The median time that steps waited for one."""


def measured(run: RunFolder) -> Measured:
    """What a run's metrics and events say."""
    lines = read_lines(run.metrics, METRICS_BYTES)[-RECENT:]
    events = read_lines(run.events)
    pace = _median(lines, "samples_per_s")
    batches = [
        line["slots"] / line["step"]
        for line in lines
        if is_number(line.get("slots")) and is_number(line.get("step")) and line["step"] > 0
    ]
    saves = [event for event in events if event.get("event") == "save"][-SAVES:]
    lengths = [event["seconds"] for event in saves if is_number(event.get("seconds"))]
    starts = [event["ranks"] for event in events if event.get("event") == "start" and "ranks" in event]
    return Measured(
        samples_per_s=pace,
        step_s=median(batches) / pace if pace and batches else None,
        mfu=_median(lines, "mfu"),
        tflops_per_s=_median(lines, "tflops_per_s"),
        ranks=starts[-1] if starts and isinstance(starts[-1], int) else None,
        save_s=max(lengths) if lengths else None,
        waits_s=_median(saves, "blocked_s"),
    )


def read_run(path: Path, option: str = "--from-run") -> Measured:
    """What a run measured that an option names.

    Raises:
        UserError: if it is no run's folder, or has no pace yet.
    """
    if not path.is_dir():
        raise UserError(f"{option}={path}: no such folder; give run.dir/run.name of an earlier run")
    if not is_run(path):
        raise UserError(f"{option}={path}: holds no config.yaml and no events.jsonl; give run.dir/run.name")
    run = RunFolder(path)
    try:
        found = measured(run)
    except OSError as error:
        raise UserError(f"{option}={path}: cannot be read ({error.strerror}); give another run") from None
    if not found.samples_per_s:
        raise UserError(
            f"{option}={path}: {run.metrics.name} has no line with samples_per_s; let the run log one (run.log_every)"
        )
    return found


def _median(lines: list[dict[str, Any]], key: str) -> float | None:
    values = [line[key] for line in lines if is_number(line.get(key))]
    return median(values) if values else None
