"""Person detectors by name, as `--persons` takes them.

A detector is created in the process that uses it: an onnxruntime session can neither be pickled nor survive a
fork, so each packing worker calls `make_detector` itself.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from shards.detect.types import Person, PersonDetector
from uniemox_dist.core.errors import UserError


class NoDetector:
    """Finds nobody: for sources that bring their own persons, and for packing without onnxruntime."""

    def __init__(self, name: str = "none") -> None:
        self.name = name

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": self.name}

    def detect(self, pictures: Sequence[np.ndarray]) -> list[list[Person]]:
        return [[] for _ in pictures]


def make_detector(spec: str, *, threads: int = 1) -> PersonDetector:
    """The detector that `--persons SPEC` names, running on `threads` CPU threads.

    Raises UserError for an unknown name or a count of threads below 1, where the detector's package is not
    installed, and for a FILE that is no detector.
    """
    kind, _, file = spec.partition(":")
    if spec not in ("nanodet", "source", "none") and not (kind == "onnx" and file):
        raise UserError(
            f"--persons {spec!r} is no person detector; valid: nanodet, onnx:FILE (a YOLO-type export), "
            "source (only the boxes that the source brings), none"
        )
    if threads < 1:
        raise UserError(f"threads={threads} of the person detector is below 1; try 1")
    # Imported here, because onnxruntime is an optional dependency and slow to import.
    if kind == "nanodet":
        from shards.detect.nanodet import NanoDet

        return NanoDet(threads=threads)
    if kind == "onnx":
        from shards.detect.yolo import YoloOnnx

        return YoloOnnx(file, threads=threads)
    return NoDetector(spec)
