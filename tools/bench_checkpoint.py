"""Compares asynchronous and synchronous saves in one run: prints a table, and writes it with `--json FILE`.

Real DeepSpeed ranks train a student (reconstruction only, on random pixels) and save it `--saves` times in each way,
in turn. In a synchronous save the loop waits for all of it: copy, write, hash, fsync and rename. An asynchronous save
is what a run does: the loop waits only for the copy, the exchanges among ranks and the rename. The first save of each
way is a warm-up (it allocates memory and creates folders) and does not count; the table has the median of the others.
Steps beside a save are those that began and ended while it was written. The disk's bandwidth is measured with a plain
file of the same size, written with fsync and without hashing.

The writers need cores, so the threads of all ranks together should leave one core free. By default one rank computes
on one thread.
"""

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from benchmark import make_parser, run_main, save_results
from options import add_settings, local_path, positive_int

from uniemox_dist.checkpoints.async_writer import AsyncWriter
from uniemox_dist.checkpoints.run_state import RunState
from uniemox_dist.config.load import merge, parse_override, validate_config
from uniemox_dist.config.losses import LOSS_NAMES
from uniemox_dist.config.schema import Config
from uniemox_dist.data.loader import MicroBatch
from uniemox_dist.data.masks import SlotDraws
from uniemox_dist.data.origin import ReadCounts
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.local_launcher import run_ranks
from uniemox_dist.distributed.world import World
from uniemox_dist.models.student import Student
from uniemox_dist.train.ema import Ema
from uniemox_dist.train.engine import make_engine
from uniemox_dist.train.pretrain import prepare_loss
from uniemox_dist.train.step import RankStatus, update_weights


def main() -> None:
    parser = make_parser(__doc__.partition("\n\n")[0])
    parser.add_argument("--ranks", type=positive_int, default=1)
    parser.add_argument("--threads", type=positive_int, default=1, help="of each rank")
    parser.add_argument(
        "--model", default="vit_base_patch16_224", help="the student's encoder, a name of timm's"
    )
    parser.add_argument("--micro-batch", type=positive_int, default=1)
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=1, help="ZeRO stage")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--ema", action="store_true", help="keep and save a moving average, too")
    parser.add_argument("--saves", type=positive_int, default=6, help="in each way, the first a warm-up")
    parser.add_argument(
        "--dir", type=local_path, help="where to save, and so which disk is measured (a temporary folder)"
    )
    add_settings(parser)
    options = parser.parse_args()
    if options.ranks > 1 and "RANK" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
        command = [sys.executable, *sys.argv]
        if options.dir is None:
            command += ["--dir", tempfile.mkdtemp()]
        sys.exit(run_ranks(command, options.ranks, gpus=torch.cuda.is_available()))
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    world = World.from_env()
    top = options.dir or Path(tempfile.mkdtemp())
    folder = top / "bench_checkpoint"
    try:
        found = measure(options, world, folder)
    finally:
        collectives.barrier()
        if world.is_main:
            shutil.rmtree(folder if options.dir else top, ignore_errors=True)
    if world.is_main:
        show(found)
        save_results(options, {"command": sys.argv, **found})
    collectives.close()


def measure(options: argparse.Namespace, world: World, folder: Path) -> dict[str, Any]:
    """Measures both ways in turn. All ranks return the same numbers, except for times by their own clocks."""
    device = collectives.init(world, 600)
    per_rank = options.micro_batch
    values: dict[str, Any] = {
        "run": {"max_steps": 1},
        "data": {"path": "none"},
        "batch": {"global_batch": per_rank * world.size, "micro_batch": per_rank, "streams": world.size},
        "model": {"name": options.model},
        "loss": {"relation": 0, "similarity": 0},
        "optim": {"precision": options.precision},
        "zero": {"stage": options.zero},
    }
    for pair in options.set:
        values = merge(values, parse_override(pair))
    config = validate_config(values, "--model and --set")
    engine = make_engine(Student(config.model, config.loss, None), config, world, options.precision, device)
    ema = Ema(engine, 0.999) if options.ema else None
    batch = random_batch(config, device)
    folder.mkdir(parents=True, exist_ok=True)
    collectives.barrier()
    saver = AsyncWriter(engine, folder, world, {}, ema, keep_last=2)
    number = 0

    def step(written: bool = True) -> tuple[float, bool]:
        began = time.perf_counter()
        loss = prepare_loss(engine, None, [batch], config, world)
        status = RankStatus(checkpoint_written=written)
        result = update_weights(engine, loss, [batch], world, lr=1e-4, term_names=LOSS_NAMES, status=status)
        return time.perf_counter() - began, result.ranks_written == world.size

    def state() -> RunState:
        nonlocal number
        number += 1
        return RunState(number, config, "none", options.precision, None, None)

    for _ in range(2):
        step()
    quiet: list[float] = []
    beside: list[float] = []
    waiting: list[dict[str, Any]] = []
    going_on: list[dict[str, Any]] = []
    for _ in range(options.saves):
        quiet += [step()[0] for _ in range(3)]
        problem = saver.start(state())
        assert problem is None, problem
        waiting.append(saver.commit())
        problem = saver.start(state())
        assert problem is None, problem
        own: list[float] = []
        while True:
            seconds, written = step(saver.written)
            if written:
                break
            own.append(seconds)
        going_on.append(saver.commit())
        beside += own
    saver.close()
    size = going_on[-1]["bytes"]
    bandwidth = size / plain_write(folder / f"plain{world.rank}", size // world.size, world)
    host = sum(row[0] for row in collectives.gather_numbers([saver.host_bytes], world))
    sync = statistics.median(facts["seconds"] for facts in waiting[1:])
    blocked = statistics.median(facts["blocked_s"] for facts in going_on[1:])
    rate = size / statistics.median(facts["write_s"] for facts in going_on[1:])
    return {
        "machine": {"cpu": platform.processor() or "CPU", "cores": os.cpu_count(), "device": str(device)},
        "model": config.model.name or "a student of its own shape",
        "ranks": world.size,
        "threads": options.threads,
        "zero": options.zero,
        "precision": options.precision,
        "checkpoint_bytes": size,
        "host_bytes": round(host),
        "synchronous_s": sync,
        "asynchronous_blocked_s": blocked,
        "blocked_share": blocked / sync,
        "synchronous_write_s": statistics.median(facts["write_s"] for facts in waiting[1:]),
        "asynchronous_write_s": statistics.median(facts["write_s"] for facts in going_on[1:]),
        "written_bytes_per_s": rate,
        "synchronous_bytes_per_s": size / sync,
        "disk_bytes_per_s": bandwidth,
        "share_of_disk": rate / bandwidth,
        "quiet_step_s": statistics.median(quiet),
        "step_beside_save_s": statistics.median(beside) if beside else None,
        "steps_beside_saves": len(beside),
        "slower": statistics.median(beside) / statistics.median(quiet) - 1 if beside else None,
        "every_synchronous_s": [facts["seconds"] for facts in waiting],
        "every_blocked_s": [facts["blocked_s"] for facts in going_on],
        "every_quiet_step_s": quiet,
        "every_step_beside_save_s": beside,
    }


def random_batch(config: Config, device: torch.device) -> MicroBatch:
    B, size = config.batch.micro_batch, config.model.image_size
    scene = torch.randint(0, 256, (B, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    slots = torch.arange(B)
    return MicroBatch(
        slots_B=slots,
        scene_B3HW=scene,
        person_B3HW=None,
        texts_BE=None,
        pictures_BE=None,
        on_person_BN=None,
        keys=tuple(map(str, range(B))),
        sources=(0,) * B,
        damaged=(),
        counts=ReadCounts(),
        **SlotDraws(config.model, config.run.seed).draw(slots, None, with_person=False),
    ).to(device)


def plain_write(path: Path, size: int, world: World) -> float:
    """Seconds until all ranks have written so many bytes each and flushed them to the disk; the median of three."""
    piece = os.urandom(16 << 20)
    seconds = []
    for _ in range(3):
        collectives.barrier()
        began = time.perf_counter()
        with open(path, "wb", buffering=0) as file:
            for start in range(0, size, len(piece)):
                file.write(piece[: size - start])
            os.fsync(file.fileno())
        collectives.barrier()
        seconds.append(time.perf_counter() - began)
        path.unlink()
    return statistics.median(seconds)


def show(found: dict[str, Any]) -> None:
    """The table."""
    GB = 1e9
    print(
        f"{found['machine']['device']}, {found['machine']['cores']} cores; {found['model']}, {found['ranks']} rank(s) x"
        f" {found['threads']} thread(s), ZeRO-{found['zero']}, {found['precision']}; checkpoint "
        f"{found['checkpoint_bytes'] / GB:.2f} GB, host memory for the copy {found['host_bytes'] / GB:.2f} GB\n"
    )
    rows = [
        ("", "loop waits", "written in", "GB/s", "of disk", "step beside it"),
        (
            "synchronous",
            f"{found['synchronous_s']:.3f} s",
            f"{found['synchronous_write_s']:.3f} s",
            f"{found['synchronous_bytes_per_s'] / GB:.2f}",
            f"{100 * found['synchronous_bytes_per_s'] / found['disk_bytes_per_s']:.0f} %",
            "-",
        ),
        (
            "asynchronous",
            f"{found['asynchronous_blocked_s']:.3f} s",
            f"{found['asynchronous_write_s']:.3f} s",
            f"{found['written_bytes_per_s'] / GB:.2f}",
            f"{100 * found['share_of_disk']:.0f} %",
            f"{found['step_beside_save_s']:.3f} s" if found["step_beside_save_s"] else "none was whole",
        ),
        (
            "no save",
            "-",
            "-",
            f"{found['disk_bytes_per_s'] / GB:.2f}",
            "100 %",
            f"{found['quiet_step_s']:.3f} s",
        ),
    ]
    for row in rows:
        print(f"{row[0]:14}" + "".join(f"{cell:>16}" for cell in row[1:]))
    slower = f"{100 * found['slower']:+.1f} %" if found["slower"] is not None else "not known"
    print(
        f"\nblocked: {100 * found['blocked_share']:.1f} % of a synchronous save; steps beside a save: {slower} "
        f"({found['steps_beside_saves']} of them)"
    )


if __name__ == "__main__":
    run_main(main)
