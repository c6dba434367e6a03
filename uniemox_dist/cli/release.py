"""`uniemox release`."""

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--ema", is_flag=True, help="The encoder's moving average (optim.ema_decay) instead of its weights."
)
def release(run: Path, out: Path, ema: bool) -> None:
    """Writes consolidated, documented weights of RUN (a run's folder, or one of its checkpoints) to OUT."""
    from uniemox_dist.release.export import release as write

    facts = write(run, out, ema=ema)
    click.echo(
        f"{out}: encoder of {facts['parameters'] / 1e6:.1f} M parameters at step {facts['step']}, "
        "every tensor compared with the checkpoint"
    )
    click.echo(f'  timm.create_model("local-dir:{out}", pretrained=True, num_classes=0)')
