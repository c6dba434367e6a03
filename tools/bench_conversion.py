"""Compares lossless ways to store pictures that shards do not store as they are: bytes, and CPU time to write and to
read, per picture.

The pictures are scikit-image's photos as AVIF shows them, so with the noise of a lossy format. The ways are PNG at two
levels and lossless WebP at three efforts; the packer uses the row marked with `*`. Times are the best of `--repeat`.
"""

import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from benchmark import make_parser, print_markdown, run_main, save_results
from options import positive_int
from PIL import Image

from shards.pack.shrink import LOSSLESS_WEBP

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "PNG, level 6": ("PNG", {}),
    "PNG, level 1": ("PNG", {"compress_level": 1}),
    "WebP, method 4, quality 80": ("WEBP", {"lossless": True, "exact": True}),
    "WebP, method 1, quality 20": ("WEBP", {"lossless": True, "exact": True, "method": 1, "quality": 20}),
    "WebP, method 0, quality 0 *": ("WEBP", LOSSLESS_WEBP),
}


def encode(picture: Image.Image, form: str, **options: Any) -> bytes:
    """A picture in one of Pillow's formats."""
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    """A picture as RGB."""
    with Image.open(io.BytesIO(data), formats=["AVIF", "PNG", "WEBP"]) as picture:
        return picture.convert("RGB")


def cpu_ms(call: Callable[[], Any], repeat: int) -> float:
    """Least CPU time of a call, milliseconds."""
    times = []
    for _ in range(repeat):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times) * 1000


def main() -> int:
    """Measures and prints."""
    parser = make_parser(__doc__)
    parser.add_argument("--width", type=positive_int, default=500)
    parser.add_argument("--repeat", type=positive_int, default=5)
    arguments = parser.parse_args()
    from skimage import data

    pictures = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        photo = Image.fromarray(getattr(data, name)())
        size = (arguments.width, round(photo.height * arguments.width / photo.width))
        pictures.append(decode(encode(photo.resize(size, Image.Resampling.LANCZOS), "AVIF")))
    rows = []
    for way, (form, options) in WAYS.items():
        files = [encode(picture, form, **options) for picture in pictures]
        assert all(decode(f).tobytes() == p.tobytes() for f, p in zip(files, pictures)), "not lossless"
        write = [cpu_ms(lambda: encode(p, form, **options), arguments.repeat) for p in pictures]  # noqa: B023
        read = [cpu_ms(lambda: decode(f), arguments.repeat) for f in files]  # noqa: B023
        kb = float(np.mean([len(file) for file in files])) / 1000
        rows.append(
            {"way": way, "kb": kb, "write_ms": float(np.mean(write)), "read_ms": float(np.mean(read))}
        )
    print_markdown(
        ("way", "kB", "write, ms", "read, ms"),
        [(str(r["way"]), f"{r['kb']:.0f}", f"{r['write_ms']:.1f}", f"{r['read_ms']:.1f}") for r in rows],
    )
    save_results(arguments, {"width": arguments.width, "rows": rows})
    return 0


if __name__ == "__main__":
    run_main(main)
