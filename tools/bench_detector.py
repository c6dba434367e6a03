"""Measures the speed of the person detector on one thread: `python tools/bench_detector.py [--json FILE]`.

Each way of running the detector processes the same 64 crops of photographs; the ways take turns, and each reports its
best round. `plain` processes one picture at a time with the textbook preprocessing, on the file of `--original` if
given. Use `--persons` to measure `--persons onnx:FILE`. On a busy machine pin the process to one core (`taskset -c
0`).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
from benchmark import make_parser, run_main, save_results, time_in_turn
from options import positive_int
from PIL import Image
from skimage import data

from shards.detect import nanodet
from shards.detect.nanodet import BGR_MEAN, BGR_STD, SIDE_PX, NanoDet
from shards.detect.onnx_session import open_session
from shards.detect.registry import make_detector
from shards.detect.types import Person

PHOTOS = ("astronaut", "coffee", "rocket", "chelsea", "hubble_deep_field", "retina")
PICTURES = 64
CROP_PX = 500
BATCHES = (1, 2, 4, 8, 16)

Way = Callable[[list[np.ndarray]], list[list[Person]]]


def crops() -> list[np.ndarray]:
    """Crops of at most 500 px per side, at positions drawn with a fixed seed."""
    photos = [getattr(data, name)() for name in PHOTOS]
    random = np.random.default_rng(0)
    pictures = []
    for i in range(PICTURES):
        photo = photos[i % len(photos)]
        top, left = (random.integers(0, max(side - CROP_PX, 0) + 1) for side in photo.shape[:2])
        pictures.append(np.ascontiguousarray(photo[top : top + CROP_PX, left : left + CROP_PX]))
    return pictures


def plain(original: Path | None) -> Way:
    """Processes pictures one by one, with new arrays for each."""
    detector = NanoDet()
    if original is not None:
        detector._session = open_session(original.read_bytes(), threads=1, persons="nanodet")
    names = nanodet.SCORE_OUTPUTS + nanodet.BIN_OUTPUTS

    def detect_one(picture: np.ndarray) -> list[Person]:
        resized = Image.fromarray(picture).resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR)
        bgr = np.asarray(resized, np.float32)[:, :, ::-1]
        x = np.ascontiguousarray(((bgr - BGR_MEAN) / BGR_STD).transpose(2, 0, 1)[None])
        outputs = detector._session.run(names, {"input_1": x})
        scores = np.concatenate([values[0, :, nanodet.PERSON_CLASS] for values in outputs[:3]])
        return detector._persons(scores, np.concatenate([values[0] for values in outputs[3:]]))

    return lambda pictures: [detect_one(picture) for picture in pictures]


def batched(batch: int) -> Way:
    nanodet.BATCH = batch
    detector = NanoDet()

    def detect(pictures: list[np.ndarray]) -> list[list[Person]]:
        nanodet.BATCH = batch
        return detector.detect(pictures)

    return detect


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--original", type=Path, metavar="ONNX", help="the file `plain` runs")
    parser.add_argument("--persons", metavar="SPEC", help="a further detector, as `--persons` names it")
    parser.add_argument("--rounds", type=positive_int, default=3)
    options = parser.parse_args()

    ways = {"plain": plain(options.original)} | {f"batch {n}": batched(n) for n in BATCHES}
    if options.persons:
        ways[options.persons] = make_detector(options.persons, threads=1).detect
    pictures = crops()
    persons: dict[str, int] = {}

    def count_persons(name: str) -> None:
        persons[name] = sum(map(len, ways[name](pictures)))

    calls = {name: partial(count_persons, name) for name in ways}
    best_s = {name: min(seconds) for name, seconds in time_in_turn(calls, options.rounds).items()}

    print(f"{PICTURES} pictures, onnxruntime {onnxruntime.__version__}, 1 thread, best of {options.rounds}")
    print(f"{'way':<12} {'pictures/s':>10} {'ms/picture':>10} {'persons':>8}")
    rows = [
        {"way": name, "pictures_per_s": round(PICTURES / s, 2), "persons": persons[name]}
        for name, s in best_s.items()
    ]
    for row, s in zip(rows, best_s.values()):
        print(f"{row['way']:<12} {row['pictures_per_s']:>10} {s / PICTURES * 1e3:>10.1f} {row['persons']:>8}")
    save_results(options, {"pictures": PICTURES, "threads": 1, "ways": rows})


if __name__ == "__main__":
    run_main(main)
