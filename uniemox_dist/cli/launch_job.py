"""`uniemox launch begin` and `settle`: what a batch script asks before and after its ranks. Hidden."""

import os
import sys
import time
from pathlib import Path

import click


@click.command(hidden=True)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def begin(recipe: str, overrides: tuple[str, ...]) -> int:
    """Takes the run's folder for this Slurm job, and says how many ranks to start.

    Standard input: the lines of `squeue -h -o '%A %T %l'`. Prints RUN, NODES, RANKS and RANKS_PER_NODE, with tabs
    between; remarks go to standard error.
    """
    from launch.job.start import begin as begin_attempt
    from uniemox_dist.scheduler.allocation import Allocation
    from uniemox_dist.scheduler.commands import LiveJobs

    allocation = Allocation.from_env(os.environ)
    live = LiveJobs.parse("" if sys.stdin.isatty() else sys.stdin.read())
    begun = begin_attempt(recipe, overrides, live, allocation)
    for remark in begun.remarks:
        click.echo(f"uniemox: {remark}", err=True)
    click.echo(begun.line())
    return 0


@click.command(hidden=True)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("code", type=int)
@click.option("--job-state", help="State of this job, and how often it was queued again, as scontrol says.")
@click.option("--no-requeue", is_flag=True, help="Jobs may not queue themselves again on this cluster.")
def settle(run: Path, code: int, job_state: str | None, no_requeue: bool) -> int:
    """After the ranks of RUN ended with exit code CODE: what the batch script does next.

    Prints one of `end CODE`, `again`, `requeue` and `resubmit NODELIST`.
    """
    from launch.job import next_action as settling
    from uniemox_dist.runs.folder import RunFolder
    from uniemox_dist.scheduler.allocation import Allocation

    allocation = Allocation.from_env(os.environ)
    state = settling.JobState.parse(job_state, allocation.restarts)
    verdict = settling.settle(RunFolder(run), code, state, allocation.job_id, may_requeue=not no_requeue)
    if verdict.remark:
        click.echo(f"uniemox: {verdict.remark}", err=True)
    time.sleep(verdict.pause_s)
    click.echo(verdict.line)
    return 0
