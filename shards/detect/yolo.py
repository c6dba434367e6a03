"""YOLO-type detectors from a user's ONNX file: `--persons onnx:FILE`.

Shapes: B pictures per run, A anchors, C classes, N candidates. Boxes are x1, y1, x2, y2.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.detect.nanodet import read_shipped_weights
from shards.detect.onnx_session import open_session, suppress
from shards.detect.types import Person
from uniemox_dist.core.errors import UserError

BATCH = 4  # if the file does not fix it
SIDE_PX = 640  # if neither the file's input nor its metadata states it
GREY = 114
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
STRIDES_PX = (4, 8, 16, 32, 64)
ACCEPTED = (
    "accepted is a self-contained ONNX file as Ultralytics exports detectors: one input Nx3xHxW (float32 or "
    "float16) and a first output 1xAx(5+C) (v5), 1x(4+C)xA (v8, v11) or 1xKx6 (end to end, v10), where A counts "
    "the cells of several strides"
)


class YoloOnnx:
    """Finds persons with an Ultralytics-type detector. Its kind follows from the shape of its output.

    Raises UserError if onnxruntime is not installed, and for a file that is not such a detector.
    """

    name: str = "onnx"

    def __init__(
        self, path: str | Path, *, threads: int, score_threshold: float = 0.5, nms_iou: float = 0.6
    ) -> None:
        self.score_threshold = score_threshold
        self.nms_iou = nms_iou
        self._path = Path(path)
        try:
            weights = self._path.read_bytes()
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror})") from error
        self._sha256 = hashlib.sha256(weights).hexdigest()
        if weights == read_shipped_weights():
            raise UserError(
                f"--persons onnx:{path}: the file is the NanoDet that ships with this package, not a YOLO; "
                "use --persons nanodet"
            )
        try:
            self._session = open_session(weights, threads=threads, persons=f"onnx:{path}")
        except UserError:
            raise
        except Exception as error:  # onnxruntime's errors have no common base class
            raise self._error(f"is rejected by onnxruntime ({one_line(error)})") from error
        self._metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        self._names = self._read_names()
        self._person = self._find_person()
        self._x_BCHW = self._make_input()
        try:
            output = self._run()  # an unsuitable file fails here, not at the first picture
        except Exception as error:
            raise self._error(f"does not run on a grey picture ({one_line(error)})") from error
        self._kind = self._find_kind(output)

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "file": self._path.name,
            "sha256": self._sha256,
            "score_threshold": self.score_threshold,
            "nms_iou": self.nms_iou,
        }

    def detect(self, pictures: Sequence[np.ndarray]) -> list[list[Person]]:
        found: list[list[Person]] = []
        batch = len(self._x_BCHW)
        for start in range(0, len(pictures), batch):
            some = pictures[start : start + batch]
            windows = [letterbox(picture, out) for picture, out in zip(some, self._x_BCHW)]
            # A short batch is followed by pictures of the previous one. A fixed batch size uses the same kernels, so
            # that the result for a picture is always the same, bit for bit.
            for output, window in zip(self._run(), windows):
                boxes_A4, scores_A = self._decode(output.astype(np.float32))
                candidates = np.flatnonzero(scores_A >= self.score_threshold)
                x, y, w, h = window
                boxes_N4 = (boxes_A4[candidates] - (x, y, x, y)) / (w, h, w, h)
                found.append(self._persons(np.clip(boxes_N4, 0.0, 1.0), scores_A[candidates]))
        return found

    def _persons(self, boxes_N4: np.ndarray, scores_N: np.ndarray) -> list[Person]:
        inside = (boxes_N4[:, :2] < boxes_N4[:, 2:]).all(
            axis=1
        )  # the others are in the grey border, or have no area
        boxes_N4, scores_N = boxes_N4[inside], scores_N[inside]
        kept = suppress(boxes_N4, scores_N, self.nms_iou)
        # A product of half-precision numbers may exceed 1.
        return [Person(box=tuple(boxes_N4[i].tolist()), score=min(float(scores_N[i]), 1.0)) for i in kept]

    def _decode(self, output: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (A×4, pixels of the input) and person scores (A) from one picture's output."""
        if self._kind == "end to end":
            return output[:, :4], np.where(output[:, 5] == self._person, output[:, 4], 0.0)
        if self._kind == "v8":
            output_AX = output.T
            scores_A = output_AX[:, 4 + self._person]
        else:
            output_AX = output
            scores_A = output[:, 4] * output[:, 5 + self._person]
        centres_A2, halves_A2 = output_AX[:, :2], output_AX[:, 2:4] / 2
        return np.concatenate([centres_A2 - halves_A2, centres_A2 + halves_A2], axis=1), scores_A

    def _run(self) -> np.ndarray:
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        output: np.ndarray = self._session.run([outputs[0].name], {inputs[0].name: self._x_BCHW})[0]
        return output

    def _make_input(self) -> np.ndarray:
        """The input buffer, filled with grey."""
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise self._error(f"has {len(inputs)} inputs ({', '.join(value.name for value in inputs)})")
        shape, dtype = inputs[0].shape, DTYPES.get(inputs[0].type)
        if len(shape) != 4 or (shape[1] not in (3, None) and not isinstance(shape[1], str)) or dtype is None:
            raise self._error(f"has an input {'x'.join(map(str, shape))} of {inputs[0].type}")
        sizes = (BATCH, 3, *self._default_size())
        fixed = [size if isinstance(size, int) else default for size, default in zip(shape, sizes)]
        return np.full(fixed, GREY / 255, dtype)

    def _default_size(self) -> tuple[int, int]:
        """Height and width of an input that does not fix them."""
        height, width = np.broadcast_to(self._literal("imgsz") or SIDE_PX, 2)  # [height, width] or one side
        return int(height), int(width)

    def _literal(self, key: str) -> Any:
        """A value of the metadata, which Ultralytics writes as a Python literal; None if it is missing."""
        text = self._metadata.get(key)
        try:
            return None if text is None else ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            raise self._error(f"has {key}={text!r} in its metadata, which is not a Python literal") from error

    def _read_names(self) -> list[str] | None:
        names = self._literal("names")
        if isinstance(names, dict):
            names = [names[index] for index in sorted(names)]
        return None if names is None else [str(name) for name in names]

    def _find_person(self) -> int:
        if self._names is None:
            return 0  # as in COCO
        folded = [name.casefold() for name in self._names]
        if "person" not in folded:
            some = ", ".join(self._names[:8]) + (", ..." if len(self._names) > 8 else "")
            raise self._error(f"has no class 'person' (the names in its metadata: {some})")
        return folded.index("person")

    def _find_kind(self, output: np.ndarray) -> str:
        batch, _, height, width = self._x_BCHW.shape
        classes = None if self._names is None else len(self._names)
        if output.ndim == 3 and len(output) == batch:
            rows, columns = output.shape[1:]
            cells = list_cell_counts(height, width)
            threes = {3 * count for count in cells}
            # v5 with one class also has six columns, but three anchors per cell.
            if columns == 6 and not (classes in (1, None) and rows in threes):
                return "end to end"
            if 4 < rows < columns and classes in (rows - 4, None) and columns in cells:
                return "v8"
            # Some of v5's kind, such as v6, have one anchor per cell.
            if 5 < columns < rows and classes in (columns - 5, None) and rows in threes | cells:
                return "v5"
        known = "" if classes is None else f" and names of {classes} classes"
        raise self._error(f"has an output {'x'.join(map(str, output.shape))}{known}")

    def _error(self, found: str) -> UserError:
        return UserError(f"--persons onnx:{self._path}: the file {found}; {ACCEPTED}")


def list_cell_counts(height: int, width: int) -> set[int]:
    """The possible numbers of cells of a detector for an input of this size (pixels). Strides are mostly 8 to 32; some
    detectors begin at 4 or 16, and some end at 64.

    This rejects the outputs of other networks (patch features, scores of one stride), which would silently find no
    persons.
    """
    return {
        sum((height // stride) * (width // stride) for stride in STRIDES_PX[first:last])
        for first in range(3)
        for last in (4, 5)
    }


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def letterbox(picture: np.ndarray, out: np.ndarray) -> tuple[int, int, int, int]:
    """Writes an RGB picture (H×W×3 uint8) centred on grey into `out` (3×height×width, 0..1).

    Returns the picture's position there in pixels: left, top, width, height.
    """
    assert picture.dtype == np.uint8, f"a picture is uint8, not {picture.dtype}"
    assert picture.shape[2:] == (3,), f"a picture is HxWx3, not {picture.shape}"
    height, width = out.shape[1:]
    scale = min(height / picture.shape[0], width / picture.shape[1])
    h, w = (max(1, round(side * scale)) for side in picture.shape[:2])
    x, y = (width - w) // 2, (height - h) // 2
    resized = Image.fromarray(picture).resize((w, h), Image.Resampling.BILINEAR)
    out[:] = GREY / 255
    for plane, channel in zip(out, resized.split()):
        plane[y : y + h, x : x + w] = np.asarray(channel, np.float32) / 255
    return x, y, w, h
