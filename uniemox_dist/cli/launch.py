"""`uniemox launch …`: from a recipe, or any long command, to jobs on a cluster. Torch-free."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from uniemox_dist.cli.inputs import LocalFolder

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


LOCAL_OPTIONS = ("gpus-per-node", "ranks-per-node")
"""The options of SITE_OPTIONS that have an effect on this machine."""


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
            if not _may_be_recipe(args[at + 1 : at + 2]):
                args, command = args[:at], args[at + 1 :]
        ctx.meta["command"] = tuple(command)
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["[OPTIONS]", "(RECIPE [KEY=VALUE]... | -- COMMAND [ARGUMENT]...)"]


def _may_be_recipe(first: Sequence[str]) -> bool:
    """Whether the first word after `--` is a recipe or a KEY=VALUE pair, so that `--` only ends the options."""
    from uniemox_dist.cli.main import COMMANDS
    from uniemox_dist.config.load import list_shipped_recipes

    if not first or first[0] in COMMANDS:
        return False
    word = first[0]
    return not word.startswith("-") and (
        "=" in word or Path(word).is_file() or word in list_shipped_recipes()
    )


@click.group(cls=_Launch)
def launch() -> None:
    """Submit commands to clusters: check them here, freeze code and settings, and start jobs."""


def _submits(function: F, effective: Sequence[str] | None = None) -> F:
    """Adds the arguments and options that all backends share; those of SITE_OPTIONS without effect are hidden, and
    `_request` refuses them."""
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
            type=LocalFolder(),
            default=Path("jobs"),
            show_default=True,
            metavar="DIR",
            help="Folder for scripts, code and logs of commands that have no run folder.",
        ),
        click.option("--dry-run", is_flag=True, help="Check, print what would be submitted, write nothing."),
        *(
            click.option(
                f"--{name}",
                metavar=metavar,
                help=text,
                hidden=effective is not None and name not in effective,
            )
            for name, metavar, text in SITE_OPTIONS
        ),
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
    """Submit a run of RECIPE with KEY=VALUE pairs on top, or any other COMMAND of uniemox, to Slurm.

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
@partial(_submits, effective=LOCAL_OPTIONS)
def local_command(dry_run: bool, **given: Any) -> int:
    """Run RECIPE, or any other COMMAND of uniemox, on this machine as on one node of SITE: with the same checks and
    frozen code; a run is started again after faults.

    Modules, setup and containers of SITE are not used; the command runs in the present environment.
    """
    from launch.backends.local import Local
    from uniemox_dist.core.errors import UserError
    from uniemox_dist.distributed.local_launcher import Signals

    for name, _, _ in SITE_OPTIONS:
        value = given[name.replace("-", "_")]
        if value is not None and name not in LOCAL_OPTIONS and (name, value) != ("nodes", "1"):
            raise UserError(
                f"--{name}={value}: has no effect on this machine, which is one node without a queue; leave it out, or "
                "use `uniemox launch slurm`"
            )
    with Signals() as signals:
        return _submit(_request(given), Local(signals), dry_run=dry_run)


@launch.command("submitit", cls=_Submit, short_help="Submit a command through submitit.")
@_submits
def submitit_command(dry_run: bool, **given: Any) -> None:
    """Submit a run of RECIPE, or any other COMMAND of uniemox, through submitit, as `launch.submit(...)` does in
    Python.

    For runs among other submitit jobs; submitit counts time-outs and preemptions.
    """
    from launch.backends.submitit import Submitit

    _submit(_request(given), Submitit(preview=dry_run), dry_run=dry_run)


@launch.command("scripts", short_help="Write the batch scripts for a site into a folder.")
@click.argument("folder", metavar="DIR", type=LocalFolder())
@click.option(
    "--cluster", "site", default="plain", show_default=True, metavar="SITE", help="The site they are for."
)
def scripts_command(folder: Path, site: str) -> None:
    """Write pretrain, finetune, pack, evaluate and release.sbatch for SITE into DIR, to be used with sbatch."""
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
        # A job that waits for others may read what those have yet to write.
        waits = more.get("after") is not None or more.get("singleton", False)
        name = _check_command(command, see_data=not (given["unseen_data"] or waits))
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


def _check_command(words: Sequence[str], *, see_data: bool) -> str:
    """Parses another command's line without running it; returns the name of its job, such as evaluate-probe.

    Args:
        see_data: whether this machine sees the files and folders that the line names. They are then checked as the
            command itself does first.

    Raises:
        UserError: for a command that does not exist, lacks its subcommand or is not submitted, and a missing input.
        click.UsageError: for a mistake in its arguments.
    """
    from uniemox_dist.cli.inputs import UNSEEN, Checked
    from uniemox_dist.cli.main import COMMANDS, uniemox
    from uniemox_dist.core.errors import UserError

    submitted = ", ".join(name for name in COMMANDS if name not in NOT_SUBMITTED)
    if words[0] not in COMMANDS:
        near = get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands are {submitted}"
        raise UserError(f"-- {words[0]}: neither a command of uniemox nor a recipe; {hint}")
    if words[0] in NOT_SUBMITTED:
        raise UserError(f"{words[0]}: is not submitted as a job; call `uniemox {words[0]}` here")
    context = uniemox.make_context("uniemox", list(words))
    context.meta[UNSEEN] = not see_data
    command: click.Command = uniemox
    names: list[str] = []
    rest = list(words)
    while isinstance(command, click.Group):
        if not rest:
            known = ", ".join(command.list_commands(context))
            raise UserError(f"-- {' '.join(words)}: names no command of {names[-1]}; give one of {known}")
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command = found
        names.append(name or "")
        if isinstance(command, click.Group) and not rest:
            continue
        context = command.make_context(names[-1], list(rest), parent=context)
    if see_data and isinstance(command, Checked):
        command.check(context)
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
