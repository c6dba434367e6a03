"""Compares the loader with other libraries' loaders on the same real photos; prints tables.

Rows are samples per second of CPU time of one core, from files on disk (in the page cache) to collated batch, through
one loader process: this loader with both views, by each value of `data.resize`; webdataset, Grain, MosaicML Streaming
and SPDL with the same decoder and resize (loader_peers.py; those that are not installed are left out); webdataset with
Pillow and torchvision's transforms and two normalised float views, as in the released code's loader; and decoding alone
in a loop, which is the limit. They run in turn, `--repeat` times, and the best time of each counts. CPU time is that of
all processes of a row, so other work on the machine counts little; run the command on one core by `taskset -c 1`. The
photos have no annotated persons, so the person view is the whole picture, the most expensive case. A last table shows
how this loader spends its time.

Photos come from `--photos DIR`, or from npm's tabler-ui (fetched by `npm pack`, not kept), or from scikit-image.
"""

import importlib.util
import io
import math
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import simplejpeg
import torch
import webdataset
from benchmark import make_parser, print_markdown, run_main, save_results
from loader_peers import MICRO_BATCH, PEERS
from options import photo_folder, positive_int, positive_number
from PIL import Image
from torchvision import transforms

from shards.pack.pipeline import PackSettings, pack
from shards.pictures.decode import decode_picture, decode_scaled
from uniemox_dist.config.schema import Config
from uniemox_dist.data.crops import plan_training_views
from uniemox_dist.data.loader import PlannedDataset, view_settings
from uniemox_dist.data.sources import Sources
from uniemox_dist.data.step_batches import StepBatches
from uniemox_dist.data.views import render_view

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PACKAGE = "tabler-ui@0.0.34"
PROFILED = 96
"""Samples of a round of `profile`."""
OURS, OLD, LIMIT = "this loader", "webdataset, Pillow, float views", "decoding alone"


def decode(data: bytes) -> Image.Image:
    """Returns a picture of a file."""
    return Image.fromarray(decode_picture(data))


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
            return f"{len(files)} photos of {PACKAGE}", [decode(file.getvalue()) for file in files]
    if folder is not None:
        paths = sorted(folder.rglob("*.jpg"))
        return f"{len(paths)} photos of {folder}", [decode(path.read_bytes()) for path in paths]
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
        x, y = int(rng.integers(photo.width - w + 1)), int(rng.integers(photo.height - h + 1))
        crop = photo.resize((width, round(width * h / w)), Image.Resampling.LANCZOS, (x, y, x + w, y + h))
        crop.save(folder / f"{i:05d}.jpg", quality=quality)
        size += (folder / f"{i:05d}.jpg").stat().st_size
    return size


def make_config(shards: Path, resize: str = "bicubic") -> Config:
    return Config.model_validate(
        {
            "run": {"max_steps": 1},
            "data": {"path": str(shards), "workers": 1, "prefetch": 4, "resize": resize},
            "batch": {"global_batch": MICRO_BATCH, "micro_batch": MICRO_BATCH, "streams": 8},
            "teacher": {"name": "shipped:demo"},
        }
    )


def make_dataset(config: Config) -> PlannedDataset:
    sources = Sources(config)
    return PlannedDataset(sources, None, view_settings(config))


def ours(resize: str, shards: Path) -> Iterator[int]:
    config = make_config(shards, resize)
    with StepBatches(make_dataset(config), config, first_step=0, pin=False) as batches:
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
    """Measures samples per second of CPU time of one way, after start-up and prefetched batches."""
    batches = make(shards)
    warm = 0
    while warm < 6 * MICRO_BATCH:
        warm += next(batches)
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]

    def cpu_s() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    done, began, used = 0, time.perf_counter(), cpu_s()
    while time.perf_counter() - began < seconds:
        done += next(batches)
    used = cpu_s() - used
    batches.close()  # type: ignore[attr-defined]
    return done / used


def list_ways() -> dict[str, Callable[[Path], Iterator[int]]]:
    """Returns the rows to measure; prints a line for each peer that is not installed."""
    ways: dict[str, Callable[[Path], Iterator[int]]] = {
        OURS: partial(ours, "bicubic"),
        f"{OURS}, bilinear": partial(ours, "bilinear"),
    }
    for name, (module, make) in PEERS.items():
        if importlib.util.find_spec(module) is None:
            print(f"{name}: is not installed; left out")
        else:
            ways[name] = make
    return {**ways, OLD: plain, LIMIT: decoding}


def profile(shards: Path, seconds: float) -> dict[str, float]:
    """Measures milliseconds of CPU time per sample of the parts of this loader, in this process.

    They are the best of rounds over the same samples, as rates are the best of repetitions.
    """
    config = make_config(shards)
    data = make_dataset(config)
    settings, [reader] = data.settings, data.readers
    best = dict.fromkeys(("plan, index, read, hash", "crops", "decode", "resize, two views"), math.inf)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        spent = dict.fromkeys(best, 0.0)
        for slot in range(PROFILED):
            marks = [time.process_time()]
            place = data.plan.locate(slot)
            raw = reader.read(place.shard, place.row)
            marks.append(time.process_time())
            plan = plan_training_views(raw.width, raw.height, raw.persons, settings, 0, slot)
            marks.append(time.process_time())
            array, scale = decode_scaled(raw.image, plan.background, plan.scale)
            marks.append(time.process_time())
            rgb = torch.from_numpy(array).permute(2, 0, 1)
            for view in (plan.scene, plan.person):
                render_view(rgb, view, settings.image_size, scale)  # type: ignore[arg-type]
            marks.append(time.process_time())
            for name, start, end in zip(spent, marks, marks[1:]):
                spent[name] += 1e3 * (end - start)
        best = {name: min(ms, spent[name] / PROFILED) for name, ms in best.items()}
    return best


def print_tables(results: dict[int, dict[str, Any]], gpu: float) -> None:
    """Prints samples per second, their share of decoding alone, our lead, and the parts of our time, by width."""
    widths = list(results)
    header = [f"{width} px, {results[width]['bytes'] / 1e3:.0f} kB" for width in widths]
    rates = {width: result["rates"] for width, result in results.items()}
    rows = []
    for name in rates[widths[0]]:
        cells = []
        for width in widths:
            rate, own = rates[width][name], rates[width][OURS]
            cells += [f"{rate:.0f}", f"{rate / rates[width][LIMIT]:.2f}", f"{own / rate:.2f}"]
        rows.append([name, *cells])
    columns = [cell for text in header for cell in (text, "of decoding", "ours ÷ this")]
    print_markdown(["samples per CPU second", *columns], rows)
    print()
    parts: dict[str, list[float]] = {}
    for width in widths:
        ms, whole = results[width]["ms"], 1e3 / rates[width][OURS]
        rest = whole - sum(ms.values())
        for part, value in {**ms, "collate, hand over and the rest": rest, "all": whole}.items():
            parts.setdefault(part, []).append(value)
    rows = [[part, *(f"{value:.3f}" for value in values)] for part, values in parts.items()]
    print_markdown(["milliseconds per sample", *map(str, widths)], rows)
    cores = ", ".join(f"{math.ceil(gpu / rates[width][OURS])} at {width}" for width in widths)
    print(f"\nCores of loader processes that a GPU needs at {gpu:g} samples/s: {cores}")


def main() -> None:
    parser = make_parser(__doc__.partition("\n\n")[0])
    parser.add_argument("--photos", type=photo_folder, help="folder of JPEGs at least 1,024 pixels wide")
    parser.add_argument("--widths", type=positive_int, nargs="+", default=[256, 500, 1024])
    parser.add_argument("--count", type=positive_int, default=400, help="pictures of each width")
    parser.add_argument("--quality", type=positive_int, default=85, help="of the JPEGs")
    parser.add_argument("--seconds", type=positive_number, default=6, help="of each row, each time")
    parser.add_argument("--repeat", type=positive_int, default=3)
    parser.add_argument(
        "--gpu", type=positive_number, default=1000, help="samples per second that a GPU takes"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways = list_ways()
    results: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        what, photos = load_photos(options.photos, scratch)
        print(f"{what}; {options.count} crops a width, JPEG quality {options.quality}\n", flush=True)
        for width in options.widths:
            size = write_photos(photos, scratch / f"{width}/x", width, options.count, options.quality)
            shards = scratch / f"shards{width}"
            pack(PackSettings(str(scratch / f"{width}"), "folder", persons="none", shard_samples=100), shards)
            best = dict.fromkeys(ways, 0.0)
            for _ in range(options.repeat):
                for way, make in ways.items():
                    best[way] = max(best[way], measure_rate(make, shards, options.seconds))
            parts = profile(shards, options.seconds)
            results[width] = {"bytes": size / options.count, "rates": best, "ms": parts}
            save_results(options, {"command": sys.argv, "photos": what, "widths": results})
    print_tables(results, options.gpu)


if __name__ == "__main__":
    run_main(main)
