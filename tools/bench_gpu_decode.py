"""Compares decoding on a GPU with the loader's decoding on CPUs: samples/s, differences in grey levels, refusals.

    python tools/bench_gpu_decode.py --workers 15 --json decode.json
    python tools/bench_gpu_decode.py --device cpu --pictures 16     # the same code without a GPU

Rows, all with both views of 224 pixels of the same slots, read from packed shards with hashes checked:
(a) the loader's renderer in one process with one thread; (b) the loader's processes, up to the micro-batch on the
device; (c) a renderer that decodes with torchvision's decode_jpeg on the GPU (nvjpeg) and crops and resizes there,
picture by picture behind the loader's interface `Renderer`; (d) the same with one call of decode_jpeg for a
micro-batch, which that interface does not offer. While (c) and (d) run, the GPU and the training process do nothing
else; in a run they would take this time from the step.

The GPU's pixels are not the CPU's: nvjpeg rounds the inverse transform and interpolates colours differently, it cannot
decode at half size, and torch resizes in fp32 there. A run whose samples were decoded on a GPU would therefore not
repeat a run on CPUs, and a picture that the CPU refuses may be accepted. The tool measures both, and the loader does
not offer GPU decoding. torchvision calls decode_jpeg deprecated since 0.29.
"""

import argparse
import io
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_embed import SIDE, make_pictures
from bench_loader import make_config, make_dataset
from benchmark import make_parser, run_main, save_results
from options import positive_int, positive_number
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg

from shards.pack.pipeline import PackSettings, pack
from shards.pictures.jpeg import read_jpeg_header
from uniemox_dist.config.schema import Config
from uniemox_dist.data.crops import View, ViewPlan, ViewSettings, plan_training_views
from uniemox_dist.data.loader import PlannedDataset
from uniemox_dist.data.reader import RawSample
from uniemox_dist.data.step_batches import StepBatches
from uniemox_dist.data.views import allocate_views, render, render_view

ROWS = {
    "a": "the loader's renderer, one thread",
    "b": "the loader's processes, copied to the device",
    "c": "decoded on the device, picture by picture",
    "d": "decoded on the device, a micro-batch at once",
}


class TorchvisionRenderer:
    """A `Renderer` that decodes plain upright JPEGs with torchvision on a device; the CPU renders all others.

    Views are written where the given tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(
        self, data: bytes, size: tuple[int, int], plan: ViewPlan, scene_3HW: Tensor, person_3HW: Tensor | None
    ) -> None:
        self.render_batch([(data, size, plan)], [scene_3HW], [person_3HW])

    def render_batch(
        self,
        pictures: Iterable[tuple[bytes, tuple[int, int], ViewPlan]],
        scenes: Iterable[Tensor],
        persons: Iterable[Tensor | None],
    ) -> None:
        """Renders several pictures with one call of the decoder.

        Raises:
            ValueError: if a picture cannot be decoded, or its size differs from the stated one.
        """
        found = list(zip(pictures, scenes, persons))
        suited = [item for item in found if is_suited(item[0][0])]
        decoded = self._decode([item[0][0] for item in suited])
        ready = {id(item): rgb_3HW for item, rgb_3HW in zip(suited, decoded)}
        for item in found:
            (data, size, plan), scene_3HW, person_3HW = item
            rgb_3HW = ready.get(id(item))
            if rgb_3HW is None:
                render_on_cpu(data, size, plan, scene_3HW, person_3HW)
                continue
            if (rgb_3HW.shape[2], rgb_3HW.shape[1]) != size:
                raise ValueError(
                    f"has {rgb_3HW.shape[2]} x {rgb_3HW.shape[1]} pixels where {size[0]} x {size[1]} are stated"
                )
            scene_3HW.copy_(render_full_size(rgb_3HW, plan.scene, scene_3HW.shape[-1]))
            if plan.person is not None and person_3HW is not None:
                person_3HW.copy_(render_full_size(rgb_3HW, plan.person, person_3HW.shape[-1]))

    def _decode(self, files: list[bytes]) -> list[Tensor | None]:
        """Decodes JPEGs; None for those that the decoder refuses, about which the CPU decides."""
        if not files:
            return []
        tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
        try:
            return list(decode_jpeg(tensors, ImageReadMode.RGB, device=self.device))
        except RuntimeError:  # one bad picture fails the whole call
            if len(files) == 1:
                return [None]
            return [rgb_3HW for data in files for rgb_3HW in self._decode([data])]


def is_suited(data: bytes) -> bool:
    """Returns whether a picture is a JPEG of a common kind that needs no turning."""
    header = read_jpeg_header(data)
    return header is not None and header.orientation == 1


def render_on_cpu(
    data: bytes, size: tuple[int, int], plan: ViewPlan, scene_3HW: Tensor, person_3HW: Tensor | None
) -> None:
    """Renders with the loader's renderer, and copies the views to where the given tensors are."""
    views = allocate_views(2, scene_3HW.shape[-1])
    render(data, size, plan, views[0], None if person_3HW is None else views[1])
    scene_3HW.copy_(views[0])
    if plan.person is not None and person_3HW is not None:
        person_3HW.copy_(views[1])


def render_full_size(rgb_3HW: Tensor, view: View, size: int) -> Tensor:
    """Renders one view of a picture in full size. torch resizes bytes only on CPUs, so this resizes in fp32."""
    left, top, width, height = view.box
    if (width, height) == (size, size):
        return render_view(rgb_3HW, view, size)
    crop_13HW = rgb_3HW[None, :, top : top + height, left : left + width].float()
    resized = interpolate(crop_13HW, (size, size), mode=view.resize, antialias=True)[0]
    picture_3HW = resized.round_().clamp_(0, 255).to(torch.uint8)
    return render_view(picture_3HW, replace(view, box=(0, 0, size, size)), size)


def compare_pixels(
    samples: list[tuple[RawSample, ViewPlan]], renderer: TorchvisionRenderer
) -> dict[str, Any]:
    """Compares the views of both renderers, in grey levels: mean and largest difference, and by picture."""
    means, largest, worse = [], 0, 0
    for raw, plan in samples:
        views = {}
        for name, how in (("cpu", render), ("gpu", renderer)):
            views[name] = allocate_views(2, 224)
            there = views[name] if how is render else views[name].to(renderer.device)
            how(raw.image, (raw.width, raw.height), plan, there[0], there[1])
            views[name] = there.cpu()
        difference = (views["cpu"].short() - views["gpu"].short()).abs()
        means.append(float(difference.float().mean()))
        largest = max(largest, int(difference.max()))
        worse += int(difference.max() > 8)
    return {
        "pictures": len(means),
        "mean": sum(means) / len(means),
        "worst_mean": max(means),
        "max": largest,
        "pictures_above_8": worse,
    }


def compare_refusals(renderer: TorchvisionRenderer) -> dict[str, dict[str, Any]]:
    """Renders unusual and damaged pictures with both renderers. Returns for each who accepts it, and the mean
    difference in grey levels if both do."""
    found = {}
    for name, data in unusual_pictures().items():
        plan = plan_training_views(SIDE, 375, (), ViewSettings(), 0, 0)
        views, accepted = {}, {}
        for who, how in (("cpu", render), ("gpu", renderer)):
            views[who] = allocate_views(2, 224).zero_()
            there = views[who] if who == "cpu" else views[who].to(renderer.device)
            accepted[who] = False
            with suppress(ValueError):
                how(data, (SIDE, 375), plan, there[0], there[1])
                accepted[who] = True
            views[who] = there.cpu()
        both = accepted["cpu"] and accepted["gpu"]
        difference = (views["cpu"].float() - views["gpu"].float()).abs().mean()
        found[name] = {**accepted, "mean": float(difference) if both else None}
    return found


def unusual_pictures() -> dict[str, bytes]:
    """Pictures that decoders treat differently, all 500 x 375 pixels when upright."""
    with tempfile.TemporaryDirectory() as folder:
        plain = (make_pictures(Path(folder) / "one", 1) / "00000.jpg").read_bytes()
    picture = Image.open(io.BytesIO(plain), formats=["JPEG"])
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down

    def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    return {
        "cut off in the middle": plain[: len(plain) // 2],
        "a byte changed": plain[:20_000] + bytes([plain[20_000] ^ 0x55]) + plain[20_001:],
        "turned by EXIF": encode(picture, exif=exif),
        "CMYK": encode(picture.convert("CMYK")),
        "grey": encode(picture.convert("L")),
        "progressive": encode(picture, progressive=True),
        "colours in full resolution": encode(picture, subsampling=0),
        "PNG": encode(picture, "PNG"),
    }


def measure(options: argparse.Namespace, shards: Path) -> dict[str, float]:
    """Returns samples per second of each row."""
    there = torch.device(options.device)
    config = make_config(shards)
    B = options.micro_batch
    data = config.data.model_copy(update={"workers": options.workers})
    batch = config.batch.model_copy(update={"global_batch": B, "micro_batch": B})
    config = config.model_copy(update={"data": data, "batch": batch})
    dataset, renderer = make_dataset(config), TorchvisionRenderer(there)
    on_gpu = PlannedDataset(dataset.stream, None, dataset.settings, renderer=renderer)
    return {
        "a": rate(lambda step: dataset[slots(step, B)], B, options.seconds, there),
        "b": loader_rate(config, options, there),
        "c": rate(lambda step: on_gpu.load(slots(step, B), empty(B, there)), B, options.seconds, there),
        "d": rate(
            lambda step: load_batch(dataset, renderer, slots(step, B), empty(B, there)),
            B,
            options.seconds,
            there,
        ),
    }


def slots(step: int, B: int) -> range:
    return range(step * B, (step + 1) * B)


def empty(B: int, there: torch.device) -> Tensor:
    """Memory for the views of a micro-batch, channels last."""
    return torch.empty((2 * B, 224, 224, 3), dtype=torch.uint8, device=there).permute(0, 3, 1, 2)


def load_batch(
    dataset: PlannedDataset, renderer: TorchvisionRenderer, numbers: Iterable[int], views: Tensor
) -> None:
    """Reads the samples of some slots and renders them with one call of the decoder."""
    samples = [read_slot(dataset, slot) for slot in numbers]
    pictures = [(raw.image, (raw.width, raw.height), plan) for raw, plan in samples]
    renderer.render_batch(pictures, views[: len(samples)], views[len(samples) :])


def read_slot(dataset: PlannedDataset, slot: int) -> tuple[RawSample, ViewPlan]:
    place = dataset.plan.locate(slot)
    raw = dataset.readers[place.source].read(place.shard, place.row)
    return raw, plan_training_views(raw.width, raw.height, raw.persons, dataset.settings, dataset.seed, slot)


def rate(load: Callable[[int], Any], B: int, seconds: float, there: torch.device) -> float:
    """Measures samples per second of loading micro-batches, after one of warm-up."""
    load(0)
    steps, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds or not steps:
        steps += 1
        load(steps)
        if there.type == "cuda":
            torch.cuda.synchronize()
    return steps * B / max(elapsed, time.perf_counter() - began)


def loader_rate(config: Config, options: argparse.Namespace, there: torch.device) -> float:
    """Measures samples per second of the loader's processes, with the copy to the device."""
    with StepBatches(make_dataset(config), config, first_step=0, pin=there.type == "cuda") as batches:

        def load(step: int) -> None:
            for batch in batches.next_step():
                batch.to(there)

        for step in range(2 * max(1, options.workers)):  # what was prepared ahead does not count
            load(step)
        return rate(load, options.micro_batch, options.seconds, there)


def main() -> int:
    parser = make_parser(__doc__.partition("\n\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="where (c) and (d) decode")
    parser.add_argument("--pictures", type=positive_int, default=512)
    parser.add_argument("--micro-batch", type=positive_int, default=64)
    parser.add_argument(
        "--workers", type=int, default=max(1, len(os.sched_getaffinity(0)) - 1), help="loader processes"
    )
    parser.add_argument("--seconds", type=positive_number, default=3, help="of each row")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU here; --device cpu runs the same code without one")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pictures(folder / "pictures/noise", options.pictures)
        pack(PackSettings(str(folder / "pictures"), "folder", persons="none"), folder / "shards")
        dataset = make_dataset(make_config(folder / "shards"))
        renderer = TorchvisionRenderer(torch.device(options.device))
        samples = [read_slot(dataset, slot) for slot in range(min(64, options.pictures))]
        pixels = compare_pixels(samples, renderer)
        refusals = compare_refusals(renderer)
        rates = measure(options, folder / "shards")
    print(f"JPEGs of {SIDE} px, two views; samples/s")
    for letter, name in ROWS.items():
        count = f", {options.workers} processes" if letter == "b" else ""
        print(f"({letter}) {name}{count}".ljust(60) + f"{rates[letter]:10.1f}")
    print(f"differences in grey levels: mean {pixels['mean']:.3f}, largest {pixels['max']}")
    for name, row in refusals.items():
        cpu, gpu = ("accepts" if row[who] else "refuses" for who in ("cpu", "gpu"))
        mean = "" if row["mean"] is None else f", mean difference {row['mean']:.2f}"
        print(f"{name:28} CPU {cpu}, GPU {gpu}{mean}")
    save_results(
        options,
        {
            "command": sys.argv,
            "device": options.device,
            "workers": options.workers,
            "samples_per_s": rates,
            "pixels": pixels,
            "refusals": refusals,
        },
    )
    return 0


if __name__ == "__main__":
    run_main(main)
