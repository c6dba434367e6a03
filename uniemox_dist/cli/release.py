"""`uniemox release`."""

from pathlib import Path

import click

from uniemox_dist.cli.inputs import Checked, InputFile, LocalFolder


def _check(context: click.Context) -> None:
    from uniemox_dist.release.format import check_run, read_release

    run, out = context.params["run"], context.params["out"]
    if context.params["inspect"] or context.params["verify"]:
        read_release(run)
        return
    if out is None:
        raise click.UsageError("Missing argument 'OUT'.", context)
    check_run(run)


@click.command(cls=Checked, check=_check)
@click.argument("run", type=LocalFolder())
@click.argument("out", type=LocalFolder(), required=False)
@click.option(
    "--step",
    default="last",
    metavar="N|best|last",
    help="Which checkpoint: the newest sound one (last); the one with the lowest mean loss over the run.save_every "
    "steps before it (best); or a step.",
)
@click.option(
    "--ema", is_flag=True, help="Release the moving average of the encoder's weights (optim.ema_decay)."
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
    help="Number format of the weights.",
)
@click.option("--onnx", is_flag=True, help="Also write the encoder as ONNX, and compare it with torch.")
@click.option(
    "--evaluation",
    type=InputFile("write it with `uniemox evaluate protocol … --json`"),
    help="Result of `uniemox evaluate protocol --json` for the model card. [default: RUN/evaluation.json, if it is "
    "of that step]",
)
@click.option(
    "--overlap",
    type=InputFile("write it with `uniemox shards overlap`"),
    help="File of `uniemox shards overlap` with the training data and benchmarks; the model card states the overlap "
    "with each test split.",
)
@click.option(
    "--licence", "--license", metavar="ID", help="Licence of the weights for the model card: apache-2.0, …"
)
@click.option("--inspect", is_flag=True, help="Only describe the release in RUN.")
@click.option("--verify", is_flag=True, help="Only check the release in RUN: hashes, weights, settings.")
def release(run: Path, out: Path | None, inspect: bool, verify: bool, **options: object) -> None:
    """Write consolidated, documented weights of RUN (a run's folder, or one of its checkpoints) to OUT.

    With --inspect or --verify, RUN is a release.
    """
    if inspect or verify:
        from uniemox_dist.release.verify import check, describe

        if out is not None:
            raise click.UsageError("--inspect and --verify take one folder, a release")
        if inspect:
            click.echo("\n".join(describe(run)))
        if verify:
            click.echo(f"{run}: {check(run)} tensors, all files are as SHA256SUMS says, all weights finite")
        return
    if out is None:
        raise click.UsageError("Missing argument 'OUT'.")
    from uniemox_dist.core.errors import UserError
    from uniemox_dist.core.files import check_output
    from uniemox_dist.core.formatting import millions
    from uniemox_dist.release.export import release as write

    if options["licence"] == "":
        raise UserError("--licence is empty; give an identifier such as apache-2.0, or leave it out")
    if not out.exists():  # otherwise `write` refuses it
        check_output(out / "README.md", "OUT")
    facts = write(run, out, **options)  # type: ignore[arg-type]
    click.echo(
        f"{out}: encoder of {millions(facts['parameters'])} parameters at step {facts['step']}, "
        "every tensor compared with the checkpoint"
    )
    if "onnx" in facts:
        click.echo(
            f"  encoder.onnx: differs from torch by {facts['onnx']['differs_by']:.1g} standard deviations"
        )
    click.echo(f'  timm.create_model("local-dir:{out}", pretrained=True, num_classes=0)')
