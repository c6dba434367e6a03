"""A plan's memory is that of DeepSpeed's engine: weights, gradients, optimizer states and averages, by its tensors."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from ranks import PRELOAD, TIMEOUT_S, run_ranks, two_ranks

from launch.plan.engine import BUCKET
from launch.plan.model import read_tower
from launch.plan.saving import checkpoint_size
from uniemox_dist.checkpoints.folders import list_complete_checkpoints
from uniemox_dist.config.load import load_config
from uniemox_dist.config.schema import Config
from uniemox_dist.core.devices import find_device
from uniemox_dist.distributed.local_launcher import free_port
from uniemox_dist.models.parameters import student_parameters

TOOLS = Path(__file__).parents[2] / "tools"
WITHIN = 0.02
E = 64
SIZES = [
    # Some parameters above ZeRO-3's 100,000 numbers and some below; two micro-batches a step; an average.
    "model.image_size=32",
    "model.width=192",
    "model.depth=3",
    "model.heads=3",
    "model.decoder_width=96",
    "model.decoder_depth=1",
    "batch.streams=6",
    "batch.micro_batch=3",
    "optim.ema_decay=0.99",
    # The bucket of a real run, which only takes its time here.
    "deepspeed.zero_optimization.reduce_bucket_size=1000000",
]
CASES = [
    *[("fp32", stage) for stage in (0, 1, 2, 3)],
    *[("bf16", stage) for stage in (1, 2, 3)],
]
Case = tuple[str, int]


FINETUNE = ["data.path=d", "model.name=null", "model.patch_size=8", "model.mlp_ratio=4"]
"""For SIZES without a decoder and an average; six streams a rank can be mixed in pairs."""


def resolve(case: Case, ranks: int, more: Sequence[str], recipe: str) -> Config:
    pairs = settings(case, ranks, more)
    if recipe == "demo":
        return load_config(recipe, pairs)
    kept = [
        p for p in pairs if not p.startswith(("model.decoder", "optim.ema", "batch.micro", "batch.streams"))
    ]
    return load_config(recipe, [*FINETUNE, *kept, "batch.micro_batch=2", f"batch.streams={6 * ranks}"])


def settings(case: Case, ranks: int, more: Sequence[str] = ()) -> list[str]:
    precision, stage = case
    batch = f"batch.global_batch={6 * ranks}"
    return [*SIZES, batch, f"optim.precision={precision}", f"zero.stage={stage}", *more]


def measure(
    cases: Sequence[Case], ranks: int, more: Sequence[str] = (), recipe: str = "demo"
) -> list[dict[str, int]]:
    """Of each case, the most that any rank has of each part."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port, pipes, processes = free_port(), [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_rank, args=(theirs, rank, ranks, port, list(cases), list(more), recipe)
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        found = []
        for pipe in pipes:
            assert pipe.poll(TIMEOUT_S), "a rank neither ended nor failed"
            outcome = pipe.recv()
            assert isinstance(outcome, list), outcome
            found.append(outcome)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [{part: max(row[part] for row in rows) for part in rows[0]} for rows in zip(*found)]


def _rank(
    pipe: Connection, rank: int, ranks: int, port: int, cases: list[Case], more: list[str], recipe: str
) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    sys.path.insert(0, str(TOOLS))
    import torch
    from engine_memory import Measuring  # type: ignore[import-not-found]

    from uniemox_dist.distributed import collectives
    from uniemox_dist.distributed.world import World

    torch.set_num_threads(1)
    try:
        world = World(rank, ranks, rank, "127.0.0.1", port)
        device = collectives.init(world, TIMEOUT_S)
        found = []
        for case in cases:
            config = resolve(case, ranks, more, recipe)
            measuring = Measuring(config, world, device, embedding_width=E, precision=case[0])
            for _ in range(2):  # ZeRO-3 learns in its first what it will need
                measuring.step()
            found.append(measuring.most)
        pipe.send(found)
    except BaseException:
        pipe.send(traceback.format_exc())


def check(cases: Sequence[Case], ranks: int, more: Sequence[str] = (), recipe: str = "demo") -> None:
    sys.path.insert(0, str(TOOLS))
    from engine_memory import planned

    for case, found in zip(cases, measure(cases, ranks, more, recipe), strict=True):
        config = resolve(case, ranks, more, recipe)
        expected = planned(config, ranks, find_device("cpu", None), embedding_width=E)
        for part, number in expected.items():
            assert found[part] == pytest.approx(number, rel=WITHIN), (case, part)


def test_a_plan_has_the_bytes_of_the_tensors_of_two_ranks() -> None:
    check(CASES, 2)


def test_a_plan_has_the_bytes_of_one_rank() -> None:
    check([("fp32", 0), ("bf16", 1), ("bf16", 3)], 1)


def test_a_plan_has_the_bytes_of_a_classifier_on_two_ranks() -> None:
    check([("fp32", 0), ("bf16", 1), ("fp32", 2), ("bf16", 3)], 2, ["finetune.persons=true"], "finetune")


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("optim.layer_decay=0.7", "model.positions=learned"),
        ("model.fusion=gated_mlp", "loss.person_reconstruction=true", "compute.checkpoint_blocks=true"),
    ],
)
def test_a_plan_has_the_bytes_of_other_students_too(more: Sequence[str]) -> None:
    check(CASES, 3, more)


def test_the_bucket_is_that_of_a_run() -> None:
    from uniemox_dist.train.engine import BUCKET as of_a_run

    assert of_a_run == BUCKET


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_plan_has_the_bytes_of_a_checkpoint(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path, stage: int
) -> None:
    pairs = two_ranks(
        tmp_path, tiny_data, tiny_teacher, f"zero.stage={stage}", "run.max_steps=2", "optim.ema_decay=0.9"
    )
    assert run_ranks(pairs, world_size=2) == [0, 0]
    config = load_config("demo", pairs)
    tower = read_tower(config)
    parameters = student_parameters(config.model, config.loss, tower.embedding_width)
    [checkpoint] = list_complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoint_size(config, parameters, ranks=2).total == pytest.approx(checkpoint.bytes, rel=WITHIN)
