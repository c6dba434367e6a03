"""How passes and reductions are computed on the device at hand: all in one place, and nothing that changes a result
beyond rounding."""

import os
import shutil
from typing import Any

import torch

from uniemox_dist.config.schema import ComputeConfig
from uniemox_dist.core.errors import UserError
from uniemox_dist.models.classifier import Classifier
from uniemox_dist.models.student import Student

BUCKET = 25_000_000
"""Gradients that are reduced together: small enough that the first reduction starts early in the backward pass and that
the buckets (two, with overlap) cost little memory; DeepSpeed's 5·10^8 is more than most students have."""


def zero_settings(stage: int, device: torch.device, world_size: int) -> dict[str, Any]:
    """DeepSpeed's section `zero_optimization`."""
    if stage == 0:
        return {"stage": 0}
    return {
        "stage": stage,
        # Reduces gradients on a stream of its own while the backward pass goes on; stage 1 does so in the last
        # micro-batch of a step. On CPUs there are no streams, and with one rank there is nothing to reduce: what
        # is left of it then is that the host waits for the device after each backward pass.
        "overlap_comm": device.type == "cuda" and world_size > 1,
        # Gradients are copied into the bucket as they come and freed; without it they are flattened once more.
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET,
    }


def check_compiler(compute: ComputeConfig, device: torch.device) -> None:
    """torch.compile generates C++ on a CPU; on a GPU Triton builds its launchers with a C compiler.

    Raises:
        UserError: if there is none on this node.
    """
    if not compute.compile:
        return
    kind, variable, names = ("C++", "CXX", ["g++"])
    if device.type == "cuda":
        kind, variable, names = ("C", "CC", ["gcc", "clang"])
    names = [os.environ[variable]] if os.environ.get(variable) else names
    if not any(map(shutil.which, names)):
        raise UserError(
            f"compute.compile=true needs a {kind} compiler on a {'GPU' if device.type == 'cuda' else 'CPU'}, and "
            f"there is no {' or '.join(names)}; install one, or set compute.compile=false"
        )


def prepare(student: Student | Classifier, compute: ComputeConfig, device: torch.device) -> None:
    """Settles how a student's passes are computed."""
    if device.type == "cuda":
        # fp32 means fp32: it is chosen for comparing, and whoever wants speed has bf16. TF32 is off for matrix
        # products anyway; torch leaves it on for convolutions, which would touch a teacher in fp32.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    parts: list[Any] = [student.encoder] if student.decoder is None else [student.encoder, student.decoder]
    for part in parts:
        part.grad_checkpointing = compute.checkpoint_blocks
        if compute.compile:
            for block in part.blocks:
                # Block by block: equal blocks share one graph, and ZeRO-3 gathers and frees weights between them.
                # Shapes never change within a run. Random numbers are drawn as without compilation.
                block.compile(dynamic=False, options={"fallback_random": True})
