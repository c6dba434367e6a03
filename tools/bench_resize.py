"""Compares faster ways to decode and resize with the exact view: CPU time, and differences in grey levels.

The exact view is the full decode and `data.resize=bicubic`. The other rows change one part: `data.resize=bilinear`;
libjpeg-turbo's fast inverse transform; its fast upsampling of colours; and OpenCV's bilinear resize without
antialiasing, if OpenCV is installed. Pictures and views are those of bench_loader.py: a random scene view and the whole
picture. Times are of decoding and both views, per picture, the best of `--repeat` rounds in turn. Differences are over
all pixels and colours of all views.
"""

import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from bench_loader import load_photos, write_photos
from benchmark import make_parser, print_markdown, run_main, save_results
from options import photo_folder, positive_int
from torch import Tensor

from uniemox_dist.data.crops import View, ViewSettings, plan_training_views
from uniemox_dist.data.views import render_view

SETTINGS = ViewSettings()
Way = Callable[[bytes, list[View]], list[Tensor]]


def render_views(jpeg: bytes, views: list[View], resize: str = "bicubic", **decoding: bool) -> list[Tensor]:
    """Decodes a picture and renders its views by one filter and options of the JPEG decoder."""
    rgb_3HW = torch.from_numpy(simplejpeg.decode_jpeg(jpeg, **decoding)).permute(2, 0, 1)
    return [render_view(rgb_3HW, replace(view, resize=resize), SETTINGS.image_size) for view in views]


def render_with_opencv(jpeg: bytes, views: list[View]) -> list[Tensor]:
    """The same with OpenCV's bilinear resize, which takes 2×2 pixels however large the crop is."""
    import cv2

    rgb_HW3, size, found = simplejpeg.decode_jpeg(jpeg), SETTINGS.image_size, []
    for view in views:
        left, top, width, height = view.box
        crop_HW3 = rgb_HW3[top : top + height, left : left + width]
        view_SS3 = cv2.resize(crop_HW3, (size, size), interpolation=cv2.INTER_LINEAR)
        found.append(torch.from_numpy(cv2.flip(view_SS3, 1) if view.mirror else view_SS3).permute(2, 0, 1))
    return found


def measure(ways: dict[str, Way], inputs: list[tuple[bytes, list[View]]], rounds: int) -> dict[str, float]:
    """Returns microseconds of CPU time per picture of each way, the best of some rounds in turn."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.process_time()
            for jpeg, views in inputs:
                way(jpeg, views)
            best[name] = min(best[name], 1e6 * (time.process_time() - started) / len(inputs))
    return best


def compare(exact: list[Tensor], other: list[Tensor]) -> dict[str, float]:
    """Returns mean, 99.9th percentile and maximum of the absolute differences in grey levels."""
    pairs = zip(exact, other)
    counts = sum(np.bincount((a.int() - b.int()).abs().numpy().ravel(), minlength=256) for a, b in pairs)
    shares = np.cumsum(counts) / np.sum(counts)
    return {
        "mean": float(np.dot(np.arange(256), counts) / np.sum(counts)),
        "p99.9": int(np.searchsorted(shares, 0.999)),
        "max": int(np.flatnonzero(counts)[-1]),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--photos", type=photo_folder, help="folder of JPEGs at least 1,024 pixels wide")
    parser.add_argument("--widths", type=positive_int, nargs="+", default=[256, 500, 1024])
    parser.add_argument("--count", type=positive_int, default=100, help="pictures of each width")
    parser.add_argument("--quality", type=positive_int, default=85, help="of the JPEGs")
    parser.add_argument("--repeat", type=positive_int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways: dict[str, Way] = {
        "bicubic, the exact view": render_views,
        "bilinear": partial(render_views, resize="bilinear"),
        "bicubic, fast inverse transform": partial(render_views, fastdct=True),
        "bicubic, fast upsampling of colours": partial(render_views, fastupsample=True),
    }
    if importlib.util.find_spec("cv2") is None:
        print("opencv-python-headless: is not installed; left out")
    else:
        import cv2

        cv2.setNumThreads(1)
        ways["OpenCV's bilinear, not antialiased"] = render_with_opencv
    results = []
    with tempfile.TemporaryDirectory() as name:
        what, photos = load_photos(options.photos, Path(name))
        print(f"{what}; {options.count} crops a width, JPEG quality {options.quality}\n", flush=True)
        for width in options.widths:
            folder = Path(name) / str(width)
            write_photos(photos, folder, width, options.count, options.quality)
            inputs = []
            for slot, path in enumerate(sorted(folder.glob("*.jpg"))):
                jpeg = path.read_bytes()
                height, _, *_ = simplejpeg.decode_jpeg_header(jpeg)
                plan = plan_training_views(width, height, (), replace(SETTINGS, image_size=4096), 0, slot)
                assert plan.person is not None
                inputs.append((jpeg, [plan.scene, plan.person]))
            times = measure(ways, inputs, options.repeat)
            views = {way: [v for picture in inputs for v in make(*picture)] for way, make in ways.items()}
            exact = next(iter(ways))
            for way in ways:
                levels = compare(views[exact], views[way])
                speed = times[exact] / times[way]
                results.append({"width": width, "way": way, "us": times[way], "speed": speed, **levels})
    save_results(options, {"photos": what, "rows": results})
    header = ["width", "way", "µs", "speed", "mean", "99.9 %", "largest"]
    print_markdown(
        header,
        [
            [str(row["width"]), row["way"], f"{row['us']:.0f}", f"{row['speed']:.2f}", f"{row['mean']:.2f}",
             str(row["p99.9"]), str(row["max"])]
            for row in results
        ],
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main)
