"""Shared code of the onnxruntime detectors: opening a session, and non-maximum suppression."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from uniemox_dist.core.errors import UserError, install_command

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


def open_session(weights: bytes, *, threads: int, persons: str) -> InferenceSession:
    """Opens a CPU session for the bytes of an ONNX file; `persons` is the user's value of `--persons`.

    Raises UserError if onnxruntime is not installed, and onnxruntime's own error for bytes that it rejects.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"--persons {persons} needs onnxruntime; run {install_command('persons')}, or use --persons none"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = min(threads, usable_cpus())
    options.inter_op_num_threads = 1
    # Waiting threads sleep; by default they spin and take the cores of other workers.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"])


def usable_cpus() -> int:
    """CPUs that this process may use; under Slurm often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def suppress(boxes_N4: np.ndarray, scores_N: np.ndarray, max_iou: float) -> list[int]:
    """Greedy non-maximum suppression: returns the kept indices by falling score (ties: the earlier cell first).

    A box is dropped if its intersection over union with a better kept one exceeds `max_iou`.
    """
    order = np.argsort(-scores_N, kind="stable")
    areas_N = np.prod(boxes_N4[:, 2:] - boxes_N4[:, :2], axis=1)
    kept: list[int] = []
    while order.size:
        best, order = int(order[0]), order[1:]
        kept.append(best)
        low = np.maximum(boxes_N4[best, :2], boxes_N4[order, :2])
        high = np.minimum(boxes_N4[best, 2:], boxes_N4[order, 2:])
        overlap = np.prod(np.clip(high - low, 0.0, None), axis=1)
        union = areas_N[best] + areas_N[order] - overlap
        order = order[overlap <= max_iou * union]
    return kept
