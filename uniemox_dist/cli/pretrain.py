"""`uniemox pretrain`."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from uniemox_dist.cli.training import Command, run, training_options

if TYPE_CHECKING:
    from uniemox_dist.config.schema import Config


@click.command()
@training_options
def pretrain(recipe: str, overrides: tuple[str, ...], nproc: int | None, resume: str, dry_run: bool) -> int:
    """Pretrain a student by RECIPE (a YAML file or a shipped name), with KEY=VALUE pairs on top.

    Inside srun or torchrun this is one rank; with --nproc it starts the ranks of this machine. The same command
    again resumes the newest complete checkpoint.
    """
    return run(COMMAND, recipe, overrides, nproc, resume, dry_run=dry_run)


def _load(recipe: str, overrides: Sequence[str]) -> "Config":
    from uniemox_dist.config.load import load_config, require_pretraining

    return require_pretraining(load_config(recipe, overrides))


def _train() -> Callable[..., int]:
    from uniemox_dist.train.pretrain import pretrain as train

    return train


def _check(config: "Config", nproc: int) -> None:
    from uniemox_dist.data.sources import Sources
    from uniemox_dist.train.schedule import Schedule

    config.batch.grad_accum(nproc)
    sources = Sources(config)
    _ = sources.plan  # checks that every source gets a stream
    Schedule.from_config(config, sources.epoch_samples)
    if config.teacher.source == "cache":
        from uniemox_dist.teacher.view_selection import select_views

        select_views(config, sources.readers)


COMMAND = Command("pretrain", _load, lambda config, nproc: _check(config, nproc), _train)
