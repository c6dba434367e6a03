"""Memory of one GPU by part, for ZeRO stages and micro-batches, and the recommended choice."""

from collections.abc import Iterable
from dataclasses import dataclass

from launch.plan.activations import count_activations, count_view_bytes, teacher_bytes
from launch.plan.engine import engine_memory
from launch.plan.model import Tower
from launch.plan.ranks import micro_batches
from uniemox_dist.config.schema import Config
from uniemox_dist.core.devices import Device
from uniemox_dist.models.parameters import Parameter

SMALLER, LARGER = 2, 3
"""Number of smaller and of larger micro-batches listed besides the recipe's."""
CONTEXT_BYTES = 1.0e9
"""Assumed outside torch's allocator on a GPU: CUDA context, kernels, cuBLAS's workspace, NCCL's buffers."""


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one rank."""

    stage: int
    micro_batch: int
    precision: str
    weights: int
    gradients: int
    optimiser: int
    ema: int
    activations: int
    teacher: int
    """Weights of its picture tower."""
    buffers: int
    """ZeRO's buckets."""
    views: int
    """Pixels and masks of this micro-batch and the next."""
    context: int
    """Outside torch's allocator; 0 on a CPU."""
    allocated: int
    """Peak of everything except the context. It is less than the sum of the parts, because activations are freed while
    gradients are allocated."""

    @property
    def total(self) -> int:
        """Memory that the device must have."""
        return self.allocated + self.context

    def fits(self, device: Device) -> bool | None:
        """Whether the device has enough, with a margin; None if its memory is unknown."""
        return None if device.usable_bytes is None else self.total <= device.usable_bytes


def choose_precision(config: Config, device: Device, stage: int) -> str:
    """The number format of a run on a device. `auto` is bf16 on a GPU that supports it, and fp32 elsewhere and in
    stage 0. On a CPU a run measures which is faster; a plan assumes fp32."""
    if config.optim.precision != "auto":
        return config.optim.precision
    return "bf16" if device.has_bf16 and stage else "fp32"


def count_memory(
    config: Config,
    parameters: tuple[Parameter, ...],
    tower: Tower,
    device: Device,
    *,
    stage: int,
    micro_batch: int,
    ranks: int,
    checkpointed: bool,
) -> Memory:
    """Counts the memory of one choice; `checkpointed` means with compute.checkpoint_blocks."""
    precision, gpu = choose_precision(config, device, stage), device.is_gpu
    engine = engine_memory(config, parameters, stage=stage, ranks=ranks, precision=precision, gpu=gpu)
    acts = count_activations(config, tower, micro_batch, precision, gpu=gpu)
    teacher = tower.parameters * teacher_bytes(config, gpu=gpu)
    views = count_view_bytes(config, micro_batch)
    always = engine.optimiser + engine.ema + teacher + views
    accumulates = config.batch.global_batch // ranks > micro_batch
    # Gradients of earlier micro-batches stay in memory, and so does ZeRO-3's buffer for them.
    earlier = engine.gradients if accumulates or stage == 3 else 0
    passes = max(
        acts.peak(checkpointed=checkpointed) + earlier,
        engine.gradients + acts.first + acts.encoder.moment,
        acts.teacher + earlier,
    )
    # ZeRO-3 allocates its buckets at the start, the other stages with the first gradient.
    training = engine.weights + engine.buffers + passes
    update = engine.resting + engine.gradients + engine.step_copy + (engine.buffers if stage == 3 else 0)
    return Memory(
        stage=stage,
        micro_batch=micro_batch,
        precision=precision,
        weights=engine.weights,
        gradients=engine.gradients,
        optimiser=engine.optimiser,
        ema=engine.ema,
        activations=max(acts.peak(checkpointed=checkpointed), acts.teacher),
        teacher=teacher,
        buffers=engine.buffers,
        views=views,
        context=round(CONTEXT_BYTES) if gpu else 0,
        allocated=always + max(training, update),
    )


def choose_micro_batches(config: Config, ranks: int) -> list[int]:
    """Legal micro-batches around the recipe's, ascending."""
    legal = micro_batches(config, ranks)
    here = legal.index(config.batch.micro_batch)
    return legal[max(0, here - SMALLER) : here + LARGER + 1]


def list_stages(config: Config) -> list[int]:
    """ZeRO stages that the settings allow: stage 0 works in fp32 only."""
    return [1, 2, 3] if config.optim.precision == "bf16" else [0, 1, 2, 3]


def recommend(choices: Iterable[Memory], device: Device, micro_batch: int) -> Memory | None:
    """The smallest ZeRO stage (except 0, which is for debugging) in which the recipe's micro-batch fits, or else any
    micro-batch; and the largest micro-batch that fits in that stage. None if nothing fits, or the device's memory is
    unknown."""
    fitting = [c for c in choices if c.stage and c.fits(device)]
    if not fitting:
        return None
    stages = {c.stage for c in fitting if c.micro_batch >= micro_batch} or {c.stage for c in fitting}
    return max((c for c in fitting if c.stage == min(stages)), key=lambda c: c.micro_batch)
