"""Measures a real `uniemox pretrain` on JPEGs of 500 pixels: how long it waits for data, samples/s and saves.

    python tools/bench_pretrain.py --workers 15 --steps 40 --json pretrain.json
    python tools/bench_pretrain.py --recipe uniemox_vit_l16 --set compute.compile=true --seconds 60

It writes --pictures JPEGs (bench_embed.py), packs them, and trains the recipe on them with one rank, in a process of
its own. The teacher has random weights. Shards are in the page cache, so the figures are those of decoding, not of a
disk. The first --warm-up steps (compilation, first batches) do not count. After --seconds the run is asked to stop, and
what it has measured until then counts. Any pair of --set replaces a setting of the recipe.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_embed import SIDE, make_pictures
from benchmark import make_parser, run_main, save_results
from options import non_negative_int, positive_int, positive_number, teacher_shape
from step_rows import write_teacher

from shards.pack.pipeline import PackSettings, pack
from uniemox_dist.runs.folder import read_lines

GRACE_S = 30
"""Seconds that a run gets to save after it was asked to stop."""


def main() -> int:
    parser = make_parser(__doc__.partition("\n\n")[0])
    parser.add_argument("--recipe", default="uniemox_vit_b16")
    parser.add_argument(
        "--teacher-shape",
        type=teacher_shape,
        default="ViT-B-16-quickgelu",
        help="an open_clip model, with random weights, or local-dir:PATH",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as of uniemox pretrain"
    )
    parser.add_argument("--pictures", type=positive_int, default=1024)
    parser.add_argument(
        "--workers", type=int, default=max(1, len(os.sched_getaffinity(0)) - 1), help="loader processes"
    )
    parser.add_argument("--steps", type=positive_int, default=40)
    parser.add_argument("--warm-up", type=non_negative_int, default=10, help="steps that do not count")
    parser.add_argument("--log-every", type=positive_int, default=5, help="steps of an interval")
    parser.add_argument("--seconds", type=positive_number, help="stop the run after so long")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        run, code = train(options, scratch)
        found = read_results(run, options.warm_up)
    found |= {"command": sys.argv, "workers": options.workers, "side": SIDE, "exit_code": code}
    save_results(options, found)
    if not found["intervals"]:
        print(f"the run ended with exit code {code} before step {options.warm_up + options.log_every}")
        return 1
    print(
        f"{found['samples_per_s']:.1f} samples/s with {options.workers} loader processes, waiting for data "
        f"{100 * found['data_wait_share']:.2f} % of the time (slowest interval {100 * found['data_wait_share_max']:.2f}"
        f" %), over {found['steps']} steps"
    )
    return 0


def train(options: argparse.Namespace, scratch: Path) -> tuple[Path, int]:
    """Packs the pictures and trains on them. Returns the run's folder and exit code."""
    make_pictures(scratch / "pictures/noise", options.pictures)
    shards = scratch / "shards"
    pack(PackSettings(str(scratch / "pictures"), "folder", persons="none", shard_samples=128), shards)
    teacher = options.teacher_shape
    if not teacher.startswith("local-dir:"):
        (scratch / "teacher").mkdir()
        write_teacher(teacher, scratch / "teacher")
        teacher = f"local-dir:{scratch / 'teacher'}"
    settings = [
        "run.name=bench",
        f"run.dir={scratch}",
        "run.epochs=null",
        f"run.max_steps={options.steps}",
        f"run.log_every={options.log_every}",
        "run.pictures_every=null",
        "run.preflight=false",
        "run.save_every=1000000",
        f"data.path={shards}",
        "data.eval_path=null",
        f"data.workers={options.workers}",
        "optim.warmup_epochs=null",
        "optim.warmup_steps=1",
        f"teacher.name={teacher}",
        *options.set,
    ]
    command = [sys.executable, "-m", "uniemox_dist.cli", "pretrain", options.recipe, *settings]
    with subprocess.Popen(command) as process:
        try:
            code = process.wait(options.seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # the run saves and ends
            try:
                code = process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
    return scratch / "bench", code


def read_results(run: Path, warm_up: int) -> dict[str, Any]:
    """Reads the intervals after the warm-up, the times of the start and the saves of a run."""
    lines = [line for line in read_lines(run / "metrics.jsonl") if "samples_per_s" in line]
    events = read_lines(run / "events.jsonl")
    intervals = [line for line in lines if line["step"] > warm_up]
    found: dict[str, Any] = {
        "intervals": intervals,
        "start_s": next((e["seconds"] for e in events if e["event"] == "started"), None),
        "saves": [
            {key: e.get(key) for key in ("step", "bytes", "seconds", "write_s", "blocked_s")}
            for e in events
            if e["event"] == "save"
        ],
    }
    if intervals:
        before = max((line["step"] for line in lines if line["step"] <= warm_up), default=0)
        # Intervals have equal numbers of steps, so their times are as the inverse of their rates.
        seconds = [1 / line["samples_per_s"] for line in intervals]
        waits = [line["data_wait_share"] for line in intervals]
        found |= {
            "steps": intervals[-1]["step"] - before,
            "samples_per_s": len(seconds) / sum(seconds),
            "data_wait_share": sum(w * s for w, s in zip(waits, seconds)) / sum(seconds),
            "data_wait_share_max": max(waits),
            "tflops_per_s": statistics.median(line["tflops_per_s"] for line in intervals),
            "mfu": intervals[-1].get("mfu"),
            "device_memory_gb": intervals[-1].get("device_memory_gb"),
        }
    return found


if __name__ == "__main__":
    run_main(main)
