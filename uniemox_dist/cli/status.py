"""`uniemox status`: one line per run. Torch-free."""

import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from uniemox_dist.runs.folder import RunFolder
    from uniemox_dist.runs.jobs import Job
    from uniemox_dist.scheduler.commands import JobQueries

WATCH_S = 5.0
"""Seconds between updates of a --watch without a number."""
METRICS_BYTES = 1 << 18
"""Bytes read from the end of metrics.jsonl: some hundred lines, for a run of any length."""
ALL_DEPTH = 6
"""Levels of folders that --all searches."""


class _OptionalSeconds(click.Command):
    """A command whose --watch takes an optional number."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = [
            f"--watch={WATCH_S:g}"
            if word == "--watch" and not re.fullmatch(r"\d+(\.\d*)?|\.\d+", following)
            else word
            for word, following in zip(args, [*args[1:], ""])
        ]
        return super().parse_args(ctx, given)


@click.command(cls=_OptionalSeconds)
@click.argument("runs", nargs=-1, metavar="RUN...")
@click.option("--all", "below", metavar="DIR", help="Show every run below DIR, instead of RUN.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option(
    "--watch",
    type=click.FloatRange(0.1),
    metavar="[SECONDS]",
    help=f"Update every SECONDS (default {WATCH_S:g}) until Ctrl-C.",
)
@click.pass_context
def status(
    ctx: click.Context, runs: tuple[str, ...], below: str | None, as_json: bool, watch: float | None
) -> None:
    """Show the state of each RUN: a run's folder, a folder of runs, or a pattern such as 'runs/vit*'.

    A single run is shown with its last events. States: queued (its job waits in Slurm); running; stalled (its process
    lives, but wrote nothing for long); restarting; stopped (by a signal, resumable); failed; killed (no exit message);
    complete. On a machine with Slurm, squeue is called once for the jobs of all runs.
    """
    from uniemox_dist.core.errors import UserError
    from uniemox_dist.scheduler.commands import JobQueries

    if watch is not None and as_json:
        raise UserError("--watch and --json: give one of them")
    if runs and below is not None:
        raise UserError(f"--all={below} and RUN={runs[0]}: give one of them")
    if not runs and below is None:
        raise click.MissingParameter(ctx=ctx, param=ctx.command.params[0])
    queue = JobQueries()
    if watch is None:
        click.echo(_print_json(runs, below, queue) if as_json else _render_page(runs, below, queue))
        return
    try:
        while True:
            page = _render_page(runs, below, queue)
            # Overwrite line by line and clear the rest, which does not flicker.
            lines = "\033[H" + "".join(f"{line}\033[K\n" for line in page.splitlines()) + "\033[J"
            click.echo(lines if sys.stdout.isatty() else page)
            time.sleep(watch)
    except KeyboardInterrupt:
        return


def _print_json(runs: Sequence[str], below: str | None, queue: "JobQueries") -> str:
    looks = _read_all(_find(runs, below), queue)
    found = [{key: value for key, value in facts.items() if key != "tone"} for facts, _ in looks]
    about = {
        "format": "uniemox-status",
        "format_version": 1,
        "time": round(time.time(), 3),
        "slurm": queue.remark or None,
        "runs": found,
    }
    return json.dumps(about, indent=2, ensure_ascii=False, allow_nan=False)


def _render_page(runs: Sequence[str], below: str | None, queue: "JobQueries") -> str:
    from uniemox_dist.cli.status_table import render_table

    looks = _read_all(_find(runs, below), queue)
    if below is not None:
        for facts, _ in looks:
            inside = Path(facts["run"]).relative_to(below)
            facts["run"] = str(inside) if inside.parts else facts["run"]
    width = shutil.get_terminal_size((200, 24)).columns if sys.stdout.isatty() else 0
    return render_table(looks, width, queue.remark)


def _find(patterns: Sequence[str], below: str | None) -> list["RunFolder"]:
    """The runs that the patterns name, each once.

    Raises:
        UserError: if a pattern names no run.
    """
    from uniemox_dist.cli.one_run import refuse_empty
    from uniemox_dist.runs.folder import RunFolder

    if below is not None:
        return _list_below(below)
    found: dict[Path, RunFolder] = {}
    for pattern in patterns:
        refuse_empty(pattern)
        found |= {run.path.resolve(): run for run in _find_meant(pattern)}
    return list(found.values())


def _find_meant(pattern: str) -> list["RunFolder"]:
    from glob import escape, glob

    from uniemox_dist.core.errors import UserError
    from uniemox_dist.runs.folder import RunFolder, find_runs, is_run

    places = [Path(pattern)] if Path(pattern).exists() else [Path(p) for p in sorted(glob(pattern))]
    runs = [run for p in places for run in ([RunFolder(p)] if is_run(p) else find_runs(p))]
    if not runs:
        there = (
            "holds no config.yaml and no events.jsonl, nor do folders in it"
            if places
            else "no such folder"
            if escape(pattern) == pattern
            else "the pattern matches nothing"
        )
        raise UserError(f"RUN={pattern}: {there}; give run.dir/run.name, such as demo/runs/demo, or run.dir")
    return runs


def _list_below(place: str) -> list["RunFolder"]:
    from uniemox_dist.core.errors import UserError
    from uniemox_dist.runs.folder import RunFolder, find_runs, is_run

    path, give = Path(place), "give the folder that holds your runs, such as run.dir"
    if place and not path.is_dir():
        raise UserError(f"--all={place}: {'is not a folder' if path.exists() else 'no such folder'}; {give}")
    runs = [RunFolder(path)] if is_run(path) else find_runs(path, ALL_DEPTH) if place else []
    if not runs:
        raise UserError(
            f"--all={place}: no folder below it holds a config.yaml or an events.jsonl; {give}"
            if place
            else f"--all is empty; {give}"
        )
    return runs


def _read_all(
    runs: Sequence["RunFolder"], queue: "JobQueries"
) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Facts and events of each run; squeue is called once for all of them."""
    from uniemox_dist.runs.jobs import choose_job, read_jobs

    jobs = [read_jobs(run.path) for run in runs]
    answers = queue.query([job.id for some in jobs for job in some])
    return [_read_one(run, choose_job(some, answers)) for run, some in zip(runs, jobs, strict=True)]


def _read_one(run: "RunFolder", job: "Job | None") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The facts of a run, and its events."""
    from uniemox_dist.checkpoints.folders import find_newest_complete
    from uniemox_dist.config.yaml_text import parse_yaml
    from uniemox_dist.core.errors import UserError
    from uniemox_dist.runs.folder import read_lines
    from uniemox_dist.runs.history import History, select_sections
    from uniemox_dist.runs.status import Saved, read_saved_time, summarize

    # First, because a run that ends while its files are read must not appear killed.
    lock = run.check_lock()
    try:
        config = parse_yaml(run.config.read_text(encoding="utf-8"), str(run.config))
    except (OSError, ValueError, UserError):
        config = None  # the state can be determined without the settings
    events, metrics = read_lines(run.events), read_lines(run.metrics, METRICS_BYTES)
    if not lock.held:  # a run may have begun while its files were read
        lock = run.check_lock()
    newest = find_newest_complete(run.checkpoints)
    saved = Saved(newest.step, read_saved_time(newest.info, newest.completed)) if newest is not None else None
    history = History(metrics, events)
    return summarize(str(run.path), select_sections(config), history, lock, saved, time.time(), job), events
