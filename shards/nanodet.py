"""NanoDet-g on onnxruntime: the person detector that ships with the package (see detectors/README.md).

Shapes: A anchor cells of all strides (2704 + 676 + 169 = 3549), N candidates, 4 sides (left, top, right,
bottom), K distance bins (11). Boxes are x1, y1, x2, y2.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from shards.persons import Person
from uniemox_dist.runtime.errors import UserError

MODEL_FILE = "nanodet_g_416.onnx"
SIDE_PX = 416
STRIDES_PX = (8, 16, 32)
BINS = 11
PERSON_CLASS = 0  # of the 80 COCO classes
# The converter's names, in the order of STRIDES_PX.
SCORE_OUTPUTS = ("Identity", "Identity_1", "Identity_2")
BIN_OUTPUTS = ("Identity_3", "Identity_4", "Identity_5")
BGR_MEAN = np.array([103.53, 116.28, 123.675], np.float32)
BGR_STD = np.array([57.375, 57.12, 58.395], np.float32)


class NanoDet:
    """Persons by NanoDet-g, 416 px: about 14 pictures a second on one CPU core.

    Raises UserError where onnxruntime is not installed.
    """

    name: str = "nanodet"

    def __init__(self, *, threads: int = 1, score_threshold: float = 0.5, nms_iou: float = 0.6) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(
                "--persons nanodet needs onnxruntime; install it with: "
                'pip install "uniemox-dist[persons]", or use --persons none'
            ) from error
        self.score_threshold = score_threshold
        self.nms_iou = nms_iou
        weights = (resources.files("shards") / "detectors" / MODEL_FILE).read_bytes()
        self._sha256 = hashlib.sha256(weights).hexdigest()  # of the very bytes that run
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = min(threads, usable_cpus())
        options.inter_op_num_threads = 1
        # Waiting threads sleep: by default they spin, on the cores of the packer's other workers.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"])

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sha256": self._sha256,
            "score_threshold": self.score_threshold,
            "nms_iou": self.nms_iou,
        }

    def detect(self, pictures: Sequence[np.ndarray]) -> list[list[Person]]:
        # The ONNX file fixes its batch axis at 1, so pictures go one by one.
        return [self._detect_one(picture) for picture in pictures]

    def _detect_one(self, picture: np.ndarray) -> list[Person]:
        outputs = self._session.run(SCORE_OUTPUTS + BIN_OUTPUTS, {"input_1": preprocess(picture)})
        scores_A = np.concatenate([scores[0, :, PERSON_CLASS] for scores in outputs[:3]])
        bins_A4K = np.concatenate([bins[0].reshape(-1, 4, BINS) for bins in outputs[3:]])
        candidates = np.flatnonzero(scores_A >= self.score_threshold)
        scores_N = scores_A[candidates]
        boxes_N4 = decode(candidates, bins_A4K[candidates])
        kept = suppress(boxes_N4, scores_N, self.nms_iou)
        return [Person(box=tuple(boxes_N4[i].tolist()), score=float(scores_N[i])) for i in kept]


def usable_cpus() -> int:
    """CPUs this process may run on: under Slurm often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def preprocess(picture: np.ndarray) -> np.ndarray:
    """An RGB picture (H×W×3 uint8) as the network's input: 1×3×416×416 float32, BGR, standardised.

    The resize ignores the aspect ratio, as in training, so a box's fractions hold for the picture as is.
    """
    assert picture.dtype == np.uint8, f"a picture is uint8, not {picture.dtype}"
    assert picture.shape[2:] == (3,), f"a picture is HxWx3, not {picture.shape}"
    resized = Image.fromarray(picture).resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR)
    bgr = np.asarray(resized, np.float32)[:, :, ::-1]
    return np.ascontiguousarray(((bgr - BGR_MEAN) / BGR_STD).transpose(2, 0, 1)[None])


def _grid() -> tuple[np.ndarray, np.ndarray]:
    """Centres (A×2: x, y) and strides (A) of all cells in pixels, rows first within each stride."""
    centres, strides = [], []
    for stride in STRIDES_PX:
        cells = SIDE_PX // stride
        row, column = np.divmod(np.arange(cells * cells), cells)
        centres.append((np.stack([column, row], axis=1) + 0.5) * stride)
        strides.append(np.full(cells * cells, stride))
    return np.concatenate(centres).astype(np.float32), np.concatenate(strides).astype(np.float32)


_CENTRES_A2, _STRIDES_A = _grid()


def decode(cells_N: np.ndarray, bins_N4K: np.ndarray) -> np.ndarray:
    """Boxes (N×4, fractions of the picture, clipped to it) of the anchor cells with indices `cells_N`.

    Each side's distance from the cell's centre is the expectation of a softmax over its bins, in strides:
    the integral of Generalized Focal Loss (Li et al. 2020, equation 6).
    """
    weights_N4K = np.exp(bins_N4K - bins_N4K.max(axis=2, keepdims=True))
    weights_N4K /= weights_N4K.sum(axis=2, keepdims=True)
    distances_N4 = weights_N4K @ np.arange(BINS, dtype=np.float32) * _STRIDES_A[cells_N, None]
    centres_N2 = _CENTRES_A2[cells_N]
    boxes_N4 = np.concatenate([centres_N2 - distances_N4[:, :2], centres_N2 + distances_N4[:, 2:]], axis=1)
    return np.clip(boxes_N4 / SIDE_PX, 0.0, 1.0)  # before suppression, as upstream does


def suppress(boxes_N4: np.ndarray, scores_N: np.ndarray, max_iou: float) -> list[int]:
    """Greedy non-maximum suppression: indices kept, by falling score (ties: the earlier cell first).

    A box goes when its intersection over union with a better kept one exceeds `max_iou`.
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
