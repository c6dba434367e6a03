"""`uniemox launch …`: from a recipe to a run on a cluster. Torch-free."""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from launch.dispatch import Order, Submitted

F = TypeVar("F", bound=Callable[..., Any])
HIDDEN = ("begin", "settle")
"""What batch scripts call."""
SITE_OPTIONS = (
    ("nodes", "N or N-M", "Nodes: 4, or 2-4 for as many of them as there are."),
    ("time", "TIME", "Time limit, such as 12:00:00 or 2-00:00:00."),
    ("partition", "NAME", "Partition."),
    ("account", "NAME", "Account that pays."),
    ("qos", "NAME", "Quality of service."),
    ("constraint", "FEATURES", "Features that nodes must have."),
    ("reservation", "NAME", "Reservation to run in."),
    ("gpus-per-node", "N", "GPUs on each node; then as many ranks, unless --ranks-per-node says otherwise."),
    ("ranks-per-node", "N", "Ranks on each node."),
    ("cpus-per-task", "N", "Cores of each rank."),
    ("mem", "SIZE", "Memory of a node, such as 480G."),
    ("signal-lead-s", "SECONDS", "Seconds before the time limit at which the run is told to save."),
)


class _Launch(click.Group):
    """A group that finds the scripts' own commands only when they are called."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in HIDDEN:
            command: click.Command = getattr(import_module("uniemox_dist.cli.launch_job"), cmd_name)
            return command
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Launch)
def launch() -> None:
    """Starts runs on clusters: checked here, frozen into the run's folder, submitted."""


def _of_a_run(function: F) -> F:
    """Arguments and options that all ways to start a run have."""
    decorators = [
        click.argument("recipe"),
        click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]..."),
        click.option(
            "--cluster",
            "site",
            required=True,
            metavar="SITE",
            help="A cluster file, or a shipped one's name.",
        ),
        click.option("--resume", is_flag=True, help="Go on with a run that was begun with other settings."),
        click.option(
            "--force-new", is_flag=True, help="Set the run's folder aside (it stays), and start anew."
        ),
        click.option(
            "--unseen-data", is_flag=True, help="Only compute nodes see the shards: not checked here."
        ),
        click.option("--dry-run", is_flag=True, help="Check, print what would be submitted, write nothing."),
        *(click.option(f"--{name}", metavar=metavar, help=text) for name, metavar, text in SITE_OPTIONS),
    ]
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


@launch.command("slurm", short_help="Submit a run, a sweep or a chain of jobs to Slurm.")
@_of_a_run
@click.option(
    "--after", type=click.IntRange(1), metavar="JOBID", help="Start when that job has ended, however."
)
@click.option(
    "--dependency", type=click.Choice(["singleton"]), help="Start when no job of this name of yours runs."
)
@click.option(
    "--chain",
    type=click.IntRange(1, 100),
    default=1,
    metavar="N",
    help="N jobs in a row that go on with the run, for sites where jobs may not queue themselves again.",
)
@click.option(
    "--exclude", metavar="NODES", help="Nodes to leave out, besides those where a preflight failed."
)
@click.option(
    "--array", "axes", multiple=True, metavar="KEY=V1,V2…", help="Sweep: a run for each value. Repeatable."
)
def slurm_command(
    after: int | None,
    dependency: str | None,
    chain: int,
    exclude: str | None,
    axes: tuple[str, ...],
    dry_run: bool,
    **given: Any,
) -> None:
    """Submits a run of RECIPE, with KEY=VALUE pairs on top, to Slurm.

    Recipe, shards, number of ranks and times are checked first. The resolved configuration, the installed code and the
    script are frozen into the run's folder, so that a job that is queued again runs what was submitted.
    """
    order = _order(given, after=after, singleton=dependency is not None, chain=chain, exclude=exclude)
    if axes:
        _sweep(order, axes, dry_run=dry_run)
        return
    from launch import dispatch as ordering

    if dry_run:
        script, remarks = ordering.script_only(order)
        _say(remarks)
        click.echo(script, nl=False)
        return
    submitted, remarks = ordering.submit(order)
    _say(remarks)
    _follow(submitted)


@launch.command("local", short_help="Run on this machine, checked and frozen as for a cluster.")
@_of_a_run
def local_command(dry_run: bool, **given: Any) -> int:
    """Runs RECIPE on this machine as on one node of SITE: the same checks, the code frozen, restarts after faults.

    Modules, setup and containers of SITE are not used: this is the environment that the command is called in.
    """
    from launch.backends.local import prepare_here, run_here

    order = _order(given)
    if dry_run:
        from uniemox_dist.config.load import dump_yaml

        config, ranks, remarks = prepare_here(order)
        _say([*remarks, f"{ranks} ranks on this machine"])
        click.echo(dump_yaml(config), nl=False)
        return 0
    return run_here(order, say=_say)


@launch.command("submitit", short_help="Submit a run through submitit.")
@_of_a_run
def submitit_command(dry_run: bool, **given: Any) -> None:
    """Submits a run of RECIPE through submitit, as `launch.submit(...)` does in Python.

    For runs among other submitit jobs; its time-outs and pre-emptions are counted as submitit does.
    """
    from launch.backends import submitit

    order = _order(given)
    if dry_run:
        script, remarks = submitit.script_only(order)
        _say(remarks)
        click.echo(script, nl=False)
        return
    submitted, _, remarks = submitit.submit_order(order)
    _say(remarks)
    _follow(submitted)


@launch.command("scripts", short_help="Write the batch scripts for a site into a folder.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--cluster", "site", default="plain", show_default=True, metavar="SITE", help="The site they are for."
)
def scripts_command(folder: Path, site: str) -> None:
    """Writes pretrain, finetune, pack, evaluate and release.sbatch for SITE into DIR, for sbatch by hand."""
    from launch.render import write_scripts

    for path in write_scripts(folder, site):
        click.echo(str(path))


def _order(given: dict[str, Any], **more: Any) -> "Order":
    """What the options say, with the site's file checked.

    Raises:
        UserError: for every mistake of that file and of the options.
    """
    from launch.cluster import load_cluster
    from launch.dispatch import Order
    from uniemox_dist.core.errors import UserError

    if given["resume"] and given["force_new"]:
        raise UserError("--resume and --force-new: give one of them")
    options = {name.replace("-", "_"): given[name.replace("-", "_")] for name, _, _ in SITE_OPTIONS}
    if options["gpus_per_node"] is not None and options["ranks_per_node"] is None:
        options["ranks_per_node"] = ""  # as many as GPUs, whatever the file says
    exclude = more.pop("exclude", None)
    return Order(
        given["recipe"],
        load_cluster(given["site"]).with_options(options),
        given["site"],
        given["overrides"],
        resume=given["resume"],
        force_new=given["force_new"],
        data=not given["unseen_data"],
        exclude=tuple(exclude.split(",")) if exclude else (),
        **more,
    )


def _sweep(order: "Order", axes: Sequence[str], *, dry_run: bool) -> None:
    from launch import sweep

    if dry_run:
        script, lines, remarks = sweep.script_only(order, axes)
        _say([*remarks, *lines])
        click.echo(script, nl=False)
        return
    submitted, lines, remarks = sweep.submit(order, axes)
    _say(remarks)
    for line in lines:
        click.echo(line)
    _follow(submitted)


def _say(remarks: Sequence[str]) -> None:
    for remark in remarks:
        click.echo(f"uniemox: {remark}", err=True)


def _follow(submitted: "Submitted") -> None:
    from launch.dispatch import follow

    for line in follow(submitted):
        click.echo(line)
