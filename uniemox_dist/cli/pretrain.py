"""`uniemox pretrain`."""

import sys

import click


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
    from uniemox_dist.config.load import dump_yaml, load_config
    from uniemox_dist.runtime.world import World

    config = load_config(recipe, overrides)
    if dry_run:
        click.echo(dump_yaml(config), nl=False)
        return 0
    world = World.from_env()
    if nproc is not None and world.size == 1:
        from launch.local import run_ranks
        from uniemox_dist.data.sources import Sources
        from uniemox_dist.train.engine import grad_accum
        from uniemox_dist.train.schedule import Schedule

        # What only the user can mend is said once here, before any rank starts.
        grad_accum(config, nproc)
        sources = Sources(config)
        sources.plan(config)
        Schedule.of(config, sources.epoch_samples(config))
        if config.teacher.source == "cache":
            from uniemox_dist.teach.replay import find

            find(config, sources.readers)
        import torch

        command = [
            sys.executable,
            "-m",
            "uniemox_dist.cli",
            "pretrain",
            recipe,
            *overrides,
            "--resume",
            resume,
        ]
        return run_ranks(command, nproc, gpus=torch.cuda.is_available())
    from uniemox_dist.runtime.errors import Fault
    from uniemox_dist.train import comm
    from uniemox_dist.train.loop import pretrain as run

    try:
        return run(config, world, resume=resume)
    except RuntimeError as error:
        if not comm.is_lost_peer(error):
            raise
        raise Fault(f"rank {world.rank} ends: another rank is gone; its own message says why") from None
    finally:
        comm.close()
