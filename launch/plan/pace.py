"""The duration of a run, from a stated, measured or assumed pace; and the measurements of an earlier run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from uniemox_dist.config.schema import Config
from uniemox_dist.config.yaml_text import parse_yaml
from uniemox_dist.core.devices import Device
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import describe_missing_folder
from uniemox_dist.core.formatting import is_number
from uniemox_dist.models.flops import Flops
from uniemox_dist.runs.folder import RunFolder, is_run, read_lines
from uniemox_dist.runs.history import select_sections

ASSUMED_MFU = 0.3
"""Model FLOP utilisation if none was stated or measured: a guess, well below what GPUs can reach."""
RECENT = 50
"""A pace is the median of this many last lines of metrics.jsonl."""
METRICS_BYTES = 1 << 18
PACE_SETTINGS = (
    *("model.width", "model.depth", "model.patch_size", "model.image_size", "model.mlp_ratio"),
    *("model.mask_ratio", "batch.micro_batch", "optim.precision", "compute.checkpoint_blocks"),
    *("compute.compile", "zero.stage", "teacher.source", "finetune.persons"),
)
"""Settings on which the pace of a rank depends."""
SAVES = 10
"""Number of last saves that are evaluated."""


@dataclass(frozen=True)
class Pace:
    """Samples per second of all ranks together."""

    samples_per_s: float
    mfu: float | None
    """The corresponding model FLOP utilisation; None if the device's peak is unknown."""
    source: str
    """How the pace was obtained."""
    assumed: bool = False
    """True if the pace was neither stated nor measured."""


def run_steps(config: Config, epoch_samples: int) -> int:
    """Optimizer steps of the whole run: run.max_steps, or ceil(epochs x samples / global batch)."""
    if config.run.max_steps is not None:
        return config.run.max_steps
    assert config.run.epochs is not None
    return max(1, math.ceil(config.run.epochs * epoch_samples / config.batch.global_batch))


@dataclass(frozen=True)
class Measured:
    """Measurements of one run; None for what its files do not contain."""

    samples_per_s: float | None = None
    """Samples per second of all its ranks together."""
    step_s: float | None = None
    mfu: float | None = None
    tflops_per_s: float | None = None
    """Useful FLOPs of one rank, 10^12 per second."""
    ranks: int | None = None
    save_s: float | None = None
    """The longest of its last saves, from the copy to the final rename."""
    waits_s: float | None = None
    """The median time that steps waited for a save."""
    run: str = ""
    """The run's folder, if an option named it."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The sections of its config.yaml, if an option named it."""


def find_pace(
    config: Config,
    flops: Flops,
    device: Device,
    precision: str,
    ranks: int,
    *,
    mfu: float | None = None,
    samples_per_s: float | None = None,
    earlier: Measured | None = None,
) -> Pace | None:
    """The pace of a run as stated, measured by an earlier run, or assumed; None if its device's peak is unknown.

    Raises:
        UserError: if an MFU is stated for a device whose peak is not known.
    """
    peak = config.compute.peak_tflops or device.peak(precision)
    rank_flops = peak * 1e12 if peak else None

    def share(pace: float) -> float | None:
        return pace * flops.training / ranks / rank_flops if rank_flops else None

    if samples_per_s is not None:
        return Pace(samples_per_s, share(samples_per_s), "--samples-per-s")
    if earlier is not None and earlier.samples_per_s is not None:
        if earlier.ranks and earlier.ranks != ranks:
            pace = earlier.samples_per_s * ranks / earlier.ranks
            words = (
                f"--from-run: {earlier.samples_per_s:,.4g} samples/s on {earlier.ranks} ranks, in proportion"
            )
        else:
            pace, words = earlier.samples_per_s, "--from-run"
        return Pace(pace, share(pace), words)
    if rank_flops is None:
        if mfu is not None:
            raise UserError(
                f"--mfu={mfu:g}: the peak of {device.name} in {precision} is not known; set compute.peak_tflops, or "
                "give --samples-per-s"
            )
        return None
    used = ASSUMED_MFU if mfu is None else mfu
    pace = used * rank_flops * ranks / flops.training
    return Pace(pace, used, "--mfu" if mfu is not None else "assumed", assumed=mfu is None)


def read_measured_pace(run: RunFolder) -> Measured:
    """Reads a run's metrics and events."""
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
    """Reads the measurements of a run that an option names.

    Raises:
        UserError: if it is not a run's folder, or has no pace yet.
    """
    if not path.is_dir():
        problem = describe_missing_folder(path)
        raise UserError(f"{option}={path}: {problem}; give run.dir/run.name of an earlier run")
    if not is_run(path):
        raise UserError(f"{option}={path}: holds no config.yaml and no events.jsonl; give run.dir/run.name")
    run = RunFolder(path)
    try:
        found = read_measured_pace(run)
    except OSError as error:
        raise UserError(f"{option}={path}: cannot be read ({error.strerror}); give another run") from None
    if not found.samples_per_s:
        raise UserError(
            f"{option}={path}: {run.metrics.name} has no line with samples_per_s; let the run log one (run.log_every)"
        )
    try:
        settings = select_sections(parse_yaml(run.config.read_text(encoding="utf-8"), str(run.config)))
    except (OSError, ValueError):  # a run without settings has measurements all the same
        settings = {}
    return replace(found, run=str(path), settings=settings)


def compare_settings(config: Config, earlier: Measured) -> str | None:
    """Compares a run with the one whose pace it takes; returns a remark about settings that change the pace.

    Raises:
        UserError: if one is a fine-tuning run and the other is not.
    """
    there, here = earlier.settings, config.model_dump(mode="json")
    if not there:
        return None
    kinds = {True: "a fine-tuning run", False: "a pretraining run"}
    if ("finetune" in there) != ("finetune" in here):
        raise UserError(
            f"--from-run={earlier.run}: is {kinds['finetune' in there]}, and this plan is for "
            f"{kinds['finetune' in here]}; give a run of the same kind, or --samples-per-s"
        )
    differing = []
    for name in PACE_SETTINGS:
        section, _, key = name.partition(".")
        before, now = (settings.get(section, {}).get(key) for settings in (there, here))
        if before is not None and now is not None and before != now:
            differing.append(f"{name}={before} (here {now})")
    if not differing:
        return None
    return f"--from-run={earlier.run} had {', '.join(differing)}: the pace may not hold here; --samples-per-s states it"


def _median(lines: list[dict[str, Any]], key: str) -> float | None:
    values = [line[key] for line in lines if is_number(line.get(key))]
    return median(values) if values else None
