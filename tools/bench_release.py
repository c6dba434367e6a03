"""Compares the peak memory of `uniemox release` with the size of its model. The command runs in a separate process, on
a checkpoint that this script writes or on that of `--run`. Prints a table.

    python tools/bench_release.py [--model vit_base] [--run RUN] [--json FILE]
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmark import make_parser, print_markdown, run_json, run_main, save_results
from torch import Tensor

from uniemox_dist.checkpoints.folders import (
    COMPLETE,
    FIXED,
    FORMAT,
    FORMAT_VERSION,
    open_checkpoint,
    step_folder,
)
from uniemox_dist.checkpoints.format import KINDS, copy_fixed_parameters, write_part
from uniemox_dist.checkpoints.fragment_index import fragment_key
from uniemox_dist.config.load import load_config
from uniemox_dist.core.files import write_json
from uniemox_dist.models.student import Student

WIDTH = 512
"""Width of the teacher's space."""
CHILD = """
import json, sys, time
from pathlib import Path
import psutil
from uniemox_dist.release.export import release
before, began = psutil.Process().memory_info().rss, time.perf_counter()
facts = release(Path(sys.argv[1]), Path(sys.argv[2]), dtype=sys.argv[3])
peak = 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
model = 4 * (facts["parameters"] + facts["other_parameters"])
print(json.dumps({"model": model, "above": peak - before, "seconds": time.perf_counter() - began}))
"""


def make_run(folder: Path, model: str) -> Path:
    """Makes a run with one checkpoint of an untrained student, as two ranks would write it."""
    config = load_config("uniemox_vit_b16", [f"model.name={model}", "data.path=nowhere", f"run.dir={folder}"])
    student = Student(config.model, config.loss, WIDTH)
    checkpoint = folder / config.run.name / "checkpoints" / step_folder(1)
    checkpoint.mkdir(parents=True)
    trained = {name: p.detach() for name, p in student.named_parameters() if p.requires_grad}
    files: dict[str, Any] = {}
    for rank in range(2):
        pieces: dict[str, Tensor] = {}
        for name, p in trained.items():
            half = -(-p.numel() // 2)
            piece = p.flatten()[rank * half : (rank + 1) * half]
            pieces |= {fragment_key(name, rank * half, kind): piece for kind in KINDS if len(piece)}
        files[f"part_{rank:05d}.safetensors"] = write_part(
            checkpoint / f"part_{rank:05d}.safetensors", pieces
        )
    files[FIXED] = write_part(checkpoint / FIXED, copy_fixed_parameters(student))
    info = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": 1,
        "slots": config.batch.global_batch,
        "adam_step": 1.0,
        "world_size": 2,
        "zero_stage": 1,
        "precision": "fp32",
        "data_identity": "0" * 64,
        "teacher": None,
        "embedding_width": WIDTH,
        "parameters": {name: list(p.shape) for name, p in trained.items()},
        "config": config.model_dump(mode="json"),
        "files": {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in files.items()},
    }
    write_json(checkpoint / COMPLETE, info)
    return folder / config.run.name


def measure(run: Path, out: Path, dtype: str) -> dict[str, Any]:
    """Writes a release in a separate process; returns the bytes of the model in fp32, the peak memory above that of
    the imports, and seconds."""
    return {"dtype": dtype, **run_json(["-c", CHILD, str(run), str(out), dtype])}


def main() -> None:
    """Measures, and prints a table."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="vit_base", help="encoder of the checkpoint that is made")
    parser.add_argument("--run", type=Path, help="a run of yours instead")
    given = parser.parse_args()
    if given.run is not None:
        open_checkpoint(given.run, "--run")  # an error before the work
    with tempfile.TemporaryDirectory() as folder:
        run = given.run or make_run(Path(folder) / "runs", given.model)
        rows = [measure(run, Path(folder) / dtype, dtype) for dtype in ("fp32", "bf16")]
    header = ("written as", "model in fp32", "peak memory above imports", "of the model", "seconds")
    cells = [
        (
            row["dtype"],
            f"{row['model'] / 1e6:.0f} MB",
            f"{row['above'] / 1e6:.0f} MB",
            f"{row['above'] / row['model']:.2f}",
            f"{row['seconds']:.1f}",
        )
        for row in rows
    ]
    print_markdown(header, cells)
    about = {"torch": torch.__version__, "time": round(time.time()), "model": given.model}
    save_results(given, {**about, "rows": rows})


if __name__ == "__main__":
    run_main(main)
