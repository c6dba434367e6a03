"""How long before its time limit a job must be told to save."""

from dataclasses import dataclass

from launch.plan.checkpoints import checkpoint_size, estimated_save
from launch.plan.measured import measured
from launch.plan.teacher import tower_of
from uniemox_dist.config.schema import Config
from uniemox_dist.core.formatting import duration
from uniemox_dist.models.parameters import student_parameters
from uniemox_dist.runs.folder import RunFolder

STEP_S = 30.0
"""Assumed of a step that nobody has measured."""


@dataclass(frozen=True)
class Lead:
    """Seconds before a time limit at which a run must be told: it ends its step, and waits for a save that may be under
    way before it makes its own."""

    seconds: float
    source: str
    """Where the number comes from."""

    def __float__(self) -> float:
        return self.seconds


def needed_s(
    config: Config,
    run: RunFolder | None,
    *,
    ranks: int = 1,
    disk_gb_s: float | None = None,
    step_s: float | None = None,
) -> Lead:
    """Twice a save, plus a step: as the run measured them, or else estimated.

    Args:
        run: the run's folder, if it has run before.
        ranks: that save, where the save is estimated.
        disk_gb_s: what the disk takes from all ranks together, 10^9 bytes per second, for an estimate.
        step_s: an estimate of a step, where none was measured.
    """
    seen = measured(run) if run is not None and run.path.is_dir() else None
    if seen is not None and seen.save_s is not None:
        save_s, save_source = seen.save_s, f"the longest of the last saves measured, {seen.save_s:.3g} s"
    else:
        tower = tower_of(config)
        parameters = student_parameters(config.model, config.loss, tower.embedding_width)
        save = estimated_save(checkpoint_size(config, parameters, ranks), disk_gb_s)
        save_s, save_source = save.seconds, f"a save estimated at {save.seconds:.3g} s (with {save.source})"
    if seen is not None and seen.step_s is not None:
        step, step_source = seen.step_s, f"a step measured, {seen.step_s:.3g} s"
    elif step_s is not None:
        step, step_source = step_s, f"a step estimated at {step_s:.3g} s"
    else:
        step, step_source = STEP_S, f"{duration(STEP_S)} for a step that was not measured"
    return Lead(2 * save_s + step, f"2 x {save_source}, plus {step_source}")
