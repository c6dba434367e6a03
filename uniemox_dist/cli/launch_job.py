"""`uniemox launch begin` and `settle`: hidden commands that a batch script calls before and after its ranks."""

import os
import sys
import time
from pathlib import Path

import click


@click.command(hidden=True)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def begin(recipe: str, overrides: tuple[str, ...]) -> int:
    """Lock the run's folder for this Slurm job, and print how many ranks to start.

    Standard input: the lines of `squeue -h -o '%A %T %l'`. Print RUN, NODES, RANKS and RANKS_PER_NODE, with tabs
    between; remarks go to standard error.
    """
    from launch.job.start import start_attempt
    from uniemox_dist.scheduler.allocation import Allocation
    from uniemox_dist.scheduler.commands import LiveJobs

    allocation = Allocation.from_env(os.environ)
    live = LiveJobs.parse("" if sys.stdin.isatty() else sys.stdin.read())
    started = start_attempt(recipe, overrides, live, allocation)
    for remark in started.remarks:
        click.echo(f"uniemox: {remark}", err=True)
    click.echo(started.line())
    return 0


@click.command(hidden=True)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("code", type=int)
@click.option("--job-state", help="State of this job and the number of its requeues, from scontrol.")
@click.option("--no-requeue", is_flag=True, help="Jobs may not queue themselves again on this cluster.")
def settle(run: Path, code: int, job_state: str | None, no_requeue: bool) -> int:
    """Choose what the batch script does after the ranks of RUN ended with exit code CODE.

    Print one of `end CODE`, `again`, `requeue` and `resubmit NODELIST`.
    """
    from launch.job.next_action import OwnJobState, choose_next_action
    from uniemox_dist.runs.folder import RunFolder
    from uniemox_dist.scheduler.allocation import Allocation

    allocation = Allocation.from_env(os.environ)
    state = OwnJobState.parse(job_state, allocation.restarts)
    action = choose_next_action(RunFolder(run), code, state, allocation.job_id, may_requeue=not no_requeue)
    if action.remark:
        click.echo(f"uniemox: {action.remark}", err=True)
    time.sleep(action.pause_s)
    click.echo(action.line)
    return 0
