"""`uniemox plan`: what a run will need and cost, before anything is queued. Torch-free."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from launch.plan.data import Data
    from launch.plan.plan import Asked
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
    "--network", type=AMOUNT, metavar="GBIT_PER_S", help="Of one node to the others, all its cards."
)
@click.option(
    "--mfu", type=_Amount(1.0), metavar="SHARE", help="Useful share of the GPU's peak, such as 0.35."
)
@click.option("--samples-per-s", type=AMOUNT, metavar="X", help="The pace of all ranks, instead of --mfu.")
@click.option(
    "--from-run", type=click.Path(path_type=Path), metavar="RUN", help="Take pace and saves from a run."
)
@click.option("--samples", type=click.IntRange(1), metavar="N", help="Size of data that are not there yet.")
@click.option("--cost-per-core", type=AMOUNT, metavar="MS", help="Milliseconds of a core to load a sample.")
@click.option("--cpus-per-node", type=click.IntRange(1), metavar="N", help="Cores that a node gives the job.")
@click.option("--mtbf-hours", type=AMOUNT, metavar="H", help="Mean time between failures of a node.")
@click.option("--disk", type=AMOUNT, metavar="GB/S", help="What the run folder's disk takes from all ranks.")
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
    """Says what a run of RECIPE needs and costs on so many GPUs: memory by part, exchanges, hours, loader cores, how
    evenly data are dealt, and how often to save. Nothing is started, and no GPU is needed.

    KEY=VALUE pairs come on top of the recipe as for pretrain. What was neither stated nor measured is assumed, and the
    plan says so.
    """
    from launch.plan.facts import facts
    from launch.plan.pace import read_run
    from launch.plan.plan import Asked, make_plan
    from uniemox_dist.cli.plan_page import page
    from uniemox_dist.config.load import load_config
    from uniemox_dist.core.devices import find_device
    from uniemox_dist.runs.folder import RunFolder

    _one_pace(mfu=mfu, samples_per_s=samples_per_s, from_run=from_run)
    device = find_device(gpu, gpu_memory)
    earlier = read_run(from_run) if from_run is not None else None
    config = load_config(recipe, overrides)
    own = RunFolder(Path(config.run.dir) / config.run.name)
    asked = Asked(
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
    found = make_plan(config, asked, _data(config, samples, asked))
    if as_json:
        click.echo(json.dumps(facts(found), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        click.echo(page(found))


def _one_pace(**given: object) -> None:
    """
    Raises:
        UserError: if a pace is stated more than once.
    """
    from uniemox_dist.core.errors import UserError

    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)}: each states the pace; give one of them")


def _data(config: "Config", samples: int | None, asked: "Asked") -> "Data":
    """The run's data, or what --samples says of them.

    Raises:
        UserError: if they are not there, or damaged.
    """
    from launch.plan.data import open_data, stated_data
    from launch.plan.ranks import legal_ranks, why_illegal
    from uniemox_dist.core.errors import UserError

    here = asked.nodes * asked.per_node
    if here > config.batch.streams or not legal_ranks(config):  # told first: it needs no data
        reason = why_illegal(config, here)
        raise UserError(f"--nodes={asked.nodes} --gpus-per-node={asked.per_node}: {reason}")
    if samples is not None:
        return stated_data(config, samples)
    try:
        return open_data(config)
    except UserError as error:
        raise UserError(f"{error}; or give --samples N, to plan without the data") from None
