"""Compares the loader with plain webdataset on the same shards of real photos; prints a table.

Rows are samples per second of one core, from tar on disk to collated batch, through one loader process: (a) this loader
with both views; (b) webdataset with Pillow and torchvision's transforms and two normalised float views, as in the
released code's loader; (c) decoding alone in a loop, which is the limit. They run in turn, `--repeat` times, and the
best time of each counts. The photos have no annotated persons, so the person view is the whole picture, the most
expensive case. A second table shows how (a) spends its time.

Photos come from `--photos DIR`, or from npm's tabler-ui (fetched by `npm pack`, not kept), or from scikit-image.
"""

import io
import math
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset
from benchmark import make_parser, save_results
from PIL import Image
from torchvision import transforms

from shards.pack.pipeline import PackSettings, pack
from uniemox_dist.config.schema import Config
from uniemox_dist.data.crops import plan_training_views
from uniemox_dist.data.decode import decode_rgb
from uniemox_dist.data.loader import PlannedDataset, view_settings
from uniemox_dist.data.sources import Sources
from uniemox_dist.data.step_batches import StepBatches
from uniemox_dist.data.views import render_view

MICRO_BATCH = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PACKAGE = "tabler-ui@0.0.34"


def load_photos(folder: Path | None, scratch: Path) -> tuple[str, list[Image.Image]]:
    """Returns photos of at least 1,024 pixels, and a description of them."""
    if folder is None and shutil.which("npm"):
        fetched = subprocess.run(["npm", "pack", PACKAGE], cwd=scratch, capture_output=True, check=False)
        if fetched.returncode == 0:
            with tarfile.open(next(scratch.glob("*.tgz"))) as tar:
                # The package contains each photo twice, in different folders.
                by_name = {m.name.rpartition("/")[2]: m for m in tar if m.name.endswith("-1500.jpg")}
                members = [by_name[name] for name in sorted(by_name)]
                files = [io.BytesIO(tar.extractfile(m).read()) for m in members]  # type: ignore[union-attr]
            return f"{len(files)} photos of {PACKAGE}", [Image.open(file).convert("RGB") for file in files]
    if folder is not None:
        paths = sorted(folder.rglob("*.jpg"))
        return f"{len(paths)} photos of {folder}", [Image.open(path).convert("RGB") for path in paths]
    from skimage import data

    names = ("astronaut", "chelsea", "coffee", "rocket")
    return "scikit-image's photos", [Image.fromarray(getattr(data, name)()) for name in names]


def write_photos(photos: list[Image.Image], folder: Path, width: int, count: int, quality: int) -> int:
    """Writes `count` JPEGs `width` pixels wide, each a different crop; returns their total bytes."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    size = 0
    for i in range(count):
        photo = photos[i % len(photos)]
        share = rng.uniform(0.75, 1.0)
        w, h = int(photo.width * share), int(photo.height * share)
        x, y = rng.integers(0, photo.width - w + 1), rng.integers(0, photo.height - h + 1)
        crop = photo.resize((width, round(width * h / w)), Image.Resampling.LANCZOS, (x, y, x + w, y + h))
        crop.save(folder / f"{i:05d}.jpg", quality=quality)
        size += (folder / f"{i:05d}.jpg").stat().st_size
    return size


def make_config(shards: Path) -> Config:
    return Config.model_validate(
        {
            "run": {"max_steps": 1},
            "data": {"path": str(shards), "workers": 1, "prefetch": 4},
            "batch": {"global_batch": MICRO_BATCH, "micro_batch": MICRO_BATCH, "streams": 8},
            "teacher": {"name": "shipped:demo"},
        }
    )


def make_dataset(config: Config) -> PlannedDataset:
    sources = Sources(config)
    return PlannedDataset(sources.plan(config), sources.readers, None, view_settings(config), config.run.seed)


def ours(shards: Path) -> Iterator[int]:
    config = make_config(shards)
    with StepBatches(make_dataset(config), config, first_step=0, rank=0, world_size=1, pin=False) as batches:
        while True:
            yield sum(len(batch.scene_B3HW) for batch in batches.next_step())


def plain(shards: Path) -> Iterator[int]:
    def view() -> Callable[[Any], torch.Tensor]:
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    224, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
                ),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    scene, person = view(), view()
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    data = (
        webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        .repeat()
        .decode("pilrgb")
        .to_tuple("jpg", "txt")
        .map(lambda sample: (scene(sample[0]), person(sample[0]), sample[1]))
        .batched(MICRO_BATCH)
    )
    loader = webdataset.WebLoader(
        data, batch_size=None, num_workers=1, prefetch_factor=4, multiprocessing_context="fork"
    )
    for batch in loader:
        yield len(batch[0])


def decoding(shards: Path) -> Iterator[int]:
    files = list(read_pictures(shards))
    while True:
        for file in files:
            simplejpeg.decode_jpeg(file)
            yield 1


def read_pictures(shards: Path) -> Iterator[bytes]:
    config = make_config(shards)
    [reader] = Sources(config).readers
    for shard, entry in enumerate(reader.manifest.shards):
        for row in range(entry.samples):
            yield reader.read(shard, row).image


def measure_rate(make: Callable[[Path], Iterator[int]], shards: Path, seconds: float) -> float:
    """Measures samples per second of one way, after start-up and prefetched batches."""
    batches = make(shards)
    warm = 0
    while warm < 6 * MICRO_BATCH:
        warm += next(batches)
    done, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        done += next(batches)
    batches.close()  # type: ignore[attr-defined]
    return done / elapsed


def profile(shards: Path, seconds: float) -> dict[str, float]:
    """Measures milliseconds per sample of the parts of (a), in this process."""
    config = make_config(shards)
    data = make_dataset(config)
    settings, [reader] = data.settings, data.readers
    spent = dict.fromkeys(("plan, index, read, hash", "crops", "decode", "resize, two views"), 0.0)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        marks = [time.perf_counter()]
        place = data.plan.locate(done)
        raw = reader.read(place.shard, place.row)
        marks.append(time.perf_counter())
        plan = plan_training_views(raw.width, raw.height, raw.persons, settings, 0, done)
        marks.append(time.perf_counter())
        array, scale = decode_rgb(raw.image, plan.background, plan.scale)
        marks.append(time.perf_counter())
        rgb = torch.from_numpy(array).permute(2, 0, 1)
        for view in (plan.scene, plan.person):
            render_view(rgb, view, settings.image_size, scale)  # type: ignore[arg-type]
        marks.append(time.perf_counter())
        for name, start, end in zip(spent, marks, marks[1:]):
            spent[name] += 1e3 * (end - start)
        done += 1
    return {name: ms / done for name, ms in spent.items()}


def main() -> None:
    parser = make_parser(__doc__.partition("\n\n")[0])
    parser.add_argument("--photos", type=Path, help="folder of JPEGs at least 1,024 pixels wide")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 500, 1024])
    parser.add_argument("--count", type=int, default=400, help="pictures of each width")
    parser.add_argument("--quality", type=int, default=80, help="of the JPEGs; the photos' own is 80")
    parser.add_argument("--seconds", type=float, default=6, help="of each row, each time")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--gpu", type=float, default=1000, help="samples per second that a GPU takes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        what, photos = load_photos(options.photos, scratch)
        print(
            f"{what}; {options.count} crops a width, JPEG quality {options.quality}; samples per second of one core\n"
        )
        print(
            f"{'width':>6s} {'KB':>5s} {'(a) ours':>9s} {'(b) plain':>9s} {'(c) decode':>10s}   a/b   a/c  cores"
        )
        for width in options.widths:
            size = write_photos(photos, scratch / f"{width}/x", width, options.count, options.quality)
            shards = scratch / f"shards{width}"
            pack(PackSettings(str(scratch / f"{width}"), "folder", persons="none", shard_samples=100), shards)
            best = dict.fromkeys("abc", 0.0)
            for _ in range(options.repeat):
                for letter, make in zip("abc", (ours, plain, decoding)):
                    best[letter] = max(best[letter], measure_rate(make, shards, options.seconds))
            a, b, c = best.values()
            parts = profile(shards, options.seconds)
            cores = math.ceil(options.gpu / a)
            rows.append(
                {"width": width, **best, "a_to_b": a / b, "a_to_c": a / c, "cores": cores, "ms": parts}
            )
            rates = f"{a:9.0f} {b:9.0f} {c:10.0f} {a / b:5.2f} {a / c:5.2f} {cores:6d}"
            print(f"{width:6d} {size / options.count / 1e3:5.0f} {rates}")
    print(f"\ncores: of loader processes that a GPU needs at {options.gpu:g} samples/s\n")
    print(f"milliseconds a sample{'':6s}" + "".join(f"{row['width']:>8d}" for row in rows))
    for part in rows[0]["ms"]:
        print(f"{part:27s}" + "".join(f"{row['ms'][part]:8.3f}" for row in rows))
    rest = [1e3 / row["a"] - sum(row["ms"].values()) for row in rows]
    print(f"{'collate and hand over':27s}" + "".join(f"{ms:8.3f}" for ms in rest))
    print(f"{'all':27s}" + "".join(f"{1e3 / row['a']:8.3f}" for row in rows))
    save_results(options, {"command": sys.argv, "photos": what, "rows": rows})


if __name__ == "__main__":
    main()
