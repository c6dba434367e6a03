"""Shared code of `uniemox pretrain` and `uniemox finetune`: the process is either one rank of a run, or starts the
ranks of this machine."""

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from uniemox_dist.core.errors import missing_extra

if TYPE_CHECKING:
    from uniemox_dist.config.schema import Config
    from uniemox_dist.distributed.local_launcher import Signals


@dataclass(frozen=True)
class Command:
    """A command that trains."""

    name: str
    load: "Callable[[str, Sequence[str]], Config]"
    """Loads the configuration from a recipe and KEY=VALUE pairs; raises UserError, also for another command's
    recipe."""
    check: "Callable[[Config, int], None]"
    """Checks the settings for a number of ranks before any rank starts."""
    train: "Callable[[], Callable[..., int]]"
    """Imports and returns the function that trains with a configuration and a world (keywords as in
    `train.loop.train`)."""


def training_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the arguments and options of a command that trains."""
    for add in (
        click.option(
            "--dry-run",
            is_flag=True,
            help="Print the resolved configuration, check that data on stores exist, and stop.",
        ),
        click.option(
            "--resume",
            default="auto",
            show_default=True,
            help="auto, never, or a checkpoint's or run's folder.",
        ),
        click.option("--nproc", type=click.IntRange(1), help="Start this many ranks on this machine."),
        click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]..."),
        click.argument("recipe"),
    ):
        function = add(function)
    return function


def run(
    command: Command, recipe: str, overrides: Sequence[str], nproc: int | None, resume: str, *, dry_run: bool
) -> int:
    """Runs a command; returns the exit code."""
    if dry_run:  # also in a batch script, whose variables describe ranks that do not exist there
        from uniemox_dist.config.load import dump_yaml

        config = command.load(recipe, overrides)
        click.echo(dump_yaml(config), nl=False)
        _find_remote_data(config)
        return 0
    from uniemox_dist.distributed.world import World

    world = World.from_env(meets=nproc is None)  # with --nproc this launcher gives its ranks an address
    # Install the handlers first: a signal during start-up must count.
    if nproc is not None and world.size == 1:
        from uniemox_dist.distributed.local_launcher import Signals

        with Signals() as signals:
            return _launch(command, recipe, overrides, nproc, resume, signals)
    if nproc is not None:
        world = World.from_env()
    from uniemox_dist.core.signals import StopFlag, stop_with_launcher

    stop = StopFlag().install()
    stop.watch_time_limit()
    stop_with_launcher()
    from uniemox_dist.core.errors import LostPeer, describe_lost_contact, is_lost_contact
    from uniemox_dist.core.imports import collection_paused
    from uniemox_dist.runs.folder import RunFolder
    from uniemox_dist.runs.rank_output import main_log

    config = command.load(recipe, overrides)
    main_log.redirect_output(RunFolder(Path(config.run.dir) / config.run.name), world)
    with collection_paused():
        train = command.train()
    gc.freeze()  # later collections need not traverse what the imports created
    from uniemox_dist.distributed import collectives
    from uniemox_dist.train.startup import StartupTimer

    try:
        return train(config, world, resume=resume, stop=stop, timer=StartupTimer())
    except RuntimeError as error:
        if not is_lost_contact(str(error)):
            raise
        raise LostPeer(f"rank {world.rank} {describe_lost_contact(str(error))}") from None
    finally:
        collectives.close()


def _find_remote_data(config: "Config") -> None:
    """Checks that the data sets on stores exist. Local ones may be on the nodes of a cluster only.

    Raises:
        UserError: naming the one that does not exist.
    """
    from uniemox_dist.core.files import is_remote
    from uniemox_dist.data.sources import list_places

    for path, field in list_places(config):
        if is_remote(path):
            from shards.format.manifest import find_manifest

            find_manifest(path, field)


def _launch(
    command: Command, recipe: str, overrides: Sequence[str], nproc: int, resume: str, signals: "Signals"
) -> int:
    """Starts the ranks of this machine, and restarts them after faults; a signal before that ends it. It does not
    import torch, which would take as long as the imports of a rank."""
    if find_spec("torch") is None:  # reported once, instead of by each rank
        raise missing_extra("torch", "train")
    from launch.restarts import exit_after_stop, find_newest_step, run_with_restarts
    from uniemox_dist.runs.folder import RunFolder

    config = command.load(recipe, overrides)
    folder = RunFolder(Path(config.run.dir) / config.run.name)

    def rank() -> list[str]:
        # --resume applies to the first attempt only: once the run has its own checkpoint, it resumes that.
        began = find_newest_step(folder) != before
        how = "auto" if began else resume
        return [sys.executable, "-m", "uniemox_dist.cli", command.name, recipe, *overrides, "--resume", how]

    before = find_newest_step(folder)
    if signals.received:
        return exit_after_stop(folder, signals)
    command.check(config, nproc)
    if signals.received:
        return exit_after_stop(folder, signals)
    return run_with_restarts(
        rank,
        nproc,
        folder,
        signals,
        max_restarts=config.run.max_restarts,
        gpus=True,
    )
