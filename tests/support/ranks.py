"""Real ranks for tests: processes that join a process group (gloo; NCCL on GPUs) and run the real loop.

On CPUs they are forked from a clean server that has imported torch and DeepSpeed once, so that a run costs seconds.
"""

import faulthandler
import json
import multiprocessing
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from uniemox_dist.distributed.local_launcher import free_port

PRELOAD = [
    "torch",
    "deepspeed",
    "open_clip",
    "timm",
    "torch.utils.tensorboard",
    "uniemox_dist.train.finetune.build",
]
TIMEOUT_S = 240

TINY_MODEL = (
    "model.image_size=32",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "model.decoder_width=32",
    "model.decoder_depth=1",
    "model.decoder_heads=2",
)
"""A student that trains in no time."""
TINY = (
    "run.log_every=1",
    "run.pictures_every=null",
    "run.epochs=null",
    "optim.warmup_epochs=null",
    "optim.warmup_steps=1",
    "batch.global_batch=24",
    "batch.streams=12",
    "data.workers=0",
    *TINY_MODEL,
    "optim.precision=fp32",
)


def run_ranks(
    overrides: Sequence[str],
    *,
    world_size: int,
    resume: str = "auto",
    kill_when: Callable[[], bool] | None = None,
    prepare: Callable[[int], None] | None = None,
    recipe: str = "demo",
    more: Sequence[tuple[str, Sequence[str]]] = (),
    device: str = "cpu",
) -> list[int]:
    """Runs a recipe, of pretraining or of fine-tuning, with these settings on `world_size` ranks; returns their exit
    codes. `more` are recipes and settings that the same ranks run afterwards: the code is then the first that is not 0.

    As soon as `kill_when` is true all ranks are killed (SIGKILL), and nothing is returned. `prepare`, a function of a
    module, is called in each rank with its number before the run: to make something go wrong there. `device` is cpu
    or cuda; ranks on CPUs do not see a GPU.
    """
    # CUDA cannot be used in a process forked from one that has asked for it, as an import may.
    context: Any = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
    if device == "cpu":
        context.set_forkserver_preload(PRELOAD)
    port = free_port()
    pipes, ranks = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_rank,
            args=(
                theirs,
                rank,
                world_size,
                port,
                [(recipe, list(overrides)), *more],
                resume,
                prepare,
                device,
            ),
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        ranks.append(process)
    codes: list[int] = []
    try:
        if kill_when is not None:
            deadline = time.monotonic() + TIMEOUT_S
            while not kill_when():
                if time.monotonic() > deadline:
                    _print_stacks(ranks)
                    raise AssertionError("the moment to kill the ranks never came")
                assert all(process.is_alive() for process in ranks), "a rank ended before it was killed"
                time.sleep(0.005)
            return codes
        for pipe in pipes:
            if not pipe.poll(TIMEOUT_S):
                _print_stacks(ranks)
                raise AssertionError("a rank neither ended nor failed")
            outcome = pipe.recv()
            assert isinstance(outcome, int), outcome
            codes.append(outcome)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return codes


def _print_stacks(ranks: Sequence[Any]) -> None:
    """Lets ranks that hang, and their loader processes, print the stacks of their threads on standard error."""
    for rank in ranks:
        listed = subprocess.run(["pgrep", "-P", str(rank.pid)], capture_output=True, text=True, check=False)
        for pid in (rank.pid, *map(int, listed.stdout.split())):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGQUIT)
    time.sleep(2)


def _rank(
    pipe: Connection,
    rank: int,
    world_size: int,
    port: int,
    runs: Sequence[tuple[str, Sequence[str]]],
    resume: str,
    prepare: Callable[[int], None] | None,
    device: str,
) -> None:
    if device == "cpu":
        os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    import torch

    from uniemox_dist.config.finetune import FinetuneRun
    from uniemox_dist.config.load import load_config
    from uniemox_dist.distributed.world import World
    from uniemox_dist.train.finetune.build import finetune
    from uniemox_dist.train.pretrain import pretrain

    torch.set_num_threads(1)
    faulthandler.register(signal.SIGQUIT, all_threads=True)
    try:
        if prepare is not None:
            prepare(rank)
        world = World(rank, world_size, rank, "127.0.0.1", port)
        codes = []
        for recipe, overrides in runs:
            config = load_config(recipe, overrides)
            train = finetune if isinstance(config, FinetuneRun) else pretrain
            codes.append(train(config, world, resume=resume))
        pipe.send(next((code for code in codes if code), 0))
    except BaseException:
        pipe.send(traceback.format_exc())


def two_ranks(tmp_path: Path, data: Path, teacher: Path, *more: str) -> list[str]:
    """Settings of a short run of two ranks, `tmp_path`/run, that saves every other step and keeps all it saves."""
    return [
        *TINY,
        f"run.dir={tmp_path}",
        "run.name=run",
        "run.save_every=2",
        "run.keep_last=9",
        f"data.path={data / 'train'}",
        "data.eval_path=null",
        f"teacher.name=local-dir:{teacher}",
        "batch.micro_batch=12",
        *more,
    ]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind, in their order."""
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def losses(folder: Path) -> dict[int, tuple[float, ...]]:
    """Loss and its three parts by step; after a resume the later line of a step counts."""
    names = ("loss", "relation", "similarity", "reconstruction")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: tuple(line[name] for name in names) for line in lines}


def largest_difference(a: dict[int, tuple[float, ...]], b: dict[int, tuple[float, ...]]) -> float:
    """Largest relative difference over the steps of both."""
    assert a.keys() == b.keys()
    pairs: list[tuple[Any, Any]] = [(x, y) for step in a for x, y in zip(a[step], b[step])]
    return max(abs(x - y) / max(abs(x), 1e-12) for x, y in pairs)
