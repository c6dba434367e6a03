"""`uniemox report`. Torch-free."""

from pathlib import Path

import click

from uniemox_dist.cli.inputs import InputFile, OutputFile
from uniemox_dist.cli.one_run import RunPath


@click.command()
@click.argument("run", type=RunPath())
@click.option(
    "--evaluation",
    type=InputFile("write it with `uniemox evaluate protocol … --json`"),
    help="Evaluation to show; default RUN/evaluation.json.",
)
@click.option("--out", type=OutputFile(), help="File to write; default RUN/report.html.")
def report(run: Path, evaluation: Path | None, out: Path | None) -> None:
    """Write one self-contained HTML page about RUN (a run's folder): curves, pictures, evaluation, events.

    The run may still train; write the page again for its newest state.
    """
    from uniemox_dist.core.formatting import size
    from uniemox_dist.runs.jobs import read_jobs
    from uniemox_dist.runs.report.page import write_report
    from uniemox_dist.scheduler.commands import JobQueries

    # If squeue does not answer, the state is determined from the folder only.
    answers = JobQueries().query([job.id for job in read_jobs(run)])
    path = write_report(run, evaluation, out, answers)
    click.echo(f"{path}: {size(path.stat().st_size)}, open it in a browser")
