"""Measures how a reduced JPEG decode changes views; prints a table.

Square crops of photos are rendered as views of 224 pixels twice: from the full decode, and from a JPEG decoded at half
size. For each number of decoded pixels per pixel of the view (the loader keeps at least `crops.DENSITY`), the table has
the mean absolute difference of the two views in grey levels, and the same for a 2×2 box filter instead of the reduced
decode, which separates the decoder's effect from that of filtering twice. Photos come from the same sources as in
bench_loader.py.
"""

import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from bench_loader import load_photos
from benchmark import make_parser, run_main, save_results
from options import photo_folder, positive_int
from PIL import Image

from shards.pictures.decode import decode_scaled
from shards.pictures.pixels import WHITE
from uniemox_dist.data.crops import DENSITY
from uniemox_dist.data.views import crop_and_resize

SIZE = 224
DENSITIES = (1.0, 1.25, 1.35, 1.5, 1.75, 2.0)


def view(array_HW3: np.ndarray, left: int, top: int, side: int) -> torch.Tensor:
    """Renders a crop as a view, in signed numbers."""
    return crop_and_resize(
        torch.from_numpy(array_HW3).permute(2, 0, 1), (left, top, side, side), SIZE
    ).short()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().float().mean())


def main() -> None:
    parser = make_parser(__doc__.partition("\n\n")[0])
    parser.add_argument("--photos", type=photo_folder, help="folder of JPEGs at least 1,500 pixels wide")
    parser.add_argument("--quality", type=positive_int, default=90, help="of the JPEGs")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    found: dict[float, list[tuple[float, float]]] = {density: [] for density in DENSITIES}
    with tempfile.TemporaryDirectory() as name:
        what, photos = load_photos(options.photos, Path(name))
    for photo in photos:
        buffer = io.BytesIO()
        photo.save(buffer, "JPEG", quality=options.quality)
        whole, _ = decode_scaled(buffer.getvalue(), WHITE, 1)
        half, _ = decode_scaled(buffer.getvalue(), WHITE, 2)
        boxed = np.array(Image.fromarray(whole).reduce(2))
        height, width = whole.shape[:2]
        for density in DENSITIES:
            side = int(density * SIZE)
            if 2 * side > min(height, width):
                continue
            left, top = (
                int(rng.integers(0, width // 2 - side + 1)),
                int(rng.integers(0, height // 2 - side + 1)),
            )
            expected = view(whole, 2 * left, 2 * top, 2 * side)
            found[density].append(
                (
                    distance(view(half, left, top, side), expected),
                    distance(view(boxed, left, top, side), expected),
                )
            )
    rows = []
    print(
        f"{what}, JPEG quality {options.quality}; grey levels at {SIZE} pixels; the loader keeps {DENSITY:g}\n"
    )
    print("pixels for each  photos   mean  90 % below  worst   2x2 box, mean")
    for density, pairs in found.items():
        if pairs:
            half_levels, box_levels = np.array(pairs).T
            row = {
                "density": density,
                "photos": len(pairs),
                "mean": float(half_levels.mean()),
                "p90": float(np.quantile(half_levels, 0.9)),
                "worst": float(half_levels.max()),
                "box_mean": float(box_levels.mean()),
            }
            rows.append(row)
            print(
                f"{density:15.2f} {row['photos']:7d} {row['mean']:6.2f} {row['p90']:11.2f} {row['worst']:6.2f} "
                f"{row['box_mean']:15.2f}"
            )
    save_results(options, {"command": sys.argv, "photos": what, "rows": rows})


if __name__ == "__main__":
    run_main(main)
