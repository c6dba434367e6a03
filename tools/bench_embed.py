"""Compares the speed of `uniemox embed` with that of the bare timm model, and of its ONNX export, on decoded batches.
The ways take turns in one run. Prints a table.

    python tools/bench_embed.py [--model vit_base] [--pictures 128] [--rounds 3] [--json FILE]
    python tools/bench_embed.py --device cuda --no-onnx --pictures 2048 --batch 256 --workers 15

On a GPU the bare model's time includes copying pixels to the GPU and features back. onnxruntime runs on the CPU.
"""

import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from bench_release import make_run
from benchmark import make_parser, print_markdown, run_main, save_results, time_call, time_in_turn
from options import positive_int
from PIL import Image

from uniemox_dist.config.schema import Config
from uniemox_dist.data.loader import view_settings
from uniemox_dist.inference.embed import embed
from uniemox_dist.inference.inputs import Pictures, load_batches
from uniemox_dist.models.patches import normalise
from uniemox_dist.release.export import release
from uniemox_dist.release.load import load_uniemox

SIDE = 500


def make_pictures(folder: Path, count: int) -> Path:
    """JPEGs of noise over gradients, 500 pixels wide, quality 85: decoding them costs about as much as photos."""
    folder.mkdir(parents=True)

    def write(i: int) -> None:
        small = Image.fromarray(np.random.default_rng(i).integers(0, 256, (25, 32, 3), np.uint8))
        large = small.resize((SIDE, SIDE * 3 // 4), Image.Resampling.BICUBIC)
        large.save(folder / f"{i:05d}.jpg", quality=85)

    with ThreadPoolExecutor() as pool:  # Pillow resizes and encodes without Python's lock
        list(pool.map(write, range(count)))
    return folder


def ways(
    out: Path, folder: Path, batch: int, workers: int, scratch: Path, device: str, *, onnx: bool
) -> dict[str, Callable[[], int]]:
    """The measured functions; each returns the number of pictures that it processed."""
    model: Any = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval().to(device)
    released = load_uniemox(out)
    settings = view_settings(Config.model_validate(released.facts["config"]))
    mean, std = (tuple(released.facts["preprocessing"][key]) for key in ("mean", "std"))
    decoded = [
        normalise(some.scene_B3HW, mean, std, torch.float32)
        for some in load_batches(Pictures(str(folder)), settings, batch=batch)
    ]
    count = sum(len(pixels) for pixels in decoded)
    number = iter(range(10**6))

    def bare() -> int:
        with torch.inference_mode():
            for pixels in decoded:
                model(pixels.to(device)).cpu()
        return count

    def ours() -> int:
        table = scratch / f"{next(number)}.parquet"
        return embed(str(folder), table, out, batch=batch, workers=workers, device=device).rows

    measured = {
        "bare timm model, decoded batches": bare,
        f"uniemox embed, {workers} worker(s), all of it": ours,
    }
    if onnx:
        import onnxruntime

        encoder = str(out / "encoder.onnx")
        session = onnxruntime.InferenceSession(encoder, providers=["CPUExecutionProvider"])

        def exported() -> int:
            for pixels in decoded:
                session.run(["features"], {"pixels": pixels.numpy()})
            return count

        measured["onnxruntime, decoded batches"] = exported
    return measured


def main() -> None:
    """Measures, and prints a table."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="vit_base")
    parser.add_argument("--pictures", type=positive_int, default=128)
    parser.add_argument("--batch", type=positive_int, default=16)
    parser.add_argument("--workers", type=positive_int, default=1)
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--no-onnx", action="store_true", help="leave out the ONNX export")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        release(make_run(scratch / "runs", given.model), scratch / "out", onnx=not given.no_onnx)
        folder = make_pictures(scratch / "pictures", given.pictures)
        done = ways(
            scratch / "out", folder, given.batch, given.workers, scratch, given.device, onnx=not given.no_onnx
        )
        load_s = time_call(lambda: load_uniemox(scratch / "out", verify=True))
        seconds = time_in_turn(done, given.rounds)
        rates = {name: [given.pictures / s for s in values] for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ours = next(name for name in medians if name.startswith("uniemox"))
    per_run = given.pictures / medians[ours]
    medians[f"the same without opening the release ({load_s:.1f} s)"] = given.pictures / (per_run - load_s)
    first = next(iter(medians.values()))
    print(
        f"{given.model}, {given.pictures} JPEGs of {SIDE} px, batches of {given.batch}, {given.rounds} rounds\n"
    )
    rows = [(name, f"{rate:.2f}", f"{rate / first:.2f}") for name, rate in medians.items()]
    print_markdown(("", "pictures/s", "of the bare model"), rows)
    save_results(
        given, {"torch": torch.__version__, "settings": vars(given) | {"json": None}, "rates": rates}
    )


if __name__ == "__main__":
    run_main(main)
