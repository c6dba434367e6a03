"""Creates person detectors by their name in `--persons`.

An onnxruntime session can neither be pickled nor survive a fork, so each packing worker calls `make_detector` itself.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from shards.detect.types import Person, PersonDetector
from uniemox_dist.core.errors import UserError


class NoDetector:
    """Finds no persons. For sources with their own person boxes, and for packing without onnxruntime."""

    def __init__(self, name: str = "none") -> None:
        self.name = name

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": self.name}

    def detect(self, pictures: Sequence[np.ndarray]) -> list[list[Person]]:
        return [[] for _ in pictures]


def make_detector(spec: str, *, threads: int = 1) -> PersonDetector:
    """Creates the detector of `--persons SPEC`, which runs on `threads` CPU threads.

    Raises UserError for an unknown name, fewer than 1 thread, a missing package, and a FILE that is not a detector.
    """
    kind, _, file = spec.partition(":")
    if spec not in ("nanodet", "source", "none") and not (kind == "onnx" and file):
        raise UserError(
            f"--persons {spec!r}: not a person detector; valid are nanodet, onnx:FILE (a YOLO-type export), "
            "source (only the boxes of the source), none"
        )
    if threads < 1:
        raise UserError(f"threads={threads}: the person detector needs at least 1; try 1")
    # Imported here, because onnxruntime is optional and slow to import.
    if kind == "nanodet":
        from shards.detect.nanodet import NanoDet

        return NanoDet(threads=threads)
    if kind == "onnx":
        from shards.detect.yolo import YoloOnnx

        return YoloOnnx(file, threads=threads)
    return NoDetector(spec)
