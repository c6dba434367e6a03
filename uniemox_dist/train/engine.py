"""Builds the DeepSpeed engine and its optimizer from the configuration, and sets how passes are computed."""

import logging
import math
import time
import warnings
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from uniemox_dist.checkpoints.folders import Checkpoint
from uniemox_dist.config.load import merge
from uniemox_dist.config.schema import Config, OptimConfig
from uniemox_dist.core.devices import peak_tflops
from uniemox_dist.core.errors import UserError
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.deepspeed_internals import import_deepspeed, take_over_checks
from uniemox_dist.distributed.world import World
from uniemox_dist.models.classifier import Classifier
from uniemox_dist.models.compilation import (
    compile_options,
    find_obstacle,
    tolerate_failures,
    use_private_cache,
)
from uniemox_dist.models.parameters import optimizer_group
from uniemox_dist.models.student import Student

log = logging.getLogger("uniemox")
MEASURED = 8
"""Number of matrix products that are timed in each number format to choose a CPU's precision."""
CLEARLY = 0.7
"""bf16 is chosen if it takes less than this share of fp32's time; a smaller gain is not worth its rounding."""
BUCKET = 25_000_000
"""Elements of gradients that are reduced together. With this size the first reduction starts early in the backward
pass, and the buckets (two, with overlap) take little memory. DeepSpeed's default of 5·10^8 is larger than most
students."""


class Engine(Protocol):
    """The parts of DeepSpeed's engine that training uses."""

    module: nn.Module
    device: torch.device
    optimizer: Any

    def __call__(self, *args: Any) -> Any: ...
    def backward(self, loss: Tensor) -> Any: ...
    def step(self) -> Any: ...
    def is_gradient_accumulation_boundary(self) -> bool: ...
    def zero_optimization(self) -> bool: ...
    def zero_optimization_stage(self) -> int: ...


def choose_precision(wanted: str, device: torch.device) -> str:
    """Resolves `auto`: bf16 on a GPU that supports it, and on a CPU if a measurement here shows that its matrix
    products are clearly faster; otherwise fp32."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    seconds = {"fp32": math.inf, "bf16": math.inf}
    for _ in range(MEASURED):  # alternates, so that other work affects both
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            a = torch.ones(256, 256, dtype=dtype)
            start = time.perf_counter()
            a @ a
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return "bf16" if seconds["bf16"] < CLEARLY * seconds["fp32"] else "fp32"


def resolve_precision(config: Config, device: torch.device, checkpoint: Checkpoint | None) -> str:
    """The run's precision. `auto` is resolved once: a resumed run keeps that of its checkpoint on any machine."""
    if config.optim.precision != "auto":
        return config.optim.precision
    if config.zero.stage == 0:
        return "fp32"
    if checkpoint is not None:
        return str(checkpoint.info["precision"])
    return choose_precision("auto", device)


def device_peak(config: Config, precision: str, device: torch.device) -> float | None:
    """The device's peak for the student's matrix products, 10^12 operations per second; None if unknown."""
    if config.compute.peak_tflops is not None or device.type != "cuda":
        return config.compute.peak_tflops
    tf32 = precision == "fp32" and torch.get_float32_matmul_precision() != "highest"
    return peak_tflops(torch.cuda.get_device_name(device), "tf32" if tf32 else precision)


def decide_compile(config: Config, world: World, device: torch.device) -> bool:
    """Resolves `compute.compile` alike on all ranks, and prepares the cache of compiled code. Collective.

    Raises:
        UserError: if compute.compile=true cannot work on a node.
    """
    wanted = config.compute.compile
    if not wanted or (wanted == "auto" and device.type != "cuda"):
        return False
    obstacle = find_obstacle(device.type)
    if wanted != "auto":
        collectives.on_all(world, lambda: _require_compiler(obstacle))
    elif obstacles := [found for found in collectives.gather_objects(obstacle, world) if found]:
        if world.is_main:
            log.warning("compute.compile=auto: off, because %s", obstacles[0])
        return False
    else:
        tolerate_failures()
    cache = use_private_cache()
    if world.is_main:
        log.info("compiles the passes in the first step; compiled code is kept in %s", cache)
    return True


def _require_compiler(obstacle: str | None) -> None:
    if obstacle:
        raise UserError(f"compute.compile=true: {obstacle}; install it, or set compute.compile=false")


def graphs_fit(config: Config, world_size: int) -> bool:
    """Returns whether the student's passes can be CUDA graphs: their weights must stay in place, and their gradients
    must be used before the next micro-batch. ZeRO-2 copies gradients at once; stages 0 and 1 keep them until the step.
    """
    if config.zero.stage == 3 or config.compute.checkpoint_blocks:
        return False
    return config.zero.stage == 2 or config.batch.grad_accum(world_size) == 1


def zero_settings(stage: int, device: torch.device, world_size: int) -> dict[str, Any]:
    """DeepSpeed's section `zero_optimization`."""
    if stage == 0:
        return {"stage": 0}
    return {
        "stage": stage,
        # Reduces gradients on a separate stream during the backward pass; stage 1 does so in the last micro-batch of a
        # step. CPUs have no streams, and one rank has nothing to reduce; the only effect would be that the host waits
        # for the device after each backward pass.
        "overlap_comm": device.type == "cuda" and world_size > 1,
        # Copies each gradient into the bucket and frees it; otherwise gradients are flattened in another copy.
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET,
    }


def deepspeed_config(config: Config, world_size: int, precision: str, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's own configuration, with the passthrough section merged last."""
    ours: dict[str, Any] = {
        "train_batch_size": config.batch.global_batch,
        "train_micro_batch_size_per_gpu": config.batch.micro_batch,
        "gradient_accumulation_steps": config.batch.grad_accum(world_size),
        "zero_optimization": zero_settings(config.zero.stage, device, world_size),
        # train/step.py checks and clips gradients.
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": False},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        # These timers would synchronise host and device around each micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
    return {**merge(ours, config.deepspeed), "gradient_clipping": 0.0}


def _describe_refusal(config: Config, error: Exception) -> str:
    if isinstance(error, ValidationError):
        why = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    else:
        why = " ".join(str(error).split()) or type(error).__name__
    return f"deepspeed={config.deepspeed}: DeepSpeed does not accept it ({why[:300]}); correct or remove these keys"


def find_clip_grad(config: Config) -> float:
    """The largest norm of gradients, 0 for none; DeepSpeed's own name of the setting takes precedence."""
    return float(config.deepspeed.get("gradient_clipping", config.optim.clip_grad))


def set_compute_options(
    student: Student | Classifier, config: Config, world_size: int, device: torch.device, *, compiles: bool
) -> None:
    """Sets number formats, checkpointed blocks and compilation."""
    if device.type == "cuda":
        # fp32 is chosen for comparisons, so it is exact; bf16 is for speed. TF32 is off for matrix
        # products anyway; torch leaves it on for convolutions, which would affect a teacher in fp32.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    parts: list[Any] = [student.encoder] if student.decoder is None else [student.encoder, student.decoder]
    for part in parts:
        part.grad_checkpointing = config.compute.checkpoint_blocks
    if compiles:
        graphs = config.compute.cuda_graphs and graphs_fit(config, world_size)
        student.compile_parts(compile_options(cuda_graphs=graphs))
        if graphs:  # a pass may overwrite the outputs of the one before
            student.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())


def parameter_groups(
    module: nn.Module, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups of parameters with the same weight decay and learning rate; none is empty.

    A group's `lr_scale` is layer_decay^(depth + 1 - layer), by which the step multiplies the learning rate.
    Without layer decay there are two groups: matrices, and all other parameters (biases, norms, tokens, fusion
    weights).
    """
    depth = len(getattr(getattr(module, "encoder", None), "blocks", ()))
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            group = optimizer_group(name, parameter.ndim, depth, layer_decay)
            found.setdefault(group, []).append(parameter)
    return [
        {"params": found[scale, matrix], "lr_scale": scale, "weight_decay": weight_decay if matrix else 0.0}
        for scale, matrix in sorted(found, reverse=True)
    ]


def make_optimizer(module: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Makes AdamW for a module that is on its device.

    Torch's fused kernel makes one pass over memory instead of a dozen, on CPUs and GPUs (ViT-B on one core: 0.13 s per
    step instead of 0.7 s). DeepSpeed's own optimizer would compile a C++ extension at first use.
    """
    groups = parameter_groups(module, optim.weight_decay, optim.layer_decay)
    settings: dict[str, Any] = {"lr": 0.0, "betas": optim.betas, "eps": optim.eps, "fused": True}
    return torch.optim.AdamW(groups, **settings)


def make_engine(
    student: Student | Classifier,
    config: Config,
    world: World,
    precision: str,
    device: torch.device,
    *,
    compiles: bool = False,
) -> Engine:
    """Wraps a module in DeepSpeed's engine, with its optimizer.

    Args:
        compiles: whether the passes are compiled, from `decide_compile`.
    """
    warnings.filterwarnings("ignore", module="deepspeed")
    # torch warns that DeepSpeed calls its collectives by old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    deepspeed = import_deepspeed()
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if precision == "bf16":
        student = student.bfloat16()
    student = student.to(device)
    set_compute_options(student, config, world.size, device, compiles=compiles)
    settings = deepspeed_config(config, world.size, precision, device)
    try:
        engine, *_ = deepspeed.initialize(
            model=student,
            optimizer=make_optimizer(student, config.optim),
            config=settings,
            dist_init_required=False,
        )
    except (ValueError, TypeError, AttributeError, KeyError, AssertionError, NotImplementedError) as error:
        if not config.deepspeed:
            raise
        # All ranks have the same settings; one reports the problem.
        raise UserError(_describe_refusal(config, error) if world.is_main else "") from error
    take_over_checks(engine)
    made: Engine = engine
    return made
