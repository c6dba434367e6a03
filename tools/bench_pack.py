"""Compares packing with simpler ways, on the same pictures, in one run: prints a table, and writes it with `--json
FILE`.

Rows: this packer with 2 workers (once reading all data of every picture, once only hashing it), a plain loop of
Pillow's `.load()` and `webdataset.ShardWriter`, and `tar cf`. The photos are crops of scikit-image's photos, 500
pixels wide; no two files are equal. With `--mixed` they are stored in nine formats in turn, and a further row is a
plain loop that converts to PNG what is not JPEG, PNG or WebP, as the packer converts to lossless WebP. The ways take
turns, `--repeat` times, and the best time of each counts; CPU time includes all processes. None waits for the disk,
except that the packer calls fsync for each shard.

Then it compares the CPU time in which the samples of a tar are found: over the whole tar, in order and with all
pictures before all captions, and by Python's `tarfile` among neighbours only.
"""

import io
import multiprocessing
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from benchmark import make_parser, run_main, save_results, time_call, time_in_turn
from options import positive_int
from PIL import Image

TAR_SAMPLES = 10_000
DISTINCT = 1000
"""Pictures with different pixels; further ones repeat them."""
MIXED: tuple[tuple[str, str], ...] = (
    ("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp"), ("TIFF", "tif"),
    ("JPEG2000", "jp2"), ("AVIF", "avif"), ("PPM", "ppm"),
)  # fmt: skip
KEPT = ("JPEG", "MPO", "PNG", "WEBP")


def draw_photos(count: int, width: int) -> Iterator[Image.Image]:
    """Yields crops of real photos."""
    from skimage import data

    rng = np.random.default_rng(0)
    photos = [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    for i in range(count):
        photo = photos[i % len(photos)]
        share = rng.uniform(0.6, 1.0)
        w, h = int(photo.width * share), int(photo.height * share)
        x, y = (int(rng.integers(0, room + 1)) for room in (photo.width - w, photo.height - h))
        crop = photo.crop((x, y, x + w, y + h))
        yield crop.resize((width, round(width * h / w)), Image.Resampling.LANCZOS)


def make_photos(folder: Path, count: int, width: int) -> int:
    """Writes `count` JPEGs and returns their bytes."""
    encoded = [encode(photo, "JPEG") for photo in draw_photos(min(count, DISTINCT), width)]
    size = 0
    for i in range(count):
        # Repeated pixels get different comments, so that no two files have the same bytes.
        comment = b"\xff\xfe\x00\x0a" + b"%08d" % i
        content = encoded[i % DISTINCT][:2] + comment + encoded[i % DISTINCT][2:]
        size += write_labelled(folder, i, "jpg", content)
    return size


def make_mixed(folder: Path, count: int, width: int) -> int:
    """Writes `count` pictures in the formats of `MIXED` in turn and returns their bytes."""
    size = 0
    for i, photo in enumerate(draw_photos(count, width)):
        form, extension = MIXED[i % len(MIXED)]
        size += write_labelled(folder, i, extension, encode(photo, form))
    return size


def encode(photo: Image.Image, form: str) -> bytes:
    """Encodes a photo; lossy formats at quality 90."""
    buffer = io.BytesIO()
    photo.save(buffer, form, **({"quality": 90} if form in ("JPEG", "WEBP", "AVIF") else {}))
    return buffer.getvalue()


def write_labelled(folder: Path, number: int, extension: str, content: bytes) -> int:
    """Writes a picture into the folder of one of two labels and returns its bytes."""
    path = folder / ("joy", "awe")[number % 2] / f"{number:06d}.{extension}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return len(content)


def packer(photos: Path, out: Path, workers: int, check: str) -> None:
    """This project's packer, run like its command line, without the start of Python."""
    from shards.pack.pipeline import pack
    from shards.pack.settings import PackSettings

    pack(PackSettings(str(photos), "folder", persons="none", check=check), out, workers=workers)


def plain_loop(photos: Path, out: Path, converts: bool = False) -> None:
    """A plain loop of a dozen lines: decodes every picture and writes it with its label."""
    import webdataset

    out.mkdir()
    with webdataset.ShardWriter(str(out / "%06d.tar"), maxcount=10_000, maxsize=256e6, verbose=0) as writer:
        for path in sorted(path for path in photos.rglob("*") if path.is_file()):
            data, extension = path.read_bytes(), path.suffix[1:]
            image = Image.open(io.BytesIO(data), formats=[form for form, _ in MIXED])
            image.load()
            if converts and image.format not in KEPT:
                data, extension = encode(image, "PNG"), "png"
            writer.write(
                {"__key__": path.stem, extension: data, "json": {"label": path.parent.name}, "txt": ""}
            )


def tar(photos: Path, out: Path) -> None:
    """GNU tar, which writes one file."""
    out.mkdir()
    subprocess.run(["tar", "cf", out / "all.tar", "-C", photos, "."], check=True)


def measure(
    ways: dict[str, Callable[[Path], None]], work: Path, repeat: int
) -> dict[str, tuple[float, float]]:
    """Best seconds of each way, and its least CPU seconds, child processes included."""
    out, used = work / "out", dict.fromkeys(ways.values(), float("inf"))

    def measure_way(way: Callable[[Path], None]) -> float:
        before = cpu_s()
        seconds = time_call(lambda: way(out))
        for child in multiprocessing.active_children():
            child.join()  # only then its CPU time counts
        used[way] = min(used[way], cpu_s() - before)
        shutil.rmtree(out)
        return seconds

    found = time_in_turn(ways, repeat, measure_way)
    return {name: (min(seconds), used[ways[name]]) for name, seconds in found.items()}


def cpu_s() -> float:
    """CPU seconds of this process and of its finished children."""
    return sum(os.times()[:4])


def find_samples(work: Path, samples: int, repeat: int) -> dict[str, float]:
    """CPU seconds in which each way finds the samples of a tar."""
    from shards.format.tars import read_groups

    def write(name: str, members: list[str]) -> Path:
        with tarfile.open(work / name, "w", format=tarfile.USTAR_FORMAT) as out:
            for member in members:
                info = tarfile.TarInfo(member)
                info.size = 2000
                out.addfile(info, io.BytesIO(bytes(2000)))
        return work / name

    ends = ("jpg", "json", "txt")
    in_order = write("in_order.tar", [f"{i:08d}.{end}" for i in range(samples) for end in ends])
    apart = write("apart.tar", [f"{i:08d}.{end}" for end in ends for i in range(samples)])

    def neighbours() -> None:
        last, groups = "", 0
        with open(in_order, "rb") as raw, tarfile.open(fileobj=raw, mode="r:") as members:
            while (member := members.next()) is not None:
                members.members = []  # type: ignore[attr-defined]  # otherwise tarfile keeps every member
                key = member.name.partition(".")[0]
                groups, last = groups + (key != last), key
        assert groups == samples

    def measure_cpu(way: Callable[[], object]) -> float:
        started = time.process_time()
        way()
        return time.process_time() - started

    ways: dict[str, Callable[[], object]] = {
        "tarfile, neighbours only": neighbours,
        "whole tar, members in order": lambda: sum(1 for _ in read_groups(in_order)),
        "whole tar, pictures before captions": lambda: sum(1 for _ in read_groups(apart)),
    }
    return {name: min(seconds) for name, seconds in time_in_turn(ways, repeat, measure_cpu).items()}


def main() -> int:
    """Measures and prints."""
    parser = make_parser(__doc__)
    parser.add_argument("--photos", type=positive_int, default=20_000)
    parser.add_argument("--width", type=positive_int, default=500)
    parser.add_argument("--workers", type=positive_int, default=2)
    parser.add_argument("--repeat", type=positive_int, default=3)
    parser.add_argument("--mixed", action="store_true", help="pictures in nine formats instead of JPEGs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_pack_") as name:
        work = Path(name)
        photos = work / "photos"
        photos.mkdir()
        make = make_mixed if arguments.mixed else make_photos
        size = make(photos, arguments.photos, arguments.width)
        workers = arguments.workers
        ways: dict[str, Callable[[Path], None]] = {
            f"uniemox, {workers} workers, every picture decoded": lambda out: packer(
                photos, out, workers, "decode"
            ),
            "plain loop, every picture decoded": lambda out: plain_loop(photos, out),
            f"uniemox, {workers} workers, hashed only": lambda out: packer(photos, out, workers, "header"),
            "tar cf": lambda out: tar(photos, out),
        }
        if arguments.mixed:
            ways["plain loop, converting to PNG"] = lambda out: plain_loop(photos, out, converts=True)
        seconds = measure(ways, work, arguments.repeat)
        finding = find_samples(work, TAR_SAMPLES, arguments.repeat)
    rows = [
        {
            "way": way,
            "seconds": s,
            "pictures_per_s": arguments.photos / s,
            "mb_per_s": size / 1e6 / s,
            "cpu_ms_per_picture": 1000 * cpu / arguments.photos,
        }
        for way, (s, cpu) in seconds.items()
    ]
    print(
        f"{arguments.photos} pictures of {arguments.width} pixels, {size / 1e6:.0f} MB, best of {arguments.repeat}\n"
    )
    for row in rows:
        print(
            f"{row['way']:50} {row['seconds']:7.2f} s {row['pictures_per_s']:8.0f}/s {row['mb_per_s']:7.0f} MB/s "
            f"{row['cpu_ms_per_picture']:7.2f} ms CPU a picture"
        )
    decoded, loop, hashed, plain, *converting = (row["seconds"] for row in rows)
    ratios = {"decoded_to_plain_loop": loop / decoded, "hashed_to_tar": plain / hashed}
    print(f"\ndecoded: {ratios['decoded_to_plain_loop']:.2f} times the plain loop's speed (aim: 3)")
    print(f"hashed:  {ratios['hashed_to_tar']:.2f} times tar's speed (aim: 0.5)")
    if converting:
        ratios["decoded_to_converting_loop"] = converting[0] / decoded
        print(f"decoded: {converting[0] / decoded:.2f} times the speed of the loop that converts to PNG")
    facts = {
        "mixed": arguments.mixed,
        "photos": arguments.photos,
        "width": arguments.width,
        "bytes": size,
        "rows": rows,
        **ratios,
    }
    print(f"\nto find the {TAR_SAMPLES} samples of a tar, CPU time:")
    for way, spent in finding.items():
        print(f"{way:50} {spent:7.2f} s {spent / TAR_SAMPLES * 1e6:8.1f} us a sample")
    save_results(arguments, {**facts, "find_samples_cpu_s": finding})
    return 0


if __name__ == "__main__":
    run_main(main)
