"""Compares the memory of one rank that `uniemox plan` estimates with measurements: prints a table, and writes it with
`--json FILE`.

Each ZeRO stage and micro-batch runs in a separate process. On a GPU the measurement is max_memory_allocated over some
steps of a real engine, including the teacher's picture tower (random weights). On a CPU it is the bytes of the
engine's own tensors, because torch does not count CPU allocations; the output states this. There is one rank, so the
parts that ZeRO would divide among ranks are whole; the tests in tests/distributed use several ranks.
"""

import argparse
import json
import subprocess
import sys
import warnings
from typing import Any

import torch
from benchmark import make_parser, run_json, run_main, save_results
from engine_memory import Measuring, planned
from options import positive_int

from launch.plan.memory import Memory, choose_precision, count_memory
from launch.plan.model import Tower, list_trained_parameters, read_tower
from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.config.load import load_config
from uniemox_dist.config.schema import Config
from uniemox_dist.core.devices import Device
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import World

STEPS = 3
AIM = 0.1


def main() -> None:
    parser = make_parser(__doc__.partition("\n\n")[0])
    parser.add_argument("recipe", nargs="?", default="uniemox_vit_b16")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument(
        "--teacher", default="ViT-B-16-quickgelu", help="shape of the teacher, by open_clip's name"
    )
    parser.add_argument("--stages", type=int, choices=(0, 1, 2, 3), nargs="+", default=[1, 2, 3])
    parser.add_argument("--micro-batches", type=positive_int, nargs="+", default=[32])
    parser.add_argument("--checkpoint-blocks", action="store_true", help="measure with and without it")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # used in a separate process
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.one:
        print(json.dumps(measured(json.loads(options.one))))
        return
    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else "cpu"
    if not gpu:
        print("there is no GPU here: the engine's own tensors are counted, activations are not\n")
    rows = []
    finetunes = isinstance(load_config(options.recipe, options.overrides), FinetuneRun)
    with_teacher = [
        f"teacher.name={options.teacher}",
        "teacher.weights=random",
        "teacher.mean=[0.5,0.5,0.5]",
        "teacher.std=[0.5,0.5,0.5]",
    ]
    for stage in options.stages:
        for micro in options.micro_batches:
            for again in (False, True) if options.checkpoint_blocks else (False,):
                pairs = [
                    *options.overrides,
                    *([] if finetunes else with_teacher),
                    f"zero.stage={stage}",
                    f"batch.micro_batch={micro}",
                    f"batch.global_batch={2 * micro}",
                    f"batch.streams={2 if finetunes else 1}",
                    f"compute.checkpoint_blocks={str(again).lower()}",
                ]
                rows += in_own_process(options.recipe, pairs)
    for row in rows:
        print(line(row))
    save_results(options, {"device": name, "command": sys.argv, "rows": rows})


def in_own_process(recipe: str, pairs: list[str]) -> list[dict[str, Any]]:
    """Measures one choice in a new process, without the memory that earlier choices left."""
    try:
        rows: list[dict[str, Any]] = run_json([__file__, "--one", json.dumps([recipe, pairs])])
    except subprocess.CalledProcessError as error:
        return [{"what": " ".join(pairs[-5:]), "failed": error.returncode}]
    return rows


def measured(one: list[Any]) -> list[dict[str, Any]]:
    """Measures one choice; returns rows with `what`, `planned` and `measured` (bytes)."""
    config = load_config(one[0], one[1])
    world = World()
    there = collectives.init(world, 60)
    device = Device("here", is_gpu=there.type == "cuda")
    tower = read_tower(config)
    precision = choose_precision(config, device, config.zero.stage)
    visual = teacher(config, there) if device.is_gpu else None
    width = tower.embedding_width or 1  # in fine-tuning, which has no teacher, nothing depends on it
    measuring = Measuring(config, world, there, embedding_width=width, precision=precision)
    if device.is_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS if device.is_gpu else 2):
        measuring.step(visual, tower.image_size)
    micro, again = config.batch.micro_batch, config.compute.checkpoint_blocks
    about = f"ZeRO {config.zero.stage} {precision} micro-batch {micro}{' again' if again else ''}"
    expected = planned(config, 1, device, embedding_width=width)
    rows = [
        {"what": f"{about}: {part}", "planned": number, "measured": measuring.most[part]}
        for part, number in expected.items()
        if number
    ]
    if device.is_gpu:
        whole = allocated(config, tower, device)
        rows.append(
            {
                "what": f"{about}: allocated at most",
                "planned": whole.allocated,
                "measured": torch.cuda.max_memory_allocated(),
            }
        )
    return rows


def allocated(config: Config, tower: Tower, device: Device) -> Memory:
    """The memory of one rank as `uniemox plan` estimates it."""
    parameters = list_trained_parameters(config, tower)
    return count_memory(
        config,
        parameters,
        tower,
        device,
        stage=config.zero.stage,
        micro_batch=config.batch.micro_batch,
        ranks=1,
        checkpointed=config.compute.checkpoint_blocks,
    )


def teacher(config: Config, device: torch.device) -> torch.nn.Module | None:
    """A picture tower with random weights, in bf16."""
    import open_clip

    if not config.loss.needs_teacher:
        return None
    visual: torch.nn.Module = open_clip.create_model(config.teacher.name, load_weights=False).visual
    return visual.to(device, torch.bfloat16).eval().requires_grad_(False)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    if "failed" in row:
        return f"{row['what']}: failed with {row['failed']}, see above"
    off = row["planned"] / row["measured"] - 1 if row["measured"] else float("nan")
    sizes = f"{row['planned'] / 1e9:8.3f} GB planned {row['measured'] / 1e9:8.3f} GB measured"
    return f"{row['what']:60} {sizes} {100 * off:+6.1f} %{'' if abs(off) <= AIM else '  !'}"


if __name__ == "__main__":
    run_main(main)
