"""`uniemox launch …`: from a recipe, or any long command, to jobs on a cluster. Torch-free."""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from launch.dispatch import Backend, Request

F = TypeVar("F", bound=Callable[..., Any])
HIDDEN = ("begin", "settle")
"""Commands that batch scripts call."""
NOT_SUBMITTED = ("launch", "plan", "status", "doctor")
"""Commands that answer at once, or that jobs call themselves."""
SITE_OPTIONS = (
    ("nodes", "N or N-M", "Nodes: 4, or 2-4 for as many of them as are free."),
    ("time", "TIME", "Time limit, such as 12:00:00 or 2-00:00:00."),
    ("partition", "NAME", "Partition."),
    ("account", "NAME", "Account that pays."),
    ("qos", "NAME", "Quality of service."),
    ("constraint", "FEATURES", "Features that nodes must have."),
    ("reservation", "NAME", "Reservation to run in."),
    ("gpus-per-node", "N", "GPUs on each node, and as many ranks unless --ranks-per-node is given."),
    ("ranks-per-node", "N", "Ranks on each node."),
    ("cpus-per-task", "N", "Cores of each rank."),
    ("mem", "SIZE", "Memory of a node, such as 480G."),
    ("signal-lead-s", "SECONDS", "Seconds before the time limit at which the run saves."),
)


class _Launch(click.Group):
    """A group that imports the batch scripts' own commands only when they are called."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in HIDDEN:
            command: click.Command = getattr(import_module("uniemox_dist.cli.launch_job"), cmd_name)
            return command
        return super().get_command(ctx, cmd_name)


class _Submit(click.Command):
    """A command that takes a recipe, or after `--` the words of another command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        command: list[str] = []
        if "--" in args:
            at = args.index("--")
            if args[at + 1 : at + 2] and _is_command(args[at + 1]):
                args, command = args[:at], args[at + 1 :]
        ctx.meta["command"] = tuple(command)
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["[OPTIONS]", "(RECIPE [KEY=VALUE]... | -- COMMAND [ARGUMENT]...)"]


def _is_command(word: str) -> bool:
    from uniemox_dist.cli.main import COMMANDS

    return word in COMMANDS


@click.group(cls=_Launch)
def launch() -> None:
    """Submits commands to clusters: checks them here, freezes code and settings, and starts jobs."""


def _submits(function: F) -> F:
    """Adds the arguments and options that all backends share."""
    decorators = [
        click.argument("recipe", required=False),
        click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]..."),
        click.option(
            "--cluster",
            "site",
            required=True,
            metavar="SITE",
            help="A cluster file, or the name of a shipped one.",
        ),
        click.option("--resume", is_flag=True, help="Continue a run that was started with other settings."),
        click.option(
            "--force-new", is_flag=True, help="Rename the folder of an earlier run, and start anew."
        ),
        click.option(
            "--unseen-data",
            is_flag=True,
            help="Only compute nodes see the shards; they are not checked here.",
        ),
        click.option(
            "--jobs",
            type=click.Path(path_type=Path),
            default=Path("jobs"),
            show_default=True,
            metavar="DIR",
            help="Folder for scripts, code and logs of commands that have no run folder.",
        ),
        click.option("--dry-run", is_flag=True, help="Check, print what would be submitted, write nothing."),
        *(click.option(f"--{name}", metavar=metavar, help=text) for name, metavar, text in SITE_OPTIONS),
    ]
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


@launch.command("slurm", cls=_Submit, short_help="Submit a command, a sweep or a chain of jobs to Slurm.")
@_submits
@click.option(
    "--after", type=click.IntRange(1), metavar="JOBID", help="Start when that job has ended, however."
)
@click.option(
    "--dependency",
    type=click.Choice(["singleton"]),
    help="Start when none of your jobs with the same name is running.",
)
@click.option(
    "--chain",
    type=click.IntRange(1, 100),
    default=1,
    metavar="N",
    help="N jobs in a row, each continuing the run, for sites where jobs may not queue themselves again.",
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
    """Submits a run of RECIPE with KEY=VALUE pairs on top, or any other COMMAND of uniemox, to Slurm.

    A recipe with a section `finetune` runs `uniemox finetune`, any other `uniemox pretrain`. Recipe, shards, number of
    ranks and times are checked first. The resolved configuration, the installed code and the script are copied into the
    run's folder, so that a job that is queued again runs what was submitted.

    \b
    uniemox launch slurm uniemox_vit_b16 --cluster site.yaml data.path=DATA
    uniemox launch slurm --cluster site.yaml -- evaluate probe RELEASE DATA
    """
    from launch.backends.slurm import Slurm

    request = _request(
        given,
        after=after,
        singleton=dependency is not None,
        chain=chain,
        exclude=tuple(exclude.split(",")) if exclude else (),
        axes=axes,
    )
    _submit(request, Slurm(preview=dry_run), dry_run=dry_run)


@launch.command(
    "local", cls=_Submit, short_help="Run a command on this machine, checked and frozen as for a cluster."
)
@_submits
def local_command(dry_run: bool, **given: Any) -> int:
    """Runs RECIPE, or any other COMMAND of uniemox, on this machine as on one node of SITE: with the same checks and
    frozen code; a run is started again after faults.

    Modules, setup and containers of SITE are not used; the command runs in the present environment.
    """
    from launch.backends.local import Local
    from uniemox_dist.distributed.local_launcher import Signals

    with Signals() as signals:
        return _submit(_request(given), Local(signals), dry_run=dry_run)


@launch.command("submitit", cls=_Submit, short_help="Submit a command through submitit.")
@_submits
def submitit_command(dry_run: bool, **given: Any) -> None:
    """Submits a run of RECIPE, or any other COMMAND of uniemox, through submitit, as `launch.submit(...)` does in
    Python.

    For runs among other submitit jobs; submitit counts time-outs and preemptions.
    """
    from launch.backends.submitit import Submitit

    _submit(_request(given), Submitit(preview=dry_run), dry_run=dry_run)


@launch.command("scripts", short_help="Write the batch scripts for a site into a folder.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--cluster", "site", default="plain", show_default=True, metavar="SITE", help="The site they are for."
)
def scripts_command(folder: Path, site: str) -> None:
    """Writes pretrain, finetune, pack, evaluate and release.sbatch for SITE into DIR, to be used with sbatch."""
    from launch.render import write_scripts

    for path in write_scripts(folder, site):
        click.echo(str(path))


def _request(given: dict[str, Any], **more: Any) -> "Request":
    """The request of a command line, with the cluster file and a COMMAND's own arguments checked.

    Raises:
        UserError: with all mistakes of that file and of the options.
    """
    from launch.cluster import load_cluster
    from launch.dispatch import PARALLEL, TRAINING, Request
    from uniemox_dist.core.errors import UserError

    if given["resume"] and given["force_new"]:
        raise UserError("--resume and --force-new: give one of them")
    command: tuple[str, ...] = click.get_current_context().meta["command"]
    recipe, overrides, name = given["recipe"], given["overrides"], ""
    if command and recipe is not None:
        raise UserError(f"RECIPE={recipe}: give a recipe, or a command after --, and not both")
    if not command and recipe is None:
        raise UserError("RECIPE: missing; give a recipe, or another command after --")
    if command:
        name = _check_command(command)
    if command and command[0] in TRAINING:
        if extra := [word for word in command if word.startswith("-")]:
            raise UserError(
                f"{extra[0]}: jobs are started without it; give options of `uniemox launch` before --"
            )
        recipe, overrides = command[1], command[2:]
        command = command[:1]
    options = {name.replace("-", "_"): given[name.replace("-", "_")] for name, _, _ in SITE_OPTIONS}
    if command and recipe is None and command[0] not in PARALLEL:
        for option in ("nodes", "ranks_per_node"):
            if options[option] not in (None, "1"):
                flag = option.replace("_", "-")
                raise UserError(f"--{flag}={options[option]}: {command[0]} is one process; leave it out")
    if not str(given["jobs"].absolute()).isprintable():
        raise UserError(
            f"--jobs={str(given['jobs'])!r}: has characters that a script cannot contain; give another folder"
        )
    if given["jobs"].is_file():
        raise UserError(f"--jobs={given['jobs']}: is a file; give a folder")
    if options["gpus_per_node"] is not None and options["ranks_per_node"] is None:
        options["ranks_per_node"] = ""  # as many as GPUs, overriding the file
    return Request(
        recipe,
        load_cluster(given["site"]).with_options(options),
        given["site"],
        overrides,
        command,
        name,
        given["jobs"],
        resume=given["resume"],
        force_new=given["force_new"],
        data=not given["unseen_data"],
        **more,
    )


def _check_command(words: Sequence[str]) -> str:
    """Parses another command's line without running it; returns the name of its job, such as evaluate-probe.

    Raises:
        UserError: for a command that is not submitted.
        click.UsageError: for a mistake in its arguments.
    """
    from uniemox_dist.cli.main import uniemox
    from uniemox_dist.core.errors import UserError

    if words[0] in NOT_SUBMITTED:
        raise UserError(f"{words[0]}: is not submitted as a job; call `uniemox {words[0]}` here")
    context = uniemox.make_context("uniemox", list(words))
    command: click.Command = uniemox
    names: list[str] = []
    rest = list(words)
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command = found
        names.append(name or "")
        context = command.make_context(names[-1], list(rest), parent=context)
    return "-".join(names)


def _submit(request: "Request", backend: "Backend", *, dry_run: bool) -> int:
    """Submits, or prints what would be submitted; remarks go to standard error."""
    from launch import dispatch

    if dry_run:
        script, prepared = dispatch.preview(request, backend)
        _print_remarks([*prepared.remarks, *prepared.table])
        click.echo(script, nl=False)
        return 0
    submitted = dispatch.submit(request, backend)
    _print_remarks(submitted.remarks)
    if submitted.wait is not None:
        _print_remarks([f"the earlier run is now {folder}" for folder in submitted.frozen.set_aside])
        return submitted.wait()
    for line in [*submitted.frozen.prepared.table, *submitted.describe()]:
        click.echo(line)
    return 0


def _print_remarks(remarks: Sequence[str]) -> None:
    for remark in remarks:
        click.echo(f"uniemox: {remark}", err=True)
