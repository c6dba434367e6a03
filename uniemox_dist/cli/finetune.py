"""`uniemox finetune`."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from uniemox_dist.cli.training import Command, run, training_options

if TYPE_CHECKING:
    from uniemox_dist.config.schema import Config


@click.command()
@training_options
def finetune(recipe: str, overrides: tuple[str, ...], nproc: int | None, resume: str, dry_run: bool) -> int:
    """Fine-tune an encoder on labelled shards by RECIPE (a YAML file or a shipped name), with KEY=VALUE pairs on top.

    data.path=DATA has the splits train, val and test; model.init_from=RELEASE is the encoder to start from. The best
    weights by validation are written to RUN/best, for timm, and the metrics to RUN/finetune.json. Inside srun this is
    one rank;
    with --nproc it starts the ranks of this machine. The same command again resumes the newest complete checkpoint.
    """
    return run(COMMAND, recipe, overrides, nproc, resume, dry_run=dry_run)


def _load(recipe: str, overrides: Sequence[str]) -> "Config":
    from uniemox_dist.config.load import load_config, require_finetuning

    return require_finetuning(load_config(recipe, overrides))


def _train() -> Callable[..., int]:
    from uniemox_dist.train.finetune.build import finetune as train

    return train


def _check(config: "Config", nproc: int) -> None:
    from uniemox_dist.config.load import require_finetuning
    from uniemox_dist.data.splits import make_train_sources, open_splits
    from uniemox_dist.train.schedule import Schedule

    config = require_finetuning(config)
    config.batch.grad_accum(nproc)
    sources = make_train_sources(config, open_splits(config))
    _ = sources.plan  # checks that every source gets a stream
    Schedule.from_config(config, sources.epoch_samples)


COMMAND = Command("finetune", _load, _check, _train)
