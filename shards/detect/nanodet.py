"""NanoDet-g on onnxruntime, the person detector that ships with the package (see weights/README.md).

Shapes: A anchor cells of all strides (2704 + 676 + 169 = 3549), N candidates, 4 sides (left, top, right,
bottom), K distance bins (11). Boxes are x1, y1, x2, y2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from shards.detect.onnx_session import open_session, suppress
from shards.detect.types import Person

MODEL_FILE = "nanodet_g_416.onnx"
SIDE_PX = 416
BATCH = 4
"""Pictures per run; bounds the memory. On a CPU a larger batch is not faster, as 90 % of the time is convolutions."""
STRIDES_PX = (8, 16, 32)
BINS = 11
PERSON_CLASS = 0  # of the 80 COCO classes
# The converter's names, in the order of STRIDES_PX.
SCORE_OUTPUTS = ("Identity", "Identity_1", "Identity_2")
BIN_OUTPUTS = ("Identity_3", "Identity_4", "Identity_5")
BGR_MEAN = np.array([103.53, 116.28, 123.675], np.float32)
BGR_STD = np.array([57.375, 57.12, 58.395], np.float32)


class NanoDet:
    """Finds persons with NanoDet-g at 416 px (speed: tools/bench_detector.py).

    Raises UserError if onnxruntime is not installed.
    """

    name: str = "nanodet"

    def __init__(self, *, threads: int = 1, score_threshold: float = 0.5, nms_iou: float = 0.6) -> None:
        self.score_threshold = score_threshold
        self.nms_iou = nms_iou
        weights = read_shipped_weights()
        self._sha256 = hashlib.sha256(weights).hexdigest()  # of the bytes that are loaded
        self._session = open_session(weights, threads=threads, persons=self.name)
        self._x_BCHW = np.empty((BATCH, 3, SIDE_PX, SIDE_PX), np.float32)

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sha256": self._sha256,
            "score_threshold": self.score_threshold,
            "nms_iou": self.nms_iou,
        }

    def detect(self, pictures: Sequence[np.ndarray]) -> list[list[Person]]:
        found: list[list[Person]] = []
        for start in range(0, len(pictures), BATCH):
            found += self._detect_batch(pictures[start : start + BATCH])
        return found

    def _detect_batch(self, pictures: Sequence[np.ndarray]) -> list[list[Person]]:
        x_NCHW = self._x_BCHW[: len(pictures)]
        for x_CHW, picture in zip(x_NCHW, pictures):
            preprocess(picture, out=x_CHW)
        outputs = self._session.run(SCORE_OUTPUTS + BIN_OUTPUTS, {"input_1": x_NCHW})
        scores_NA = np.concatenate([scores[:, :, PERSON_CLASS] for scores in outputs[:3]], axis=1)
        return [
            self._persons(scores_NA[i], np.concatenate([bins[i] for bins in outputs[3:]]))
            for i in range(len(pictures))
        ]

    def _persons(self, scores_A: np.ndarray, bins_AX: np.ndarray) -> list[Person]:
        """The persons of one picture; X is the 4 × K bins of a cell."""
        candidates = np.flatnonzero(scores_A >= self.score_threshold)
        scores_N = scores_A[candidates]
        boxes_N4 = decode(candidates, bins_AX[candidates].reshape(-1, 4, BINS))
        kept = suppress(boxes_N4, scores_N, self.nms_iou)
        return [Person(box=tuple(boxes_N4[i].tolist()), score=float(scores_N[i])) for i in kept]


def read_shipped_weights() -> bytes:
    """The bytes of the packaged ONNX file."""
    return (resources.files("shards") / "detect" / "weights" / MODEL_FILE).read_bytes()


def preprocess(picture: np.ndarray, out: np.ndarray) -> None:
    """Writes an RGB picture (H×W×3 uint8) into the network's input: 3×416×416 float32, BGR, standardised.

    The resize ignores the aspect ratio, as in training, so a box's fractions are valid for the original picture.
    """
    assert picture.dtype == np.uint8, f"a picture is uint8, not {picture.dtype}"
    assert picture.shape[2:] == (3,), f"a picture is HxWx3, not {picture.shape}"
    resized = Image.fromarray(picture).resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR)
    for plane, channel, mean, std in zip(out, reversed(resized.split()), BGR_MEAN, BGR_STD):
        np.subtract(np.asarray(channel), mean, out=plane, dtype=np.float32)
        plane /= std


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
    return np.clip(boxes_N4 / SIDE_PX, 0.0, 1.0)  # before suppression, as in the original code
