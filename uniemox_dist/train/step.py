"""One optimizer step: forward and backward of each micro-batch, one reduction over the ranks, and the update.

Shape legend: B samples of a micro-batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uniemox_dist.core.signals import STOP_SIGNALS
from uniemox_dist.data.loader import MicroBatch
from uniemox_dist.distributed.collectives import sum_over_ranks
from uniemox_dist.distributed.deepspeed_internals import read_reduced_gradients, update
from uniemox_dist.distributed.world import World
from uniemox_dist.models.drop_path import find_drop_paths, set_factors
from uniemox_dist.train.engine import Engine
from uniemox_dist.train.gradients import clip_factor, find_bad, sums_of_squares, total_norm
from uniemox_dist.train.monitor import nonfinite
from uniemox_dist.train.monitor.stragglers import ComputeTimer


@dataclass(frozen=True)
class RankStatus:
    """The status that a rank reports to the others in a step."""

    stop_signal: str | None = None
    """The signal that asked this rank to stop."""
    checkpoint_written: bool = True
    """True if this rank has written its part of the current checkpoint, or there is none."""


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step, the same on all ranks except for `evidence`."""

    loss: float
    parts: dict[str, float]
    """The terms of the loss by name, without their weights."""
    grad_norm: float
    """Norm of the gradients before clipping."""
    applied: bool
    """False: the loss or a gradient was not finite, and no weight changed."""
    stop: bool
    """True if any rank was asked to stop."""
    damaged: int
    """Samples replaced in this step, over all ranks."""
    samples: int
    """Samples of this step, over all ranks."""
    ranks_written: int = 0
    """Number of ranks that have written their part of the current checkpoint."""
    evidence: dict[str, Any] | None = None
    """For a step that was not applied: statistics of this rank's tensors."""
    signal: str | None = None
    """The signal that asked a rank to stop; of several signals the one that most ranks received."""


ComputeLoss = Callable[[MicroBatch], tuple[Tensor, Tensor]]
"""A function of a micro-batch on the engine's device. Returns the engine's loss, and its terms as a detached
vector."""


def update_weights(
    engine: Engine,
    compute_loss: ComputeLoss,
    batches: Sequence[MicroBatch],
    world: World,
    *,
    lr: float,
    term_names: Sequence[str],
    clip_grad: float = 0.0,
    step: int = 0,
    status: RankStatus = RankStatus(),
    timer: ComputeTimer | None = None,
) -> StepResult:
    """Updates the weights once from one global batch. Collective.

    Args:
        batches: this rank's micro-batches.
        lr: the learning rate; each parameter group multiplies it by its `lr_scale`.
        term_names: names of the terms that `compute_loss` returns.
        clip_grad: the largest norm of gradients; larger ones are scaled down to it. 0 clips nothing.
        step: the number of this step, for the evidence if it is not applied.
        timer: adds up the time in which this rank does not wait for other ranks.
    """
    device = engine.device
    timer = timer or ComputeTimer(device)
    # The total, its terms, four counts, and how many ranks got each of the signals that stop.
    first = 1 + len(term_names)
    sums = torch.zeros(first + 4 + len(STOP_SIGNALS), dtype=torch.float64, device=device)
    for batch in batches:
        timer.start()
        batch = batch.to(device)
        total, terms = compute_loss(batch)
        timer.stop()
        engine.backward(total)
        sums[:first] += torch.cat([total.detach().view(1), terms])
        if not engine.is_gradient_accumulation_boundary():
            engine.step()  # counts the micro-batch; weights change at the boundary only
    sums[:first] /= len(batches) * world.size
    damaged, samples = sum(len(b.damaged) for b in batches), sum(len(b.keys) for b in batches)
    counts = (status.stop_signal is not None, status.checkpoint_written, damaged, samples)
    for place, number in enumerate(counts, start=first):
        sums[place].fill_(number)
    if status.stop_signal is not None:
        names = [number.name for number in STOP_SIGNALS]
        sums[first + 4 + names.index(status.stop_signal)].fill_(1)
    stage = engine.zero_optimization_stage()
    groups = read_reduced_gradients(engine)
    sums = torch.cat([sums, sums_of_squares(groups, stage, world.size, device, clips=clip_grad > 0)])
    sum_over_ranks(sums)
    squares_G = sums[-len(groups) :]
    norm, bad = total_norm(squares_G, stage), find_bad(sums[0], squares_G)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    gradients = {name: gradient for group in groups for name, gradient in group.items()}
    factor = clip_factor(norm, bad, clip_grad) if clip_grad else None
    update(engine, list(gradients.values()), skip=bad, factor=factor)
    # The host waits for the device here and nowhere else in a step, after it has launched everything.
    skipped, grad_norm, *values = torch.cat([torch.stack([bad.double(), norm.double()]), sums]).tolist()
    loss = values[0]
    stops, writers, damaged, samples, *signals = values[first : -len(groups)]
    applied = not skipped and not getattr(engine.optimizer, "overflow", False)
    evidence = None
    if not applied:
        evidence = nonfinite.collect_evidence(engine, gradients, batches, loss, step)
    return StepResult(
        loss=loss,
        parts=dict(zip(term_names, values[1:first])),
        grad_norm=grad_norm,
        applied=applied,
        stop=stops > 0,
        damaged=round(damaged),
        samples=round(samples),
        ranks_written=round(writers),
        evidence=evidence,
        signal=STOP_SIGNALS[signals.index(max(signals))].name if any(signals) else None,
    )


def set_drop_paths(engine: Engine, batch: MicroBatch) -> None:
    """Sets which branches each sample of a micro-batch skips (`model.drop_path`)."""
    if batch.drop_factors_BL is not None:
        set_factors(find_drop_paths(engine.module), batch.drop_factors_BL)
