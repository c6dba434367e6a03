"""Measures what each part of the objective contributes, on the shipped pictures: trains, releases and evaluates each
row of a table.

    python tools/ablate.py [--out demo/ablation]

Five objectives with three seeds each are trained by the real commands with the demo recipe, 12 epochs each, two runs
at a time with one thread each. The table also lists the untrained student, the teacher and trivial baselines. The tool
writes table.md, table.json and table.png. Complete runs are kept, so the same command continues an interrupted
ablation. `--minutes` limits the total time (30 by default; 0: no limit): a run that would not end in time is not
started.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablation_table import write_table
from benchmark import Parser, run_main
from options import local_path

from uniemox_dist.config.load import load_config

ROOT = Path(__file__).resolve().parents[1]
ROWS = {
    "all losses": (),
    "without L1 (relation)": ("loss.relation=0",),
    "without L2 (similarity)": ("loss.similarity=0",),
    "without L3 (reconstruction)": ("loss.reconstruction=0",),
    "without fusion": ("model.fusion=none",),
}
WARMUP = 1 / 8
"""Share of the epochs that warm the learning rate up, as in the demo recipe."""
TAKEN = ("retrieval_r10", "teacher_cosine", "masked_mse", "linear_probe")
MARGIN = 1.2
"""A run starts only if the remaining time is at least this multiple of the longest run so far."""


@dataclass
class Bench:
    """Folders, shared settings and durations of all runs."""

    out: Path
    shards: Path
    settings: dict[str, Any]
    minutes: float
    began: float = field(default_factory=time.monotonic)
    longest_s: float = 0.0

    def command(self, log: Path, *arguments: str) -> None:
        """Runs `uniemox …` with one thread and appends its output to a log. If it fails, the error names the log."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            command = [sys.executable, "-m", "uniemox_dist.cli", *arguments]
            code = subprocess.run(command, env=environment, stdout=file, stderr=file, check=False).returncode
        if code:
            raise SystemExit(f"`uniemox {' '.join(arguments[:2])} …` ended with {code}; see the end of {log}")

    def scores(self, row: str, seed: int) -> Path:
        """The file with a run's scores; it exists once the run is complete."""
        return self.out / "scores" / f"{name_of(row)}_{seed}.json"

    def fits(self) -> bool:
        """Whether one more run would end in time."""
        spent_s = time.monotonic() - self.began
        return not self.minutes or spent_s + MARGIN * self.longest_s < 60 * self.minutes

    def run(self, job: tuple[str, int]) -> None:
        """Trains, releases and measures one row with one seed."""
        row, seed = job
        if self.scores(row, seed).is_file() or not self.fits():
            return
        start = time.monotonic()
        name = f"{name_of(row)}_{seed}"
        log, release, folder = (
            self.out / "logs" / f"{name}.log",
            self.out / "releases" / name,
            self.out / "runs",
        )
        self.command(
            log, "pretrain", "demo", *self.overrides(row, seed), f"run.dir={folder}", f"run.name={name}"
        )
        shutil.rmtree(release, ignore_errors=True)
        self.command(log, "release", str(folder / name), str(release))
        partial = self.scores(row, seed).with_suffix(".partial")
        partial.parent.mkdir(exist_ok=True)
        self.command(log, "evaluate", "protocol", str(release), str(self.shards), "--scores", str(partial))
        partial.rename(self.scores(row, seed))
        took_s = time.monotonic() - start
        self.longest_s = max(self.longest_s, took_s)
        at = (time.monotonic() - self.began) / 60
        print(f"{at:5.1f} min  {row}, seed {seed}: complete in {took_s:.0f} s", flush=True)

    def overrides(self, row: str, seed: int) -> list[str]:
        """The settings of a run."""
        epochs = self.settings["epochs"]
        return [
            f"run.seed={seed}",
            f"run.epochs={epochs}",
            f"optim.warmup_epochs={epochs * WARMUP}",
            "run.save_every=1000000",  # the last step is always saved
            "run.pictures_every=null",
            f"data.path={self.shards / 'train'}",
            f"data.eval_path={self.shards / 'test'}",
            "data.workers=0",  # one process a run: two runs share two cores
            "optim.precision=fp32",
            *(["teacher.source=cache"] if self.settings["cache"] else []),
            *self.settings["set"],
            *ROWS[row],
        ]


def name_of(row: str) -> str:
    """A row's title as part of a file's name."""
    return row.partition(" (")[0].replace(" ", "_")


def prepare(options: argparse.Namespace) -> Bench:
    """Creates the output folder and its shards; exits if the folder was made with other settings."""
    settings = {"epochs": options.epochs, "cache": options.cache, "set": options.set}
    stated = options.out / "settings.json"
    options.out.mkdir(parents=True, exist_ok=True)
    if stated.exists() and json.loads(stated.read_text(encoding="utf-8")) != settings:
        raise SystemExit(
            f"--out={options.out}: was begun with other settings; give another folder or delete it"
        )
    stated.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    bench = Bench(options.out, options.shards or options.out / "shards", settings, options.minutes)
    log = options.out / "logs" / "data.log"
    if options.shards is None:
        pack = [
            "shipped:fluent_emoji",
            str(bench.shards),
            "--workers",
            "2",
            "--shard-samples",
            "256",
            "--resume",
        ]
        bench.command(log, "shards", "pack", *pack)
    if options.cache:
        config = load_config("demo", options.set)
        views = ["--views", str(options.cache), "--image-size", str(config.model.image_size)]
        views += ["--scene-scale", ",".join(f"{share:g}" for share in config.data.scene_scale)]
        bench.command(log, "teach", str(bench.shards / "train"), "--teacher", config.teacher.name, *views)
    return bench


def complete_seeds(bench: Bench, rows: Sequence[str], seeds: Sequence[int]) -> list[int]:
    """The seeds for which every row is complete."""
    found = [seed for seed in seeds if all(bench.scores(row, seed).is_file() for row in rows)]
    for seed in set(seeds) - set(found):
        print(f"seed {seed} is not complete: the same command continues (--minutes 0: without a bound)")
    return found


def main() -> int:
    """Runs the missing rows, and writes the table of the complete ones."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--out", type=local_path, default=Path("demo/ablation"), help="folder of runs and table"
    )
    parser.add_argument(
        "--shards", type=Path, help="packed pictures with train/ and test/ (default: packs the shipped)"
    )
    parser.add_argument("--epochs", type=float, default=12.0, help="of each run (12)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="which objectives")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time")
    parser.add_argument("--minutes", type=float, default=30.0, help="bound of the whole (30; 0: none)")
    parser.add_argument(
        "--cache",
        type=int,
        default=0,
        metavar="K",
        help="replay K stored views with the teacher's embeddings",
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of every run"
    )
    options = parser.parse_args()
    bench = prepare(options)
    # One seed after the other, so that a table of fewer seeds is possible if time runs out.
    jobs = [(row, seed) for seed in options.seeds for row in options.rows]
    pool = ThreadPoolExecutor(options.jobs)
    try:
        list(pool.map(bench.run, jobs))
    finally:  # if one failed, no other is started
        pool.shutdown(cancel_futures=True)
    seeds = complete_seeds(bench, options.rows, options.seeds)
    if not seeds:
        return 1
    found = {
        row: [json.loads(bench.scores(row, seed).read_text(encoding="utf-8"))["metrics"] for seed in seeds]
        for row in options.rows
    }
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    about = {
        **bench.settings,
        "seeds": seeds,
        "last_call": {  # without the runs that earlier calls completed
            "minutes": round((time.monotonic() - bench.began) / 60, 1),
            "core_minutes": round((cpu.ru_utime + cpu.ru_stime) / 60, 1),
        },
    }
    print("\n" + write_table(found, TAKEN, about, options.out))
    return 0


if __name__ == "__main__":
    run_main(main)
