"""Learning rate by step (linear warm-up, then a half-cycle cosine), and the weights of the losses. DeepSpeed's own
schedule is not used, since it counts skipped steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from uniemox_dist.config.losses import LossConfig
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """The resolved length of a run and its learning rates."""

    max_steps: int
    warmup_steps: int
    peak_lr: float
    min_lr: float
    epoch_samples: int
    loss: LossConfig = field(default_factory=LossConfig)

    @classmethod
    def from_config(cls, config: Config, epoch_samples: int) -> "Schedule":
        """Derives steps from epochs."""
        G = config.batch.global_batch
        max_steps = config.run.max_steps or math.ceil(float(config.run.epochs or 0) * epoch_samples / G)
        optim = config.optim
        if optim.warmup_steps is not None:
            warmup = optim.warmup_steps
        elif optim.warmup_epochs is not None:
            warmup = math.ceil(optim.warmup_epochs * epoch_samples / G)
        else:
            warmup = max_steps // 10
        if warmup >= max_steps:
            raise UserError(
                f"optim.warmup_steps or optim.warmup_epochs: warm-up of {warmup} steps does not fit in a run of "
                f"{max_steps} steps; shorten one or lengthen the other"
            )
        return cls(max_steps, warmup, optim.blr * G / 256, optim.min_lr, epoch_samples, config.loss)

    def lr(self, step: int) -> float:
        """The learning rate of the update that ends step `step` (0-based)."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def loss_weights(self, step: int) -> dict[str, float]:
        """The weight of every loss by its name in step `step` (0-based)."""
        share = step / max(1, self.max_steps - 1)
        return {
            name: weight * _interpolate(self.loss.schedule.get(name), share)
            for name, weight in self.loss.weights.items()
        }


def _interpolate(points: Sequence[tuple[float, float]] | None, share: float) -> float:
    """The value at `share` of the line through some points, constant before the first and after the last."""
    if points is None:
        return 1.0
    shares, factors = zip(*points)
    return float(np.interp(share, shares, factors))
