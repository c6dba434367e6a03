"""YOLO-type files: small real ONNX graphs that find a red rectangle, run through onnxruntime."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from shards.detect import yolo
from shards.detect.nanodet import read_shipped_weights
from shards.detect.registry import make_detector
from shards.detect.yolo import YoloOnnx, letterbox, list_cell_counts
from uniemox_dist.core.errors import UserError

NAMES = {0: "car", 1: "Person", 2: "dog"}
# Three anchors of the same rectangle, moved by some pixels, with the classes' scores; the rest find nothing.
SHIFTS = ((0, 0, 0, 0), (1, 0, 1, 0), (0, 0, 0, 0))
SCORES = ((0.1, 0.9, 0.2), (0.1, 0.8, 0.2), (0.9, 0.1, 0.1))
OBJECTNESS = 0.75


def anchors_of(kind: str, size: tuple[int, int]) -> int:
    """The cells at strides 8, 16 and 32; v5 has three anchors each."""
    cells = sum((size[0] // stride) * (size[1] // stride) for stride in (8, 16, 32))
    return {"v5": 3 * cells, "v8": cells, "end to end": 7}[kind]


def red_rectangle(
    path: Path,
    kind: str,
    *,
    names: dict[int, str] | None = NAMES,
    batch: int | str = "batch",
    size: tuple[int, int] = (64, 64),
    open_size: bool = False,
    dtype: int = TensorProto.FLOAT,
    anchors: int | None = None,
    scores: tuple[tuple[float, ...], ...] = SCORES,
    shifts: tuple[tuple[float, ...], ...] = SHIFTS,
) -> str:
    """Writes a detector of the rectangle whose red exceeds its green by 0.7; returns its `--persons`."""
    height, width = size
    corner_kind = kind == "end to end"
    anchors = anchors or anchors_of(kind, size)
    empty = anchors - len(scores)
    if corner_kind:  # score and class of each anchor: the best
        extra = [[max(row), row.index(max(row))] for row in scores] + [[0.0, 0.0]] * empty
    else:
        extra = [list(row) for row in scores] + [[0.0] * len(scores[0])] * empty
        if kind == "v5":
            extra = [[OBJECTNESS, *row] for row in extra]
    # Centres and sizes from corners: a linear map of (x1, y1, x2, y2).
    to_sizes = np.array([[0.5, 0, -1, 0], [0, 0.5, 0, -1], [0.5, 0, 1, 0], [0, 0.5, 0, 1]], np.float32)
    constants = {
        "zero": np.array(0),
        "one": np.array(1),
        "threshold": np.array(0.7, np.float32),
        "far": np.array(1e4, np.float32),
        "anchor_axis": np.array([1]),
        "shifts": np.array([[*shifts, *[(0, 0, 0, 0)] * empty]], np.float32),
        "extra": np.array([extra], np.float32),
        "form": np.eye(4, dtype=np.float32) if corner_kind else to_sizes,
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["x", "zero"], ["red"], axis=1),
        helper.make_node("Gather", ["x", "one"], ["green"], axis=1),
        helper.make_node("Sub", ["red", "green"], ["redness"]),
        helper.make_node("Greater", ["redness", "threshold"], ["is_red"]),
        helper.make_node("Cast", ["is_red"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["mask"], ["found"], axes=[1, 2]),  # Bx1x1
        helper.make_node("Mul", ["extra", "found"], ["scores"]),
    ]
    for side, pixels, other in (("x", width, 1), ("y", height, 2)):
        constants[f"{side}_low"] = np.arange(pixels, dtype=np.float32)
        constants[f"{side}_high"] = np.arange(1, pixels + 1, dtype=np.float32)
        nodes += [
            helper.make_node("ReduceMax", ["mask"], [f"{side}_mask"], axes=[other], keepdims=0),
            helper.make_node("Mul", [f"{side}_mask", f"{side}_high"], [f"{side}_ends"]),
            helper.make_node("ReduceMax", [f"{side}_ends"], [f"{side}2"], axes=[1]),
            helper.make_node("Mul", [f"{side}_mask", "far"], [f"{side}_near"]),
            helper.make_node("Sub", [f"{side}_low", f"{side}_near"], [f"{side}_starts"]),
            helper.make_node("ReduceMin", [f"{side}_starts"], [f"{side}_start"], axes=[1]),
            helper.make_node("Add", [f"{side}_start", "far"], [f"{side}1"]),
        ]
    nodes += [
        helper.make_node("Concat", ["x1", "y1", "x2", "y2"], ["box"], axis=1),
        helper.make_node("Unsqueeze", ["box", "anchor_axis"], ["boxes_1"]),
        helper.make_node("Add", ["boxes_1", "shifts"], ["moved"]),
        helper.make_node("MatMul", ["moved", "form"], ["boxes"]),
        helper.make_node("Concat", ["boxes", "scores"], ["rows"], axis=2),
        helper.make_node("Transpose", ["rows"], ["table"], perm=[0, 2, 1] if kind == "v8" else [0, 1, 2]),
        helper.make_node("Cast", ["table"], ["output0"], to=dtype),
    ]
    shape = [batch, 3, "height", "width"] if open_size else [batch, 3, height, width]
    graph = helper.make_graph(
        nodes,
        "red_rectangle",
        [helper.make_tensor_value_info("images", dtype, shape)],
        [helper.make_tensor_value_info("output0", dtype, [batch, None, None])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    metadata = {} if names is None else {"names": repr(names)}
    return save(path, graph, metadata | ({"imgsz": repr(list(size))} if open_size else {}))


def save(path: Path, graph: onnx.GraphProto, metadata: dict[str, str]) -> str:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return f"onnx:{path}"


def constant_output(path: Path, shape: tuple[int, ...], names: dict[int, str] | None) -> str:
    """Writes a file whose output is zeros of `shape`."""
    zeros = numpy_helper.from_array(np.zeros(shape, np.float32))
    graph = helper.make_graph(
        [helper.make_node("Constant", [], ["output0"], value=zeros)],
        "constant",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, list(shape))],
    )
    return save(path, graph, {} if names is None else {"names": repr(names)})


def picture(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """White, with a red rectangle from (x1, y1) to before (x2, y2)."""
    x1, y1, x2, y2 = box
    rgb = np.full((height, width, 3), 255, np.uint8)
    rgb[y1:y2, x1:x2] = (255, 0, 0)
    return rgb


def fractions(height: int, width: int, box: tuple[int, int, int, int]) -> tuple[float, ...]:
    return tuple(value / side for value, side in zip(box, (width, height) * 2))


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
@pytest.mark.parametrize("kind", ["v5", "v8", "end to end"])
def test_the_rectangle_is_found_at_its_position_in_wide_tall_and_square_pictures(
    kind: str, dtype: int, tmp_path: Path
) -> None:
    detector = make_detector(red_rectangle(tmp_path / "red.onnx", kind, dtype=dtype))
    cases = [(64, 64, (3, 5, 40, 60)), (32, 64, (10, 2, 30, 32)), (64, 20, (0, 30, 11, 64))]  # scale 1: exact
    pictures = [picture(*case) for case in cases]
    score = 0.9 * (OBJECTNESS if kind == "v5" else 1.0)
    for found, case in zip(detector.detect(pictures), cases):
        assert len(found) == 1  # the second anchor is suppressed, the third is a car
        assert found[0].box == pytest.approx(fractions(*case), abs=1e-5)
        assert found[0].score == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize(("height", "width"), [(100, 300), (300, 100), (500, 333), (7, 90)])
def test_boxes_are_fractions_of_pictures_of_any_size(height: int, width: int, tmp_path: Path) -> None:
    detector = make_detector(red_rectangle(tmp_path / "red.onnx", "v8", size=(96, 128)))
    box = (width // 4, height // 3, width * 3 // 4, height)
    [[person]] = detector.detect([picture(height, width, box)])
    one_pixel = 1 / min(height, width) + max(height / 96, width / 128) / min(height, width)
    assert person.box == pytest.approx(fractions(height, width, box), abs=one_pixel)


def test_the_letterbox_is_centred_grey_and_keeps_the_aspect() -> None:
    out = np.zeros((3, 60, 80), np.float32)
    assert letterbox(np.full((20, 80, 3), (255, 102, 0), np.uint8), out) == (0, 20, 80, 20)
    np.testing.assert_array_equal(
        out[:, 20:40], np.broadcast_to([[[1.0]], [[0.4]], [[0.0]]], (3, 20, 80)).astype("f4")
    )
    assert set(np.unique(out[:, :20])) == set(np.unique(out[:, 40:])) == {np.float32(114 / 255)}
    assert letterbox(np.zeros((120, 40, 3), np.uint8), out) == (30, 0, 20, 60)
    assert letterbox(np.zeros((1, 4000, 3), np.uint8), out) == (0, 29, 80, 1)


@pytest.mark.parametrize("batch", ["batch", 1, 3])
def test_a_pictures_result_does_not_depend_on_the_batch(batch: int | str, tmp_path: Path) -> None:
    detector = make_detector(red_rectangle(tmp_path / "red.onnx", "v8", batch=batch))
    boxes = [(2 * i, i, 30 + 3 * i, 40 + 2 * i) for i in range(7)]
    pictures = [picture(64, 64, box) for box in boxes]
    pictures[2] = np.full((50, 70, 3), 255, np.uint8)
    together = detector.detect(pictures)
    assert together == [detector.detect([one])[0] for one in pictures]
    assert [len(found) for found in together] == [1, 1, 0, 1, 1, 1, 1]
    assert together[6][0].box == pytest.approx(fractions(64, 64, boxes[6]), abs=1e-5)
    assert detector.detect([]) == []


def test_an_open_input_size_is_the_metadatas(tmp_path: Path) -> None:
    detector = YoloOnnx(
        red_rectangle(tmp_path / "red.onnx", "v8", size=(32, 96), open_size=True)[5:], threads=1
    )
    [[person]] = detector.detect([picture(32, 96, (10, 4, 50, 30))])
    assert person.box == pytest.approx(fractions(32, 96, (10, 4, 50, 30)), abs=1e-5)


@pytest.mark.parametrize("kind", ["v5", "v8", "end to end"])
def test_without_names_the_person_is_class_0_as_in_coco(kind: str, tmp_path: Path) -> None:
    [[person]] = make_detector(red_rectangle(tmp_path / "red.onnx", kind, names=None)).detect(
        [picture(64, 64, (8, 8, 40, 60))]
    )
    assert person.score == pytest.approx(0.9 * (OBJECTNESS if kind == "v5" else 1), abs=1e-4)  # the car's


@pytest.mark.parametrize("names", [{0: "person"}, None])
def test_v5_with_one_class_is_distinguished_from_end_to_end_by_its_anchors(
    names: dict[int, str] | None, tmp_path: Path
) -> None:
    pictures = [picture(64, 64, (8, 8, 40, 60))]
    grid = 3 * (8 * 8 + 4 * 4 + 2 * 2)
    for kind, anchors, score in (("v5", grid, 0.9 * OBJECTNESS), ("end to end", 300, 0.9)):
        spec = red_rectangle(
            tmp_path / "red.onnx", kind, names=names, anchors=anchors, scores=((0.9,),), shifts=((0,) * 4,)
        )
        [[person]] = make_detector(spec).detect(pictures)
        assert person.box == pytest.approx((8 / 64, 8 / 64, 40 / 64, 60 / 64))
        assert person.score == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize(("nms_iou", "scores"), [(0.6, [0.9]), (0.99, [0.9, 0.8])])
def test_overlapping_boxes_are_suppressed_and_scores_fall(
    nms_iou: float, scores: list[float], tmp_path: Path
) -> None:
    file = red_rectangle(tmp_path / "red.onnx", "v8")[5:]
    detector = YoloOnnx(file, threads=1, nms_iou=nms_iou)
    [found] = detector.detect([picture(64, 64, (8, 8, 40, 60))])
    assert [person.score for person in found] == pytest.approx(scores, abs=1e-4)
    assert YoloOnnx(file, threads=1, score_threshold=0.95).detect([picture(64, 64, (8, 8, 40, 60))]) == [[]]


def test_a_box_in_the_grey_beside_the_picture_is_dropped_and_others_are_clipped(tmp_path: Path) -> None:
    spec = red_rectangle(
        tmp_path / "red.onnx",
        "v8",
        scores=((0, 0.9, 0), (0, 0.8, 0)),
        shifts=((0, 40, 0, 40), (-20, 0, 0, 0)),
    )
    [[person]] = make_detector(spec).detect([picture(32, 64, (10, 0, 30, 20))])
    assert person.score == pytest.approx(0.8, abs=1e-4)
    assert person.box == pytest.approx((0, 0, 30 / 64, 20 / 32), abs=1e-5)


@pytest.mark.parametrize(
    ("side", "cells"),
    [(640, 8400), (1280, 102_000 // 3), (640, 34_000), (416, 2535 // 3)],
    ids=["v8", "v5 with stride 64", "v8 with stride 4", "v3-tiny"],
)
def test_outputs_of_published_exports_are_known(side: int, cells: int) -> None:
    assert cells in list_cell_counts(side, side)


def test_a_score_above_one_by_rounding_is_one(tmp_path: Path) -> None:
    spec = red_rectangle(tmp_path / "red.onnx", "v8", scores=((0.0, 1.002, 0.0),), shifts=((0,) * 4,))
    [[person]] = make_detector(spec).detect([picture(64, 64, (8, 8, 40, 60))])
    assert person.score == 1


def test_the_identity_names_file_bytes_and_thresholds(tmp_path: Path) -> None:
    detector = make_detector(red_rectangle(tmp_path / "red.onnx", "v8"))
    sha256 = hashlib.sha256((tmp_path / "red.onnx").read_bytes()).hexdigest()
    expected = {"name": "onnx", "file": "red.onnx", "sha256": sha256, "score_threshold": 0.5, "nms_iou": 0.6}
    assert detector.identity == expected
    assert detector.name == "onnx"


def refusal(spec: str) -> str:
    with pytest.raises(UserError) as caught:
        make_detector(spec)
    message = str(caught.value)
    assert message.startswith(f"--persons {spec}: the file ")
    assert message.endswith(yolo.ACCEPTED)
    return message


def test_a_missing_file_and_one_that_is_not_onnx_are_user_errors(tmp_path: Path) -> None:
    assert "cannot be read (No such file" in refusal(f"onnx:{tmp_path / 'none.onnx'}")
    for content in (b"", b"this is no graph"):
        (tmp_path / "text.onnx").write_bytes(content)
        assert "is rejected by onnxruntime (" in refusal(f"onnx:{tmp_path / 'text.onnx'}")


def test_the_shipped_nanodet_is_recognised_and_its_name_suggested(tmp_path: Path) -> None:
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(read_shipped_weights())
    with pytest.raises(
        UserError, match=r"is the NanoDet that ships with this package, .*use --persons nanodet$"
    ):
        make_detector(f"onnx:{copy}")


def test_names_without_a_person_or_that_cannot_be_read_are_user_errors(tmp_path: Path) -> None:
    no_person = red_rectangle(tmp_path / "red.onnx", "v8", names={0: "car", 1: "cat", 2: "dog"})
    assert "has no class 'person' (the names in its metadata: car, cat, dog)" in refusal(no_person)
    model = onnx.load(tmp_path / "red.onnx")
    helper.set_model_props(model, {"names": "{0: car}"})
    onnx.save(model, tmp_path / "red.onnx")
    assert "has names='{0: car}' in its metadata, which is not a Python literal" in refusal(no_person)


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((1, 1000), None),  # a classifier
        ((1, 56, 84), {0: "person"}),  # a pose model: 51 values too many
        ((1, 84, 7), NAMES),  # v8 turned round
        ((2, 300, 6), None),  # another batch
        ((1, 64, 80), None),  # the scores of a single stride
        ((1, 17, 768), None),  # features of patches
        ((1, 85, 64), NAMES | {i: str(i) for i in range(3, 81)}),  # boxes of a single stride
    ],
)
def test_another_output_is_a_user_error_that_names_it(
    shape: tuple[int, ...], names: dict[int, str] | None, tmp_path: Path
) -> None:
    message = refusal(constant_output(tmp_path / "other.onnx", shape, names))
    assert f"has an output {'x'.join(map(str, shape))}" in message
    assert names is None or f"and names of {len(names)} classes" in message


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"a": [1, 3, 64, 64], "b": [1]}, "has 2 inputs (a, b)"),
        ({"a": [1, 64, 64, 3]}, "has an input 1x64x64x3 of tensor(float)"),
        ({"a": [3, 64, 64]}, "has an input 3x64x64 of tensor(float)"),
    ],
)
def test_another_input_is_a_user_error(inputs: dict[str, list[int]], expected: str, tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["a"], ["output0"])],
        "identity",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, inputs["a"])],
    )
    assert expected in refusal(save(tmp_path / "other.onnx", graph, {}))


def test_a_missing_onnxruntime_is_a_user_error_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = red_rectangle(tmp_path / "red.onnx", "v8")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r'needs onnxruntime; run pip install -e "\.\[persons\]"'):
        make_detector(spec)
