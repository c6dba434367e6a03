"""The DeepSpeed engine, built from our configuration."""

import logging
import math
import time
import warnings
from typing import Any

import torch

from uniemox_dist.config.load import merge
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.distributed.world import World
from uniemox_dist.models.classifier import Classifier
from uniemox_dist.models.student import Student
from uniemox_dist.train.compute import prepare, zero_settings
from uniemox_dist.train.optimizer import make_optimizer

MEASURED = 8
"""Products of matrices, in each number format, by which a CPU's precision is chosen."""
CLEARLY = 0.7
"""bf16 must need less than this share of fp32's time: for less it is not worth its rounding."""


def grad_accum(config: Config, world_size: int) -> int:
    """Micro-batches of one rank in a step.

    Raises:
        UserError: if ranks and micro-batch do not divide streams and global batch.
    """
    batch = config.batch
    if batch.streams % world_size:
        fits = [w for w in range(1, batch.streams + 1) if batch.streams % w == 0]
        near = min(fits, key=lambda w: (abs(w - world_size), -w))
        raise UserError(
            f"batch.streams={batch.streams} is not a multiple of the {world_size} ranks; use {near} ranks, or a "
            f"batch.streams and batch.global_batch that {world_size} divides"
        )
    accum, rest = divmod(batch.global_batch, batch.micro_batch * world_size)
    if rest or not accum:
        per_rank = batch.global_batch // world_size
        fits = [m for m in range(1, per_rank + 1) if per_rank % m == 0]
        near = min(fits, key=lambda m: (abs(m - batch.micro_batch), m))
        raise UserError(
            f"batch.global_batch={batch.global_batch} is not a multiple of micro_batch x world_size = "
            f"{batch.micro_batch} x {world_size}; try batch.micro_batch={near}"
        )
    return accum


def choose_precision(wanted: str, device: torch.device) -> str:
    """`auto` is bf16 on a GPU that has it, and on a CPU where it multiplies matrices clearly faster, measured here."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    seconds = {"fp32": math.inf, "bf16": math.inf}
    for _ in range(MEASURED):  # in turn, and the best of each: other work on the machine must not decide
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            a = torch.ones(256, 256, dtype=dtype)
            start = time.perf_counter()
            a @ a
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return "bf16" if seconds["bf16"] < CLEARLY * seconds["fp32"] else "fp32"


def deepspeed_config(config: Config, world_size: int, precision: str, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's own configuration, with the passthrough section merged last."""
    ours: dict[str, Any] = {
        "train_batch_size": config.batch.global_batch,
        "train_micro_batch_size_per_gpu": config.batch.micro_batch,
        "gradient_accumulation_steps": grad_accum(config, world_size),
        # In stage 0 our optimizer clips, after its look at the norm.
        "gradient_clipping": config.optim.clip_grad if config.zero.stage else 0.0,
        "zero_optimization": zero_settings(config.zero.stage, device, world_size),
        "bf16": {
            "enabled": precision == "bf16",
            **({"check_grad_overflow": True} if precision == "bf16" else {}),
        },
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        # It would make the host wait for the device around each micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if key in config.deepspeed:
            raise UserError(f"deepspeed.{key}: is derived from batch.*; set it there")
    if "zero_optimization" in config.deepspeed and "stage" in (config.deepspeed["zero_optimization"] or {}):
        raise UserError("deepspeed.zero_optimization.stage: set zero.stage")
    return merge(ours, config.deepspeed)


def _import_without_compiler() -> None:
    """DeepSpeed's engine imports the kernels of an optimizer that no run uses, each to be compiled, and with them all
    of torch's compiler: three seconds of every start."""
    from deepspeed.runtime import compiler

    before, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    except ImportError:  # a version without it
        pass
    finally:
        compiler.compile = before


def make_engine(
    student: Student | Classifier, config: Config, world: World, precision: str, device: torch.device
) -> Any:
    """Wraps what is trained for ZeRO training."""
    warnings.filterwarnings("ignore", module="deepspeed")
    # torch tells DeepSpeed to call its collectives by newer names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed would compile this C++ operator at the first start on a CPU; only its inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if precision == "bf16":
        student = student.bfloat16()
    student = student.to(device)
    prepare(student, config.compute, device)
    _import_without_compiler()
    engine, *_ = deepspeed.initialize(
        model=student,
        optimizer=make_optimizer(student, config.optim, config.zero.stage),
        config=deepspeed_config(config, world.size, precision, device),
        dist_init_required=False,
    )
    return engine
