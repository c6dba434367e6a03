"""`uniemox plan`: estimates what a run needs and costs, before anything is queued. Torch-free."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from uniemox_dist.cli.inputs import LocalFolder

if TYPE_CHECKING:
    from launch.plan.data import Data
    from launch.plan.plan import Plan, PlanInputs
    from uniemox_dist.config.schema import Config


class _Amount(click.ParamType):
    """A finite number above 0."""

    name = "number"

    def __init__(self, most: float = math.inf) -> None:
        self.most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (0 < number <= self.most and math.isfinite(number)):
            limit = "above 0" if self.most == math.inf else f"above 0 and at most {self.most:g}"
            self.fail(f"{value}: must be a number {limit}", param, ctx)
        return number


AMOUNT = _Amount()


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--nodes", type=click.IntRange(1), required=True, help="Nodes of the job.")
@click.option(
    "--gpus-per-node", type=click.IntRange(1), required=True, help="GPUs, and so ranks, of each node."
)
@click.option("--gpu", metavar="NAME", help="h100, a100, a100-40gb, l40s, mi300x, …, or cpu.")
@click.option("--gpu-memory", type=AMOUNT, metavar="GB", help="Memory of a GPU that is not in the table.")
@click.option(
    "--network",
    type=AMOUNT,
    metavar="GBIT_PER_S",
    help="Bandwidth of a node to the others, all cards together.",
)
@click.option(
    "--mfu",
    type=_Amount(1.0),
    metavar="SHARE",
    help="Model FLOP utilisation, a share of the GPU's peak such as 0.35.",
)
@click.option(
    "--samples-per-s", type=AMOUNT, metavar="X", help="Pace of all ranks together, instead of --mfu."
)
@click.option(
    "--from-run",
    type=LocalFolder(),
    metavar="RUN",
    help="Use the pace and the saves that a run measured.",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    metavar="N",
    help="Number of samples of data that are not packed yet.",
)
@click.option("--cost-per-core", type=AMOUNT, metavar="MS", help="Milliseconds of one core to load a sample.")
@click.option(
    "--cpus-per-node", type=click.IntRange(1), metavar="N", help="Cores of a node that the job gets."
)
@click.option("--mtbf-hours", type=AMOUNT, metavar="H", help="Mean time between failures of a node.")
@click.option(
    "--disk", type=AMOUNT, metavar="GB/S", help="Write speed of the run folder's disk for all ranks together."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    nodes: int,
    gpus_per_node: int,
    gpu: str | None,
    gpu_memory: float | None,
    network: float | None,
    mfu: float | None,
    samples_per_s: float | None,
    from_run: Path | None,
    samples: int | None,
    cost_per_core: float | None,
    cpus_per_node: int | None,
    mtbf_hours: float | None,
    disk: float | None,
    as_json: bool,
) -> None:
    """Estimate what a run of RECIPE, pretraining or fine-tuning, needs and costs on so many GPUs: memory by part,
    network traffic, hours, loader cores, the balance of the data, and how often to save. Nothing is started, and no GPU
    is needed.

    KEY=VALUE pairs override the recipe. The plan marks values that were assumed, neither stated nor measured.
    """
    from launch.checks import find_missing_start
    from launch.plan.pace import read_run
    from launch.plan.plan import PlanInputs, make_plan
    from uniemox_dist.cli.plan_page import render_page
    from uniemox_dist.config.load import load_config
    from uniemox_dist.core.devices import find_device
    from uniemox_dist.core.errors import UserError
    from uniemox_dist.runs.folder import RunFolder

    _one_pace(mfu=mfu, samples_per_s=samples_per_s, from_run=from_run)
    device = find_device(gpu, gpu_memory)
    earlier = read_run(from_run) if from_run is not None else None
    config = load_config(recipe, overrides)
    if (missing := find_missing_start(config)) is not None:
        raise UserError(f"{missing}; give a release, run or checkpoint, or leave it out and give model.name")
    own = RunFolder(Path(config.run.dir) / config.run.name)
    inputs = PlanInputs(
        nodes=nodes,
        per_node=gpus_per_node,
        device=device,
        network_gbit_s=network,
        mfu=mfu,
        samples_per_s=samples_per_s,
        earlier=earlier,
        earlier_run=RunFolder(from_run) if from_run is not None else own,
        node_mtbf_h=mtbf_hours,
        disk_gb_s=disk,
        ms_per_sample=cost_per_core,
        cpus_per_node=cpus_per_node,
    )
    found = make_plan(config, inputs, _data(config, samples, inputs, overrides))
    if as_json:
        click.echo(json.dumps(_as_json(found), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        click.echo(render_page(found))


def _one_pace(**given: object) -> None:
    """
    Raises:
        UserError: if a pace is stated more than once.
    """
    from uniemox_dist.core.errors import UserError

    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)}: each states the pace; give one of them")


def _data(config: "Config", samples: int | None, inputs: "PlanInputs", overrides: Sequence[str]) -> "Data":
    """The run's data, or data of --samples samples. Held-out data and a teacher that only the recipe names may be
    missing; those that the user names must exist.

    Raises:
        UserError: if they are missing or damaged.
    """
    from launch.checks import check_eval_path, check_teacher
    from launch.plan.data import make_stated_data, open_data
    from launch.plan.ranks import explain_illegal, legal_ranks
    from uniemox_dist.core.errors import UserError

    here = inputs.nodes * inputs.per_node
    if here > config.batch.streams or not legal_ranks(config):  # checked first, because it needs no data
        reason = explain_illegal(config, here)
        raise UserError(f"--nodes={inputs.nodes} --gpus-per-node={inputs.per_node}: {reason}")
    if samples is not None:
        return make_stated_data(config, samples)
    try:
        if any(pair.startswith("data.eval_path=") for pair in overrides):
            check_eval_path(config)
        if any(pair.startswith("teacher.") for pair in overrides):
            check_teacher(config)
        return open_data(config)
    except UserError as error:
        raise UserError(f"{error}; or give --samples N, to plan without the data") from None


def _as_json(plan: "Plan") -> dict[str, Any]:
    """The plan as a JSON object. Sizes are in bytes, times in seconds unless the name says hours."""
    from launch.plan.model import PARTS, count_numbers

    config, inputs = plan.config, plan.inputs
    recommended = plan.recommended
    parts = {name: count_numbers(plan.parameters, name) for name in PARTS}
    return {
        "format": "uniemox-plan",
        "format_version": 1,
        "run": config.run.name,
        "device": asdict(inputs.device),
        "nodes": inputs.nodes,
        "gpus_per_node": inputs.per_node,
        "nodes_used": plan.nodes,
        "ranks_per_node": plan.per_node,
        "ranks": plan.ranks,
        "idle": inputs.nodes * inputs.per_node - plan.ranks,
        "legal_ranks": list(plan.legal),
        "precision": plan.precision,
        "parameters": {
            "trained": sum(p.numbers for p in plan.parameters if p.trained),
            "fixed": sum(p.numbers for p in plan.parameters if not p.trained),
            **parts,
        },
        "teacher": asdict(plan.tower),
        "memory": [
            {**asdict(m), "checkpoint_blocks": checkpointed, "total": m.total, "fits": m.fits(inputs.device)}
            for checkpointed, memories in ((False, plan.memory), (True, plan.checkpointed))
            for m in memories
        ],
        "recommended": recommended
        and {
            "zero_stage": recommended.stage,
            "micro_batch": recommended.micro_batch,
            "checkpoint_blocks": plan.recommended_checkpointed,
        },
        "network": [{**asdict(e), "traffic": [asdict(t) for t in e.traffic]} for e in plan.exchanges],
        "flops_per_sample": {**asdict(plan.flops), "training": plan.flops.training},
        "pace": plan.pace and asdict(plan.pace),
        "steps": plan.steps,
        "samples": plan.steps * config.batch.global_batch,
        "step_s": plan.step_s,
        "hours": plan.hours,
        "loading": plan.loading and asdict(plan.loading),
        "data": {
            key: getattr(plan.data, key) for key in ("samples", "epoch_samples", "bytes", "shards", "names")
        },
        "balance": plan.balance and asdict(plan.balance),
        "source_epochs": list(plan.source_epochs),
        "saving": asdict(plan.saving),
        "remarks": {name: [list(r) for r in remarks] for name, remarks in plan.remarks.items()},
    }
