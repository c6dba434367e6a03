"""`uniemox embed`, `uniemox predict`, `uniemox reconstruct`."""

from pathlib import Path

import click

from uniemox_dist.cli.inputs import InputFile, InputPath, OutputFile, Release
from uniemox_dist.cli.pack import NamesOption, layouts

MOST_NAMED = 5
"""Unreadable pictures that are named on the terminal."""
INPUT = InputPath("give a picture, a folder, a table, tars or packed shards")
DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …")
WORKERS = click.option(
    "--workers", type=click.IntRange(0), default=1, show_default=True, help="Processes that decode pictures."
)
LAYOUT = click.option(
    "--layout",
    cls=NamesOption,
    names=layouts,
    help="Layout of INPUT, if its name does not show it. One of:",
)


@click.command()
@click.argument("source", metavar="INPUT", type=INPUT)
@click.argument("out", type=OutputFile())
@click.option(
    "--release", "release", type=Release(), required=True, help="A folder that `uniemox release` wrote."
)
@click.option(
    "--space",
    type=click.Choice(["encoder", "fused"]),
    default="encoder",
    show_default=True,
    help="The encoder's class tokens, or unit rows in the teacher's space.",
)
@LAYOUT
@click.option(
    "--batch", type=click.IntRange(1), default=64, show_default=True, help="Pictures per forward pass."
)
@WORKERS
@DEVICE
def embed(
    source: str,
    out: Path,
    release: Path,
    space: str,
    layout: str | None,
    batch: int,
    workers: int,
    device: str,
) -> None:
    """Embed pictures: INPUT is a picture, a folder, a table, tars or packed shards; OUT a Parquet file.

    A picture that cannot be read has a row with the reason. The same command continues after a kill.
    """
    from uniemox_dist.inference.embed import embed as write
    from uniemox_dist.release.load import check_device

    found = write(
        source,
        out,
        release,
        space=space,
        layout=layout,
        batch=batch,
        workers=workers,
        device=check_device(device),
    )
    click.echo(f"{out}: {found.rows - found.failed:,} embedded, {found.failed:,} failed")
    for name, reason in found.reasons:
        click.echo(f"  {name}: {reason}")
    if found.failed > len(found.reasons):
        click.echo(f"  … all are in the column `error` of {out}")


@click.command()
@click.argument("model", type=Release(classifier=True))
@click.argument("source", metavar="INPUT", type=INPUT)
@click.option("--labels", default="", metavar="A,B", help="Zero-shot: the emotions to choose from.")
@click.option(
    "--template", "templates", multiple=True, metavar="TEXT", help="Text of a label, with {} for its name."
)
@click.option(
    "--teacher", "teacher_name", help="The teacher's folder or name, if it has moved since training."
)
@click.option(
    "--texts",
    type=InputFile("write it with `uniemox predict … --save-texts`"),
    help="Zero-shot without a teacher: a file that --save-texts wrote.",
)
@click.option("--save-texts", type=OutputFile(), help="Write the embedded labels to this file, for --texts.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["json", "csv"]),
    default="json",
    show_default=True,
    help="Format of the lines.",
)
@click.option("--top", type=click.IntRange(1), help="List only this many labels of a picture (JSON).")
@LAYOUT
@click.option(
    "--batch", type=click.IntRange(1), default=32, show_default=True, help="Pictures per forward pass."
)
@click.option(
    "--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that decode pictures."
)
@DEVICE
def predict(
    model: Path,
    source: str,
    labels: str,
    templates: tuple[str, ...],
    teacher_name: str | None,
    texts: Path | None,
    save_texts: Path | None,
    kind: str,
    top: int | None,
    layout: str | None,
    batch: int,
    workers: int,
    device: str,
) -> None:
    """Print the emotions of each picture of INPUT with probabilities, one line per picture.

    MODEL is a fine-tuned classifier, or a release; a release needs --labels (and its teacher), or --texts.
    """
    from uniemox_dist.core.errors import UserError
    from uniemox_dist.inference import predict as prediction
    from uniemox_dist.inference.inputs import Pictures, none_readable
    from uniemox_dist.release.format import is_classifier
    from uniemox_dist.release.load import check_device

    device = check_device(device)
    names = [name.strip() for name in labels.split(",") if name.strip()]
    if save_texts is not None and not names:
        raise UserError(f"--save-texts={save_texts}: writes the texts of --labels; give --labels, too")
    classifies = is_classifier(model)
    if classifies or texts is not None:
        source_of_labels = f"MODEL={model}" if classifies else f"--texts={texts}"
        for option, given in (("--template", templates), ("--teacher", teacher_name)):
            if given:
                raise UserError(
                    f"{option}: has no effect, because {source_of_labels} states its labels; leave it out"
                )
    if top is not None and kind == "csv":
        raise UserError(f"--top={top}: has no effect on CSV, which has a column for each label; leave it out")
    if classifies:
        if names or texts:
            raise UserError(f"MODEL={model}: has labels of its own; leave out --labels and --texts")
        predictor = prediction.load_classifier_predictor(model, device)
    elif texts is not None:
        if names:
            raise UserError("--texts, --labels: give one of them")
        predictor = prediction.load_zeroshot_predictor(model, prediction.load_texts(texts), device)
    elif names:
        found = prediction.embed_labels(model, names, templates, teacher_name)
        if save_texts is not None:
            prediction.save_texts(found, save_texts)
        predictor = prediction.load_zeroshot_predictor(model, found, device)
    else:
        raise UserError(
            f"MODEL={model}: is not a classifier; give --labels a,b,c (or --texts) for zero-shot prediction"
        )
    pictures = Pictures(source, layout)
    if kind == "csv":
        click.echo(prediction.format_csv(None, predictor))
    failed: list[tuple[str, str]] = []
    for line in prediction.predict(predictor, pictures, batch=batch, workers=workers):
        if "error" in line:
            failed.append((line["picture"], line["error"]))
        click.echo(
            prediction.format_csv(line, predictor) if kind == "csv" else prediction.format_json(line, top)
        )
    if len(failed) == len(pictures):
        raise none_readable(f"INPUT={source}", len(failed), failed)
    if failed:
        click.echo(f"uniemox: warning: {len(failed)} of {len(pictures)} pictures cannot be read", err=True)


@click.command()
@click.argument("release", type=Release())
@click.argument("pictures", nargs=-1, required=True, type=INPUT)
@click.argument("out", type=OutputFile(".png"))
@click.option("--mask-ratio", type=float, help="Share of masked patches. [default: as in training]")
@click.option("--seed", default=0, show_default=True, help="Seed of the masks.")
def reconstruct(
    release: Path, pictures: tuple[str, ...], out: Path, mask_ratio: float | None, seed: int
) -> None:
    """Mask pictures (files or folders), reconstruct them with RELEASE, and write a grid to OUT, a PNG."""
    from uniemox_dist.core.formatting import counted
    from uniemox_dist.inference.reconstruct import reconstruct as write

    count, problems = write(release, pictures, out, mask_ratio=mask_ratio, seed=seed)
    click.echo(f"{out}: {counted(count, 'picture')}: original, masked, reconstructed")
    for name, reason in problems[:MOST_NAMED]:
        click.echo(f"uniemox: warning: {name}: {reason}", err=True)
    if problems:
        total = count + len(problems)
        click.echo(f"uniemox: warning: {len(problems)} of {total} pictures cannot be read", err=True)
