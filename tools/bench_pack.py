"""Compares packing with simpler ways, on the same photos, in one run: prints a table, and writes it with `--json
FILE`.

Rows: this packer with 2 workers (once reading all data of every picture, once only hashing it), a plain loop of
Pillow's `.load()` and `webdataset.ShardWriter`, and `tar cf`. The photos are crops of scikit-image's photos, 500
pixels wide; no two files are equal. The ways take turns, `--repeat` times, and the best time of each counts. None
waits for the disk, except that the packer calls fsync for each shard.
"""

import io
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from benchmark import make_parser, run_main, save_results, time_call, time_in_turn
from options import positive_int
from PIL import Image

DISTINCT = 1000
"""Pictures with different pixels; further ones repeat them."""


def make_photos(folder: Path, count: int, width: int) -> int:
    """Writes `count` JPEGs and returns their bytes."""
    from skimage import data

    rng = np.random.default_rng(0)
    photos = [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    encoded: list[bytes] = []
    size = 0
    for i in range(count):
        if i < DISTINCT:
            photo = photos[i % len(photos)]
            share = rng.uniform(0.6, 1.0)
            w, h = int(photo.width * share), int(photo.height * share)
            x, y = int(rng.integers(photo.width - w + 1)), int(rng.integers(photo.height - h + 1))
            crop = photo.crop((x, y, x + w, y + h))
            buffer = io.BytesIO()
            crop.resize((width, round(width * h / w)), Image.Resampling.LANCZOS).save(
                buffer, "JPEG", quality=90
            )
            encoded.append(buffer.getvalue())
        # Repeated pixels get different comments, so that no two files have the same bytes.
        comment = b"\xff\xfe\x00\x0a" + b"%08d" % i
        content = encoded[i % DISTINCT][:2] + comment + encoded[i % DISTINCT][2:]
        path = folder / ("joy", "awe")[i % 2] / f"{i:06d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        size += len(content)
    return size


def packer(photos: Path, out: Path, workers: int, check: str) -> None:
    """This project's packer, run like its command line, without the start of Python."""
    from shards.pack.pipeline import pack
    from shards.pack.settings import PackSettings

    pack(PackSettings(str(photos), "folder", persons="none", check=check), out, workers=workers)


def plain_loop(photos: Path, out: Path) -> None:
    """A plain loop of ten lines: decodes every picture and writes it with its label."""
    import webdataset

    out.mkdir()
    with webdataset.ShardWriter(str(out / "%06d.tar"), maxcount=10_000, maxsize=256e6, verbose=0) as writer:
        for path in sorted(photos.rglob("*.jpg")):
            data = path.read_bytes()
            Image.open(io.BytesIO(data)).load()
            writer.write({"__key__": path.stem, "jpg": data, "json": {"label": path.parent.name}, "txt": ""})


def tar(photos: Path, out: Path) -> None:
    """GNU tar, which writes one file."""
    out.mkdir()
    subprocess.run(["tar", "cf", out / "all.tar", "-C", photos, "."], check=True)


def measure(ways: dict[str, Callable[[Path], None]], work: Path, repeat: int) -> dict[str, float]:
    """Best seconds of each way."""
    out = work / "out"

    def measure_way(way: Callable[[Path], None]) -> float:
        seconds = time_call(lambda: way(out))
        shutil.rmtree(out)
        return seconds

    return {name: min(seconds) for name, seconds in time_in_turn(ways, repeat, measure_way).items()}


def main() -> int:
    """Measures and prints."""
    parser = make_parser(__doc__)
    parser.add_argument("--photos", type=positive_int, default=20_000)
    parser.add_argument("--width", type=positive_int, default=500)
    parser.add_argument("--workers", type=positive_int, default=2)
    parser.add_argument("--repeat", type=positive_int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_pack_") as name:
        work = Path(name)
        photos = work / "photos"
        photos.mkdir()
        size = make_photos(photos, arguments.photos, arguments.width)
        workers = arguments.workers
        ways: dict[str, Callable[[Path], None]] = {
            f"uniemox, {workers} workers, every picture decoded": lambda out: packer(
                photos, out, workers, "decode"
            ),
            "plain loop, every picture decoded": lambda out: plain_loop(photos, out),
            f"uniemox, {workers} workers, hashed only": lambda out: packer(photos, out, workers, "header"),
            "tar cf": lambda out: tar(photos, out),
        }
        seconds = measure(ways, work, arguments.repeat)
    rows = [
        {"way": way, "seconds": s, "pictures_per_s": arguments.photos / s, "mb_per_s": size / 1e6 / s}
        for way, s in seconds.items()
    ]
    print(
        f"{arguments.photos} photos of {arguments.width} pixels, {size / 1e6:.0f} MB, best of {arguments.repeat}\n"
    )
    for row in rows:
        print(
            f"{row['way']:50} {row['seconds']:7.2f} s {row['pictures_per_s']:8.0f}/s {row['mb_per_s']:7.0f} MB/s"
        )
    decoded, loop, hashed, plain = (row["seconds"] for row in rows)
    ratios = {"decoded_to_plain_loop": loop / decoded, "hashed_to_tar": plain / hashed}
    print(f"\ndecoded: {ratios['decoded_to_plain_loop']:.2f} times the plain loop's speed (aim: 3)")
    print(f"hashed:  {ratios['hashed_to_tar']:.2f} times tar's speed (aim: 0.5)")
    facts = {"photos": arguments.photos, "width": arguments.width, "bytes": size, "rows": rows, **ratios}
    save_results(arguments, facts)
    return 0


if __name__ == "__main__":
    run_main(main)
