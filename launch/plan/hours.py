"""How long a run takes: steps, samples and FLOPs over a stated, measured or assumed pace."""

import math
from dataclasses import dataclass

from launch.plan.devices import Device
from launch.plan.measured import Measured
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.models.flops import Flops

ASSUMED_MFU = 0.3
"""Model FLOP utilisation where nothing was stated or measured: a guess, well below what is aimed at on GPUs."""


@dataclass(frozen=True)
class Pace:
    """Samples per second of all ranks together."""

    samples_per_s: float
    mfu: float | None
    """Model FLOP utilisation that goes with it; None where the device's peak is not known."""
    source: str
    """Where it comes from."""
    assumed: bool = False
    """Whether nobody has stated or measured it."""


def run_steps(config: Config, epoch_samples: int) -> int:
    """Optimizer steps of the whole run: run.max_steps, or ceil(epochs x samples / global batch)."""
    if config.run.max_steps is not None:
        return config.run.max_steps
    assert config.run.epochs is not None
    return max(1, math.ceil(config.run.epochs * epoch_samples / config.batch.global_batch))


def pace_of(
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
    """The pace of a run by what was stated of it, measured by an earlier run, or assumed; None if its device's peak is
    not known.

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
