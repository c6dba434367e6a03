"""`uniemox evaluate …`."""

from pathlib import Path

import click


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
    from uniemox_dist.evaluate.run import print_table, run
    from uniemox_dist.runtime.files import write_json

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
