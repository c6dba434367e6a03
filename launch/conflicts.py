"""Submissions that would spoil a run that is there: refused."""

from collections.abc import Sequence
from pathlib import Path

from launch.checks import run_path
from launch.differences import differences, known_settings
from launch.submission import job_ids
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.scheduler import commands


def refuse_other_settings(config: Config, *, resume: bool, force_new: bool) -> None:
    """
    Raises:
        UserError: if the run's folder holds a run with other settings, with the differences.
    """
    run = run_path(config)
    known = None if resume or force_new else known_settings(run)
    changed = differences(known[1], config) if known else []
    if known and changed:
        raise UserError(
            "\n".join(
                [
                    f"run.dir/run.name={run}: there is a run with other settings ({known[0].relative_to(run)}):",
                    *(f"  {line}" for line in changed),
                    "give --resume to go on with the new settings, --force-new to set that folder aside, or another "
                    "run.name",
                ]
            )
        )


def refuse_live(runs: Sequence[Path], *, after: int | None = None, singleton: bool = False) -> list[str]:
    """
    Args:
        runs: folders of the runs that a new job will have.
        after: the job that the new one waits for.
        singleton: whether it waits for all of its name.

    Returns:
        A remark if there is no job to wait for.

    Raises:
        UserError: if a job of one of the runs is queued or runs, unless the new one waits for it.
    """
    if singleton:
        return []
    known = {run: job_ids(run) for run in runs}
    asked = [number for numbers in known.values() for number in numbers]
    states = commands.job_states([*asked, *([] if after is None else [after])])
    for run, numbers in known.items():
        live = {n: states[n].state.lower() for n in numbers if n in states and states[n].live}
        if live and after not in live:
            said = ", ".join(f"{number} ({state})" for number, state in live.items())
            who, them = (f"job {said} has", "it") if len(live) == 1 else (f"jobs {said} have", "them")
            raise UserError(
                f"run.dir/run.name={run}: {who} this run; wait for {them} with --after {max(live)}, end {them} with "
                f"`scancel {' '.join(map(str, live))}`, or give another run.name"
            )
    if after is not None and after not in states:
        return [f"--after {after}: Slurm knows no such job (any more), so that there is nothing to wait for"]
    return []


def require_sbatch() -> None:
    """
    Raises:
        UserError: on a machine without sbatch.
    """
    if not commands.has("sbatch"):
        raise commands.NoSlurm(
            "sbatch: there is no such command on this machine; call this on a login node of the cluster, use --dry-run "
            "to see the script, or `uniemox launch local`"
        )
