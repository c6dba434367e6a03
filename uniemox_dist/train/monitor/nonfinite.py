"""The evidence of a step that was skipped because its loss or a gradient is not finite.

DeepSpeed checks gradients differently in each stage, and never checks losses, so its checks are off. The step checks
both (train/gradients.py), in every stage and precision and on all ranks alike.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uniemox_dist.core.files import write_json
from uniemox_dist.data.loader import MicroBatch
from uniemox_dist.distributed.deepspeed_internals import is_partitioned, list_trained

log = logging.getLogger("uniemox")
SHOWN = 50
"""Tensors in the evidence: those that are not finite first, then the largest."""


def collect_evidence(
    engine: Any, gradients: dict[str, Tensor], batches: Sequence[MicroBatch], loss: float, step: int
) -> dict[str, Any]:
    """Collects this rank's evidence of a step that was skipped."""
    batch_tensors = ("scene_B3HW", "person_B3HW", "texts_BE", "pictures_BE")
    weights = {
        name: p for name, p in list_trained(engine) if not is_partitioned(p)
    }  # ZeRO-3 keeps only a part
    return {
        "step": step,
        "loss": str(loss),
        "micro_batches": [
            {
                "keys": list(batch.keys),
                "slots": batch.slots_B.tolist(),
                "tensors": [
                    {"name": name, **statistics(tensor)}
                    for name in batch_tensors
                    if (tensor := getattr(batch, name)) is not None
                ],
            }
            for batch in batches
        ],
        "gradients": _worst(gradients),
        "weights": _worst(weights),
    }


def write(path: Path, facts: dict[str, Any]) -> None:
    """Writes evidence; logs a warning if that fails."""
    try:
        write_json(path, facts)
    except OSError as error:
        log.warning("%s: %s; its evidence is lost", path, error.strerror)


@torch.no_grad()
def statistics(tensor: Tensor) -> dict[str, Any]:
    """Shape, counts of NaN and infinities, and mean and largest absolute value of the finite numbers."""
    values = tensor.detach().float()
    finite = values[values.isfinite()]
    return {
        "shape": list(tensor.shape),
        "nan": int(values.isnan().sum()),
        "infinite": int(values.isinf().sum()),
        "mean": float(f"{finite.mean().item():.6g}") if finite.numel() else None,
        "largest": float(f"{finite.abs().max().item():.6g}") if finite.numel() else None,
    }


def _worst(tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    rows = [{"name": name, **statistics(tensor)} for name, tensor in tensors.items()]
    rows.sort(key=lambda row: (row["nan"] + row["infinite"] == 0, -(row["largest"] or 0.0)))
    return rows[:SHOWN]


def list_names(facts: dict[str, Any]) -> Iterator[str]:
    """The names of the gradients that are not finite."""
    for row in facts["gradients"]:
        if row["nan"] or row["infinite"]:
            yield row["name"]
