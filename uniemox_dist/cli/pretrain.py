"""`uniemox pretrain`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from launch.local import Signals
    from uniemox_dist.config.schema import Config


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--nproc", type=click.IntRange(1), help="Start this many ranks on this machine.")
@click.option(
    "--resume", default="auto", show_default=True, help="auto, never, or a checkpoint's or run's folder."
)
@click.option("--dry-run", is_flag=True, help="Print the resolved configuration and stop.")
def pretrain(recipe: str, overrides: tuple[str, ...], nproc: int | None, resume: str, dry_run: bool) -> int:
    """Pretrains a student by RECIPE (a YAML file or a shipped name), with KEY=VALUE pairs on top.

    Inside srun or torchrun this is one rank; with --nproc it starts the ranks of this machine. The same command
    again goes on from the newest complete checkpoint.
    """
    if dry_run:  # also in a batch script, whose variables tell of ranks that do not meet there
        from uniemox_dist.config.load import dump_yaml, load_config

        click.echo(dump_yaml(load_config(recipe, overrides)), nl=False)
        return 0
    from uniemox_dist.runtime.world import World

    world = World.from_env(meets=nproc is None)  # its ranks get a place to meet from this launcher
    # Signals are minded before anything else is done: one that comes in the seconds of start-up is no less meant.
    if nproc is not None and world.size == 1:
        from launch.local import Signals

        with Signals() as signals:
            return _launch(recipe, overrides, nproc, resume, signals)
    if nproc is not None:
        world = World.from_env()
    from uniemox_dist.runtime.signals import StopFlag, stop_with_launcher

    stop = StopFlag().install()
    stop.mind_limit()
    stop_with_launcher()
    from uniemox_dist.config.load import load_config
    from uniemox_dist.runtime.errors import LostPeer
    from uniemox_dist.runtime.rank_output import main_log
    from uniemox_dist.runtime.run_folder import RunFolder

    config = load_config(recipe, overrides)
    main_log.leave(RunFolder(Path(config.run.dir) / config.run.name), world)
    from uniemox_dist.train import comm
    from uniemox_dist.train.loop import pretrain as run
    from uniemox_dist.train.started import Started

    try:
        return run(config, world, resume=resume, stop=stop, started=Started())
    except RuntimeError as error:
        if not comm.is_lost_peer(error):
            raise
        raise LostPeer(f"rank {world.rank} ends: another rank is gone; its own message says why") from None
    finally:
        comm.close()


def _launch(recipe: str, overrides: Sequence[str], nproc: int, resume: str, signals: "Signals") -> int:
    """Starts the ranks of this machine, and again after faults; a signal before that ends it."""
    from launch.restarts import newest_step, run_with_restarts, stopped
    from uniemox_dist.config.load import load_config
    from uniemox_dist.runtime.run_folder import RunFolder

    config = load_config(recipe, overrides)
    folder = RunFolder(Path(config.run.dir) / config.run.name)

    def command() -> list[str]:
        # What --resume said is done with as soon as the run has a checkpoint of its own, made by an attempt before.
        began = newest_step(folder) != before
        how = "auto" if began else resume
        return [sys.executable, "-m", "uniemox_dist.cli", "pretrain", recipe, *overrides, "--resume", how]

    before = newest_step(folder)
    if signals.received:
        return stopped(folder, signals)
    _check(config, nproc)
    if signals.received:
        return stopped(folder, signals)
    import torch

    # A signal during that import is obeyed before any rank starts.
    return run_with_restarts(
        command,
        nproc,
        folder,
        signals,
        max_restarts=config.run.max_restarts,
        gpus=torch.cuda.is_available(),
    )


def _check(config: "Config", nproc: int) -> None:
    """What only the user can mend is said once, before any rank starts."""
    from uniemox_dist.data.sources import Sources
    from uniemox_dist.train.engine import grad_accum
    from uniemox_dist.train.schedule import Schedule

    grad_accum(config, nproc)
    sources = Sources(config)
    sources.plan(config)
    Schedule.of(config, sources.epoch_samples(config))
    if config.teacher.source == "cache":
        from uniemox_dist.teach.replay import find

        find(config, sources.readers)
