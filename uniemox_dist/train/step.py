"""One optimizer step: gather the step's texts, then forward and backward each micro-batch, then update.

Shape legend: B samples of a micro-batch, K = B·accumulation samples of a rank's step, G global batch, E width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uniemox_dist.config.losses import LOSS_NAMES
from uniemox_dist.config.schema import Config, ModelConfig
from uniemox_dist.core.signals import STOP_SIGNALS
from uniemox_dist.data.loader import MicroBatch
from uniemox_dist.data.masks import PERSON_VIEW, SCENE_VIEW, choose_patch_order, draw_drop_paths
from uniemox_dist.distributed.collectives import gather_rows, sum_over_ranks
from uniemox_dist.distributed.world import World
from uniemox_dist.models.drop_path import find_drop_paths, set_draws
from uniemox_dist.models.student import Targets, Views
from uniemox_dist.teacher.model import Teacher
from uniemox_dist.train.monitor import nonfinite
from uniemox_dist.train.monitor.stragglers import OwnTime


@dataclass(frozen=True)
class StepResult:
    """What all ranks know alike after a step."""

    loss: float
    parts: dict[str, float]
    """Of the loss, by name, before they are weighted."""
    grad_norm: float
    applied: bool
    """False: the loss or a gradient was not finite, and no weight changed."""
    stop: bool
    """Whether any rank was asked to stop."""
    damaged: int
    """Samples replaced in this step, over all ranks."""
    keys: int
    """Samples of this step, over all ranks."""
    written: int = 0
    """Ranks whose part of a save under way is written."""
    evidence: dict[str, Any] | None = None
    """Of a step that was not applied, what this rank saw."""
    signal: str | None = None
    """What asked a rank to stop; of several signals, the one that the most ranks got."""


def gather_texts(batches: Sequence[MicroBatch], streams: int, world: World, device: torch.device) -> Tensor:
    """Λ: the text embeddings of all samples of the step in slot order, G×E, gathered once."""
    texts_KE = torch.cat([b.texts_BE for b in batches if b.texts_BE is not None]).to(device)
    rows = gather_rows(texts_KE, world.size)
    # Rank r holds, turn after turn, the slots of its own neighbouring streams; slot order is turn-major.
    turns = texts_KE.shape[0] * world.size // streams
    return rows.view(world.size, turns, streams // world.size, -1).transpose(0, 1).reshape(rows.shape)


def views_of(batch: MicroBatch, model: ModelConfig, seed: int) -> Views:
    """What the student sees: the two views with their masks, which depend on seed, slot and persons alone."""
    person = batch.person_B3HW
    return Views(
        scene_B3HW=batch.scene_B3HW,
        person_B3HW=person,
        scene_order_BN=choose_patch_order(model, batch.slots_B, SCENE_VIEW, seed, batch.on_person_BN),
        person_order_BN=None
        if person is None
        else choose_patch_order(model, batch.slots_B, PERSON_VIEW, seed),
    )


def draw_paths(engine: Any, batch: MicroBatch, config: Config) -> None:
    """Settles which branches a micro-batch's samples do without (`model.drop_path`): by slot, on every rank alike."""
    if config.model.drop_path:
        paths = find_drop_paths(engine.module)
        set_draws(paths, draw_drop_paths(batch.slots_B, config.run.seed, len(paths)))


def train_step(
    engine: Any,
    teacher: Teacher | None,
    batches: Sequence[MicroBatch],
    config: Config,
    world: World,
    *,
    lr: float,
    logit_scale: float = 100.0,
    loss_weights: dict[str, float] | None = None,
    stop: str | None = None,
    written: bool = True,
    step: int = 0,
    own_time: OwnTime | None = None,
) -> StepResult:
    """One update of the weights from one global batch; collective over all ranks.

    Args:
        teacher: the live one; None where no loss compares with it, or the batches bring its embeddings along.
        logit_scale: the teacher's, for relations as KL.
        loss_weights: of the losses by name in this step; None: those of the configuration.
        stop, written: what this rank has to tell the others: the signal that asked it to stop, that it has nothing to
            write.
        step: its number, for the evidence of a step that cannot be applied.
        own_time: is given the time that this rank computes without waiting for another.
    """
    device = engine.device
    texts_GE = None
    if config.loss.needs_texts and config.loss.relation_over == "global":
        texts_GE = gather_texts(batches, config.batch.streams, world, device)

    def losses(batch: MicroBatch) -> tuple[Tensor, Tensor]:
        pictures_BE = batch.pictures_BE
        if pictures_BE is None and teacher is not None:
            pictures_BE = teacher.embed_pictures(batch.scene_B3HW)
        texts = batch.texts_BE if texts_GE is None else texts_GE
        targets = Targets(pictures_BE, texts, logit_scale, loss_weights)
        draw_paths(engine, batch, config)
        found: tuple[Tensor, Tensor] = engine(views_of(batch, config.model, config.run.seed), targets)
        return found

    return update(
        engine,
        losses,
        batches,
        world,
        lr=lr,
        parts=LOSS_NAMES,
        stop=stop,
        written=written,
        step=step,
        own_time=own_time,
    )


def update(
    engine: Any,
    losses: Callable[[MicroBatch], tuple[Tensor, Tensor]],
    batches: Sequence[MicroBatch],
    world: World,
    *,
    lr: float,
    parts: Sequence[str],
    stop: str | None = None,
    written: bool = True,
    step: int = 0,
    own_time: OwnTime | None = None,
) -> StepResult:
    """One update of the weights from one global batch, whatever is learned; collective over all ranks.

    Args:
        losses: the engine's loss of a micro-batch that lies on its device, and its parts, detached.
        parts: their names.
        stop, written, step, own_time: as in `train_step`.
    """
    own_time = own_time or OwnTime(engine.device)
    device = engine.device
    # The total, its parts, five counts, and how many ranks got each of the signals that stop.
    first = 1 + len(parts)
    sums = torch.zeros(first + 5 + len(STOP_SIGNALS), dtype=torch.float64, device=device)
    for batch in batches:
        own_time.start()
        batch = batch.to(device)
        total, of_parts = losses(batch)
        own_time.stop()
        engine.backward(total)
        sums[:first] += torch.cat([total.detach().view(1), of_parts])
        if not engine.is_gradient_accumulation_boundary():
            engine.step()  # counts the micro-batch; weights change at the boundary only
    sums[:first] /= len(batches) * world.size
    for place, number in enumerate((stop is not None, written, *_counted(batches)), start=first):
        sums[place].fill_(number)
    if stop is not None:
        sums[first + 5 + [number.name for number in STOP_SIGNALS].index(stop)].fill_(1)
    gradients = nonfinite.reduced_gradients(engine)
    sums[first + 4] = nonfinite.count(list(gradients.values()), device)
    sum_over_ranks(sums)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    # The host waits for the device here, to learn whether the step may be applied.
    values = sums.tolist()
    loss = values[0]
    stops, writers, damaged, keys, bad, *signals = values[first:]
    evidence = None
    finite = math.isfinite(loss) and not bad
    if not finite:
        evidence = nonfinite.evidence(engine, gradients, batches, loss, step)
        nonfinite.poison(list(gradients.values()))
    engine.step()
    # Its own look remains: the norm of finite gradients can be too large for a number.
    applied = not engine.optimizer.overflow
    assert finite or not applied, "the engine applied a step whose gradients are not finite"
    norm = engine.get_global_grad_norm()
    return StepResult(
        loss=loss,
        parts=dict(zip(parts, values[1:first])),
        grad_norm=float(norm) if norm is not None else float("nan"),
        applied=applied,
        stop=stops > 0,
        damaged=round(damaged),
        keys=round(keys),
        written=round(writers),
        evidence=evidence,
        signal=STOP_SIGNALS[signals.index(max(signals))].name if any(signals) else None,
    )


def _counted(batches: Sequence[MicroBatch]) -> tuple[int, int]:
    """Damaged samples that were replaced, and all samples."""
    return sum(len(b.damaged) for b in batches), sum(len(b.keys) for b in batches)
