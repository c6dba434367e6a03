"""`uniemox evaluate …`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from uniemox_dist.cli.inputs import Checked, OutputFile, Release
from uniemox_dist.evaluate.intervals import LOOK_ALIKES

DEVICE_HELP = "auto, cpu, cuda, cuda:1, …"
TEACHER = click.option(
    "--teacher", "teacher_name", help="The teacher's folder or name, if it has moved since training."
)
GROUP_BY = click.option(
    "--group-by",
    default=LOOK_ALIKES,
    show_default=True,
    help="Attribute that names groups of look-alikes: resampled together, and kept in one fold.",
)
WORKERS = click.option(
    "--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that decode pictures."
)
DEVICE = click.option("--device", default="auto", show_default=True, help=DEVICE_HELP)


def _check_splits(*wanted: str) -> Callable[[click.Context], None]:
    """A check of DATA for the splits of these roles."""

    def check(context: click.Context) -> None:
        from uniemox_dist.evaluate.inputs import open_splits

        given = context.params
        open_splits(given["data"], {role: given.get(role) for role in wanted}, wanted)

    return check


def _check_data_set(context: click.Context) -> None:
    from shards.format.manifest import read_manifest

    read_manifest(context.params["data"], "DATA")


@click.group()
def evaluate() -> None:
    """Measure a release on held-out shards."""


@evaluate.command("protocol", cls=Checked, check=_check_splits("train", "test"))
@click.argument("release", type=Release())
@click.argument("data")
@click.option(
    "--train", default="train", show_default=True, help="Split of DATA that probes and baselines learn from."
)
@click.option("--test", default="test", show_default=True, help="Held-out split of DATA.")
@TEACHER
@GROUP_BY
@click.option("--valence", default="polarity", show_default=True, help="Attribute that holds a valence.")
@click.option("--device", default="cpu", show_default=True, help=DEVICE_HELP)
@WORKERS
@click.option("--json", "json_file", type=OutputFile(), help="Also write the table to this file.")
@click.option(
    "--scores", "scores_file", type=OutputFile(), help="Write the scores of every picture to this file."
)
def protocol_command(
    release: Path,
    data: str,
    train: str,
    test: str,
    group_by: str,
    device: str,
    json_file: Path | None,
    scores_file: Path | None,
    **given: Any,
) -> None:
    """Measure RELEASE on DATA/test beside an untrained student, the teacher and trivial baselines.

    Metrics: masked error, caption retrieval, cosine to the teacher, linear probe. 95 % intervals by bootstrap over
    groups of look-alikes. A verdict names the rows that the student beats, ties with and loses to.
    """
    from uniemox_dist.core.files import write_json
    from uniemox_dist.evaluate.protocol import print_table, run
    from uniemox_dist.release.load import check_device

    result = run(
        release,
        data,
        splits={"train": train, "test": test},
        group_by=group_by or None,
        scores_file=scores_file,
        device=check_device(device),
        **given,
    )
    print_table(result)
    if json_file is not None:
        write_json(json_file, result)
        click.echo(f"written to {json_file}")


@evaluate.command("gallery", cls=Checked, check=_check_data_set)
@click.argument("release", type=Release())
@click.argument("data")
@click.option(
    "--out",
    type=OutputFile(),
    required=True,
    help="JSON file; RUN/gallery.json is shown in the run's report.",
)
@TEACHER
@DEVICE
@WORKERS
def gallery_command(release: Path, data: str, out: Path, device: str, **given: Any) -> None:
    """Write pictures of DATA, one data set, for the report: a map, neighbours, zero-shot answers, attention."""
    from uniemox_dist.core.files import write_json
    from uniemox_dist.evaluate.gallery import gallery
    from uniemox_dist.release.load import check_device

    found = gallery(release, data, device=check_device(device), **given)
    write_json(out, found)
    click.echo(f"{out}: {len(found['pictures'])} pictures")


def shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the arguments and options that all single tasks share."""
    options = [
        click.argument("release", type=Release(timm=True)),
        click.argument("data"),
        click.option("--test", metavar="NAME", help="Held-out split of DATA. [default: test]"),
        click.option(
            "--baselines",
            default="",
            metavar="A,B",
            help="Rows beside the release: untrained, teacher, histogram, pixels.",
        ),
        TEACHER,
        GROUP_BY,
        DEVICE,
        WORKERS,
        click.option("--json", "json_file", type=OutputFile(), help="Also write all results to this file."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def classifying(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of tasks with named classes."""
    return click.option(
        "--confusion", type=OutputFile(".png"), help="Write the confusion matrix to this PNG file."
    )(command)


def learning(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of tasks that learn from a training split."""
    command = click.option(
        "--val",
        metavar="NAME",
        help="Split to choose the hyperparameter on. [default: cross-validation on the training split]",
    )(command)
    return click.option("--train", metavar="NAME", help="Split to learn from. [default: train]")(command)


@evaluate.command("knn", cls=Checked, check=_check_splits("train", "val", "test"))
@shared
@learning
@classifying
def knn_command(**given: Any) -> None:
    """Classify by k nearest neighbours, by cosine on the encoder's features; k is chosen by cross-validation."""
    _run("knn", **given)


@evaluate.command("probe", cls=Checked, check=_check_splits("train", "val", "test"))
@shared
@learning
@classifying
def probe_command(**given: Any) -> None:
    """Classify by logistic regression on the encoder's features; its penalty is chosen by cross-validation."""
    _run("probe", **given)


@evaluate.command("distribution", cls=Checked, check=_check_splits("train", "val", "test"))
@shared
@learning
def distribution_command(**given: Any) -> None:
    """Predict distributions over labels by logistic regression on the encoder's features.

    The penalty is chosen by cross-validation. Measures are KL divergence, Chebyshev, Clark, Canberra, cosine and
    intersection.
    """
    _run("distribution", **given)


@evaluate.command("regress", cls=Checked, check=_check_splits("train", "test"))
@shared
@click.option("--train", metavar="NAME", help="Split to learn from. [default: train]")
@click.option(
    "--attribute",
    "attributes",
    multiple=True,
    metavar="NAME",
    help="Number to predict. [default: valence, arousal and dominance, where samples have them]",
)
def regress_command(**given: Any) -> None:
    """Predict valence, arousal and dominance by ridge regression on the encoder's features."""
    _run("regress", **given)


@evaluate.command("zeroshot", cls=Checked, check=_check_splits("test"))
@shared
@classifying
@click.option(
    "--template",
    "templates",
    multiple=True,
    metavar="TEXT",
    help="Text of a label, with {} for its name; texts of several templates are averaged.",
)
@click.option("--labels", default="", metavar="A,B", help="The classes. [default: the test split's]")
def zeroshot_command(labels: str, **given: Any) -> None:
    """Classify zero-shot: compare pictures with the teacher's texts of labels, in the fused space."""
    names = [name.strip() for name in labels.split(",") if name.strip()]
    _run("zeroshot", labels=names, **given)


@evaluate.command("retrieval", cls=Checked, check=_check_splits("test"))
@shared
def retrieval_command(**given: Any) -> None:
    """Retrieve captions by pictures and pictures by captions, in the fused space: R@1, R@5, R@10."""
    _run("retrieval", **given)


def _run(
    task: str,
    *,
    release: Path | str,
    data: str,
    baselines: str,
    json_file: Path | None,
    device: str,
    group_by: str,
    confusion: Path | None = None,
    **given: Any,
) -> None:
    from uniemox_dist.core.files import write_json
    from uniemox_dist.evaluate import measure
    from uniemox_dist.release.load import check_device

    result = measure.measure(
        task,
        release,
        data,
        splits={role: given.pop(role, None) for role in ("train", "val", "test")},
        baselines=measure.parse_baselines(baselines),
        device=check_device(device),
        group_by=group_by or None,
        **given,
    )
    measure.print_result(result)
    for remark in measure.list_remarks(result):
        click.echo(f"uniemox: warning: {remark}", err=True)
    if confusion is not None:
        measure.write_confusion(result, confusion)
        click.echo(f"written to {confusion}")
    if json_file is not None:
        write_json(json_file, result)
        click.echo(f"written to {json_file}")
