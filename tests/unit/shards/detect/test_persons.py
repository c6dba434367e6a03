"""Persons: values checked by hand on pictures that scikit-image and the demo ship (no network)."""

import hashlib
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from skimage import data

import shards
from shards.detect import nanodet
from shards.detect.nanodet import NanoDet
from shards.detect.onnx_session import suppress
from shards.detect.registry import NoDetector, make_detector
from shards.detect.types import Person, PersonDetector
from uniemox_dist.core.errors import UserError

SHARDS = Path(shards.__file__).parent
# By eye, on a grid of tenths: hair to the picture's foot, elbow to elbow (without the helmet).
ASTRONAUT_BOX = (0.04, 0.03, 0.72, 1.0)
ASTRONAUT_FACE = (0.36, 0.14, 0.51, 0.36)
CAMERAMAN_BOX = (0.01, 0.12, 0.64, 1.0)


@pytest.fixture(scope="module")
def detector() -> PersonDetector:
    return make_detector("nanodet")


def picture_of(name: str) -> np.ndarray:
    """A picture of scikit-image's, RGB."""
    picture = getattr(data, name)()
    return picture if picture.ndim == 3 else np.repeat(picture[:, :, None], 3, axis=2)


def emoji(key: str) -> np.ndarray:
    """A demo picture on white, RGB."""
    table = pq.read_table(SHARDS / "demo" / "fluent_emoji.parquet", filters=[("key", "==", key)])
    picture = Image.open(io.BytesIO(table["image"][0].as_py())).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))


def area(box: tuple[float, ...]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / (area(a) + area(b) - width * height)


def test_the_astronaut_is_found_at_her_position(detector: PersonDetector) -> None:
    [[person]] = detector.detect([picture_of("astronaut")])
    assert iou(person.box, ASTRONAUT_BOX) > 0.9
    assert iou(person.box, ASTRONAUT_FACE) == pytest.approx(area(ASTRONAUT_FACE) / area(person.box))  # inside
    assert person.score == pytest.approx(0.734, abs=0.01)  # RGB in BGR's place scores 0.761
    assert person.labels == {}


def test_boxes_are_fractions_of_the_whole_picture_for_any_aspect(detector: PersonDetector) -> None:
    wide = np.full((512, 768, 3), 255, np.uint8)
    wide[:, 256:] = picture_of("astronaut")
    [[person]] = detector.detect([wide])
    x1, y1, x2, y2 = ASTRONAUT_BOX
    assert iou(person.box, ((x1 + 0.5) / 1.5, y1, (x2 + 0.5) / 1.5, y2)) > 0.85


def test_four_persons_come_by_falling_score_each_in_its_quarter(detector: PersonDetector) -> None:
    top = np.concatenate([picture_of("astronaut"), picture_of("camera")], axis=1)
    [found] = detector.detect([np.concatenate([top, top[:, ::-1]])])
    scores = [person.score for person in found]
    assert scores == sorted(scores, reverse=True)
    assert all(0.5 <= score <= 1.0 and round(score, 4) == score for score in scores)
    assert all(0.0 <= value <= 1.0 and round(value, 5) == value for person in found for value in person.box)
    assert len(found) == 4
    for (x1, y1, x2, y2), column in ((ASTRONAUT_BOX, 0), (CAMERAMAN_BOX, 1)):
        left, right = (column + x1) / 2, (column + x2) / 2
        for box in ((left, y1 / 2, right, y2 / 2), (1 - right, (1 + y1) / 2, 1 - left, (1 + y2) / 2)):
            assert max(iou(person.box, box) for person in found) > 0.8


@pytest.mark.parametrize("name", ["coffee", "rocket", "brick", "grass"])
def test_no_person_is_found_in_pictures_without_persons(detector: PersonDetector, name: str) -> None:
    assert detector.detect([picture_of(name)]) == [[]]


def test_the_known_false_person_on_a_cats_face_goes_with_a_higher_threshold(detector: PersonDetector) -> None:
    cat = picture_of("chelsea")
    [[mistaken]] = detector.detect([cat])  # a limit of the model, kept in sight here
    assert 0.5 <= mistaken.score < 0.6
    assert NanoDet(score_threshold=0.6).detect([cat]) == [[]]


def test_a_picture_with_swapped_channels_loses_its_person(detector: PersonDetector) -> None:
    worker = emoji("1f9d1-200d-1f3ed")
    [[person], swapped] = detector.detect([worker, np.ascontiguousarray(worker[:, :, ::-1])])
    assert person.score > 0.8
    assert swapped == []


def test_detections_do_not_depend_on_other_pictures_or_threads(detector: PersonDetector) -> None:
    astronaut, coffee, cameraman = map(picture_of, ("astronaut", "coffee", "camera"))
    pictures = [astronaut, coffee, cameraman[100:], astronaut[:, 50:]]
    together = detector.detect(pictures)
    assert [len(found) for found in together] == [1, 0, 1, 1]
    assert together == [detector.detect([picture])[0] for picture in pictures]
    assert together[::-1] == make_detector("nanodet", threads=2).detect(pictures[::-1])
    assert detector.detect([]) == []


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
def test_a_picture_gives_the_same_bits_in_a_batch_of_any_size(
    detector: PersonDetector, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Shards are to be byte-identical wherever the packer's chunks are cut.
    pictures = [picture_of(name)[shift:] for shift in (0, 40) for name in ("astronaut", "camera", "coffee")]
    alone = [detector.detect([picture])[0] for picture in pictures]
    monkeypatch.setattr(nanodet, "BATCH", batch)
    batched = NanoDet()
    assert batched.detect(pictures) == alone

    assert isinstance(detector, NanoDet)
    names = nanodet.SCORE_OUTPUTS + nanodet.BIN_OUTPUTS
    x = np.empty((batch, 3, 416, 416), np.float32)
    for x_CHW, picture in zip(x, pictures):
        nanodet.preprocess(picture, out=x_CHW)
    together = detector._session.run(names, {"input_1": x[: len(pictures)]})
    single = detector._session.run(names, {"input_1": x[:1]})
    for several, one in zip(together, single):
        np.testing.assert_array_equal(several[:1], one)


def test_preprocessing_is_bgr_standardised_and_channels_first() -> None:
    x = np.empty((3, 416, 416), np.float32)
    nanodet.preprocess(np.full((10, 20, 3), (255, 128, 0), np.uint8), out=x)
    expected = [(0 - 103.53) / 57.375, (128 - 116.28) / 57.12, (255 - 123.675) / 58.395]
    np.testing.assert_allclose(x[:, 7, 300], expected, rtol=1e-5)
    np.testing.assert_array_equal(x, np.broadcast_to(x[:, 7:8, 300:301], x.shape))


class FakeSession:
    """Random network outputs, in the file's shapes."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.outputs: dict[str, np.ndarray] = {}
        for i, cells in enumerate((2704, 676, 169)):
            self.outputs[nanodet.SCORE_OUTPUTS[i]] = random.uniform(0, 0.52, (1, cells, 80)).astype("f4")
            self.outputs[nanodet.BIN_OUTPUTS[i]] = random.normal(0, 3, (1, cells, 44)).astype("f4")

    def run(self, names: tuple[str, ...], feeds: dict[str, Any]) -> list[np.ndarray]:
        return [self.outputs[name] for name in names]


def loop_candidates(outputs: dict[str, np.ndarray]) -> list[tuple[float, tuple[float, ...]]]:
    """Score and box of every cell at or above 0.5, one cell and one side at a time."""
    candidates = []
    for i, stride in enumerate((8, 16, 32)):
        columns = 416 // stride
        for cell in range(columns * columns):
            score = float(outputs[nanodet.SCORE_OUTPUTS[i]][0, cell, 0])
            if score < 0.5:
                continue
            ends = []
            for side, sign in enumerate((-1, -1, 1, 1)):
                bins = outputs[nanodet.BIN_OUTPUTS[i]][0, cell, side * 11 : side * 11 + 11]
                weights = [math.exp(value) for value in bins]
                strides = sum(k * weight for k, weight in enumerate(weights)) / sum(weights)
                index = cell // columns if side % 2 else cell % columns
                ends.append((index + 0.5 + sign * strides) * stride / 416)
            candidates.append((score, tuple(min(max(end, 0.0), 1.0) for end in ends)))
    return sorted(candidates, reverse=True)


@pytest.mark.parametrize("seed", [0, 1])
def test_decoding_and_suppression_agree_with_plain_loops(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = NanoDet()
    fake = FakeSession(seed)
    monkeypatch.setattr(detector, "_session", fake)
    [found] = detector.detect([np.zeros((4, 4, 3), np.uint8)])

    candidates = loop_candidates(fake.outputs)
    expected: list[tuple[float, tuple[float, ...]]] = []
    for score, box in candidates:
        if all(iou(box, kept) <= 0.6 for _, kept in expected):
            expected.append((score, box))
    assert 50 < len(expected) < len(candidates)  # both parts had something to do
    np.testing.assert_allclose([p.score for p in found], [score for score, _ in expected], atol=6e-5)
    np.testing.assert_allclose([p.box for p in found], [box for _, box in expected], atol=2e-5)


def test_suppression_keeps_the_best_of_each_overlapping_pair() -> None:
    first, second, third, far = (0, 0, 0.4, 0.4), (0, 0.1, 0.4, 0.5), (0, 0, 0.4, 0.3), (0.6, 0.6, 0.9, 0.9)
    boxes, scores = np.array([first, second, third, far, far]), np.array([0.9, 0.8, 0.95, 0.7, 0.7])
    # The third beats the first (IoU 0.12 / 0.16 = 0.75); the second then meets the third at 0.08 / 0.20 = 0.4
    # and stays, though it meets the first at 0.12 / 0.20 = 0.6; of the two equals the earlier one stays.
    assert suppress(boxes, scores, 0.6) == [2, 1, 3]
    assert suppress(boxes[:2], scores[:2], 0.61) == [0, 1]
    assert suppress(boxes[:2], scores[:2], 0.59) == [0]
    assert suppress(np.zeros((0, 4)), np.zeros(0), 0.6) == []


def test_a_person_is_clipped_rounded_and_survives_json() -> None:
    person = Person((-0.2, 0.1234567, 0.5, 1.7), 0.876543, {"valence": 3})
    assert person.box == (0.0, 0.12346, 0.5, 1.0)
    assert person.score == 0.8765
    text = json.dumps(person.to_json())
    assert text == '{"box": [0.0, 0.12346, 0.5, 1.0], "score": 0.8765, "labels": {"valence": 3}}'
    assert Person.from_json(json.loads(text)) == person
    assert Person((0, 0, 1, 1), 1).to_json() == {"box": [0.0, 0.0, 1.0, 1.0], "score": 1.0}


@pytest.mark.parametrize(
    ("box", "score"),
    [((0.5, 0, 0.4, 1), 0.9), ((0, 0.5, 1, 0.4), 0.9), ((0, math.nan, 1, 1), 0.9), ((0, 0, 1, 1), math.inf)],
)
def test_a_person_without_a_proper_box_or_score_is_refused(box: tuple, score: float) -> None:
    with pytest.raises(ValueError, match="a person's box"):
        Person(box, score)


@pytest.mark.parametrize("score", [-0.1, 1.1, 1e300])
def test_a_person_with_a_score_beyond_0_and_1_is_refused(score: float) -> None:
    with pytest.raises(ValueError, match="a person's score is between 0 and 1, got "):
        Person((0, 0, 1, 1), score)


@pytest.mark.parametrize("spec", ["none", "source"])
def test_none_and_source_detect_no_persons(spec: str) -> None:
    nobody = make_detector(spec)
    assert isinstance(nobody, NoDetector)
    assert nobody.name == spec
    assert nobody.identity == {"name": spec}
    assert nobody.detect([picture_of("astronaut")] * 2) == [[], []]


@pytest.mark.parametrize("spec", ["yolo", "", "NanoDet", "onnx", "onnx:", "nanodet:x"])
def test_an_unknown_detector_is_a_user_error_that_lists_the_valid_ones(spec: str) -> None:
    with pytest.raises(UserError) as caught:
        make_detector(spec)
    valid = "nanodet, onnx:FILE (a YOLO-type export), source (only the boxes of the source), none"
    assert str(caught.value) == f"--persons {spec!r}: not a person detector; valid are {valid}"


def test_a_missing_onnxruntime_is_a_user_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError) as caught:
        make_detector("nanodet")
    fix = 'run pip install -e ".[persons]" in your clone of uniemox-dist, or use --persons none'
    assert str(caught.value) == f"--persons nanodet needs onnxruntime; {fix}"


def test_less_than_one_thread_is_a_user_error() -> None:
    with pytest.raises(UserError, match="threads=0"):
        make_detector("nanodet", threads=0)


def test_the_identity_names_the_shipped_file_and_the_thresholds(detector: PersonDetector) -> None:
    folder = SHARDS / "detect" / "weights"
    sha256 = hashlib.sha256((folder / nanodet.MODEL_FILE).read_bytes()).hexdigest()
    thresholds = {"score_threshold": 0.5, "nms_iou": 0.6}
    assert detector.identity == {"name": "nanodet", "sha256": sha256, **thresholds}
    assert sha256 in (folder / "README.md").read_text()


def test_importing_the_detectors_needs_neither_onnxruntime_nor_torch() -> None:
    code = (
        "import sys, shards.detect.registry, shards.detect.nanodet, shards.detect.yolo; "
        "print({'onnxruntime', 'torch'} & set(sys.modules))"
    )
    output = subprocess.check_output([sys.executable, "-c", code], cwd=SHARDS.parent, text=True)
    assert output.strip() == "set()"
