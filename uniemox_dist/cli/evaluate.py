"""`uniemox evaluate …`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

FILE = click.Path(path_type=Path)


@click.group()
def evaluate() -> None:
    """Measure a release on held-out shards."""


@evaluate.command("protocol")
@click.argument("release", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--train",
    "train_split",
    default="train",
    show_default=True,
    help="Split of DATA that baselines learn from.",
)
@click.option("--test", "test_split", default="test", show_default=True, help="Held-out split of DATA.")
@click.option("--teacher", "teacher_name", help="Where the teacher lies now, if not where the recipe said.")
@click.option(
    "--group-by", default="family", show_default=True, help="Attribute whose samples are resampled together."
)
@click.option(
    "--valence", default="polarity", show_default=True, help="Attribute that holds a valence, if any does."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the table there too.")
@click.option(
    "--scores", "scores_file", type=click.Path(path_type=Path), help="Write every picture's scores there."
)
def protocol_command(
    release: Path,
    data: Path,
    train_split: str,
    test_split: str,
    teacher_name: str | None,
    group_by: str,
    valence: str,
    json_file: Path | None,
    scores_file: Path | None,
) -> None:
    """Measures RELEASE on DATA/test beside an untrained student, the teacher and trivial baselines.

    Masked error, caption retrieval, cosine to the teacher, linear probe; 95 % intervals by bootstrap over groups
    of look-alikes; and a verdict that says what was not beaten.
    """
    from uniemox_dist.core.files import write_json
    from uniemox_dist.core.outputs import check_output
    from uniemox_dist.evaluate.run import print_table, run

    check_output(json_file, "--json")
    check_output(scores_file, "--scores")
    result = run(
        release,
        data / train_split,
        data / test_split,
        teacher_name=teacher_name,
        group_by=group_by or None,
        valence=valence,
        scores_file=scores_file,
    )
    print_table(result)
    if json_file is not None:
        write_json(json_file, result)
        click.echo(f"written to {json_file}")


@evaluate.command("gallery")
@click.argument("release", type=FILE)
@click.argument("data")
@click.option(
    "--out", type=FILE, required=True, help="A JSON; as RUN/gallery.json it goes into the run's report."
)
@click.option("--teacher", "teacher_name", help="Where the teacher lies now, if not where the recipe said.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …")
def gallery_command(release: Path, data: str, out: Path, teacher_name: str | None, device: str) -> None:
    """Looks at pictures of DATA, one data set, for the report: a map, neighbours, zero-shot answers, attention."""
    from uniemox_dist.core.files import write_json
    from uniemox_dist.core.outputs import check_output
    from uniemox_dist.evaluate.device import device_of
    from uniemox_dist.evaluate.gallery import gallery

    check_output(out, "--out")
    found = gallery(release, data, teacher_name=teacher_name, device=device_of(device))
    write_json(out, found)
    click.echo(f"{out}: {len(found['pictures'])} pictures")


def shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments and options that the four tasks have in common."""
    options = [
        click.argument("release"),
        click.argument("data"),
        click.option("--test", metavar="NAME", help="Held-out split of DATA. [default: test]"),
        click.option(
            "--baselines",
            default="",
            metavar="A,B",
            help="Rows beside the release: untrained, teacher, histogram, pixels.",
        ),
        click.option(
            "--teacher", "teacher_name", help="Where the teacher lies now, if not where the recipe said."
        ),
        click.option(
            "--group-by",
            default="family",
            show_default=True,
            help="Attribute whose samples are look-alikes: drawn together for intervals, on one side of a fold.",
        ),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …"),
        click.option("--workers", default=0, show_default=True, help="Processes that decode pictures."),
        click.option("--json", "json_file", type=FILE, help="Write everything there too."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def classifying(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of tasks that name classes."""
    return click.option("--confusion", type=FILE, help="Write the confusion matrix there, a PNG.")(command)


def learning(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of tasks that learn from a training split."""
    command = click.option(
        "--val", metavar="NAME", help="Split to choose on. [default: val, or a fifth of train]"
    )(command)
    return click.option("--train", metavar="NAME", help="Split to learn from. [default: train]")(command)


@evaluate.command("knn")
@shared
@learning
@classifying
def knn_command(**given: Any) -> None:
    """k nearest neighbours by cosine, over the encoder's features; k is chosen on validation."""
    _run("knn", **given)


@evaluate.command("probe")
@shared
@learning
@classifying
def probe_command(**given: Any) -> None:
    """A linear classifier over the encoder's features (L-BFGS); its penalty is chosen on validation."""
    _run("probe", **given)


@evaluate.command("zeroshot")
@shared
@classifying
@click.option(
    "--template",
    "templates",
    multiple=True,
    metavar="TEXT",
    help="Text of a label, with {} for its name; several are averaged.",
)
@click.option("--labels", default="", metavar="A,B", help="The classes. [default: the test split's]")
def zeroshot_command(labels: str, **given: Any) -> None:
    """Pictures against the teacher's texts of labels, in the fused space; nothing is learned from DATA."""
    names = [name.strip() for name in labels.split(",") if name.strip()]
    _run("zeroshot", labels=names, **given)


@evaluate.command("retrieval")
@shared
def retrieval_command(**given: Any) -> None:
    """Captions of pictures and pictures of captions, in the fused space: R@1, R@5, R@10."""
    _run("retrieval", **given)


def _run(
    task: str,
    *,
    release: str,
    data: str,
    baselines: str,
    json_file: Path | None,
    device: str,
    group_by: str,
    confusion: Path | None = None,
    **given: Any,
) -> None:
    from uniemox_dist.core.files import write_json
    from uniemox_dist.core.outputs import check_output
    from uniemox_dist.evaluate import measure
    from uniemox_dist.evaluate.device import device_of

    check_output(confusion, "--confusion", ".png")
    check_output(json_file, "--json")
    result = measure.measure(
        task,
        release,
        data,
        splits={role: given.pop(role, None) for role in ("train", "val", "test")},
        baselines=measure.baselines_of(baselines),
        device=device_of(device),
        group_by=group_by or None,
        **given,
    )
    measure.print_result(result)
    for remark in measure.remarks(result):
        click.echo(f"uniemox: warning: {remark}", err=True)
    if confusion is not None:
        measure.write_confusion(result, confusion)
        click.echo(f"written to {confusion}")
    if json_file is not None:
        write_json(json_file, result)
        click.echo(f"written to {json_file}")
