"""`uniemox status`: one line per run. Torch-free."""

import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from uniemox_dist.runtime.run_folder import RunFolder

WATCH_S = 5.0
"""Seconds between looks with a bare --watch."""
METRICS_BYTES = 1 << 18
"""End of metrics.jsonl that is read: some hundred lines, whatever the length of the run."""
EVENTS_SHOWN = 12
EVENT_CHARACTERS = 60
COLOURS = {"good": "green", "wait": "yellow", "bad": "red"}


class _OptionalSeconds(click.Command):
    """A command whose --watch may stand before RUN without its number."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = [
            f"--watch={WATCH_S:g}"
            if word == "--watch" and not re.fullmatch(r"\d+(\.\d*)?|\.\d+", following)
            else word
            for word, following in zip(args, [*args[1:], ""])
        ]
        return super().parse_args(ctx, given)


@click.command(cls=_OptionalSeconds)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option(
    "--watch",
    type=click.FloatRange(0.1),
    metavar="[SECONDS]",
    help=f"Look again every SECONDS (default {WATCH_S:g}) until Ctrl-C.",
)
def status(runs: tuple[str, ...], as_json: bool, watch: float | None) -> None:
    """Says where each RUN stands: a run's folder, a folder that holds some, or a pattern such as 'runs/vit*'.

    One run is shown with its last events. States: running; stalled (its process lives, but wrote nothing for long);
    restarting; stopped (by a signal, resumable); failed; killed (without a word); complete.
    """
    from uniemox_dist.runtime.errors import UserError

    if watch is not None and as_json:
        raise UserError("--watch and --json: give one of them")
    if watch is None:
        click.echo(_json(runs) if as_json else _page(runs))
        return
    try:
        while True:
            page = _page(runs)
            # Home, the lines with what is right of them cleared, then all below: no flicker, nothing left over.
            lines = "\033[H" + "".join(f"{line}\033[K\n" for line in page.splitlines()) + "\033[J"
            click.echo(lines if sys.stdout.isatty() else page)
            time.sleep(watch)
    except KeyboardInterrupt:
        return


def _json(runs: tuple[str, ...]) -> str:
    found = [{key: value for key, value in _look(run)[0].items() if key != "tone"} for run in _find(runs)]
    about = {"format": "uniemox-status", "format_version": 1, "time": round(time.time(), 3), "runs": found}
    return json.dumps(about, indent=2, ensure_ascii=False, allow_nan=False)


def _page(runs: tuple[str, ...]) -> str:
    from uniemox_dist.cli.tables import columns

    looks = [_look(run) for run in _find(runs)]
    head = (
        "run",
        "state",
        "step",
        "of",
        "loss",
        "samples/s",
        "MFU",
        "saved",
        "restarts",
        "skipped",
        "faults",
        "left",
    )
    rows = [_row(facts) for facts, _ in looks]
    lines = columns(head, rows, left=("run", "state"))
    width = shutil.get_terminal_size((200, 24)).columns if sys.stdout.isatty() else 0
    if len(looks) > 1:  # of one run, all of this stands below
        room = max(20, width - len(click.unstyle(max(lines, key=lambda line: len(click.unstyle(line))))) - 2)
        wide = max(len(click.unstyle(line)) for line in lines)
        last = [
            "last event",
            *(_last_event(facts, room if width else EVENT_CHARACTERS) for facts, _ in looks),
        ]
        lines = [
            f"{line}{' ' * (wide - len(click.unstyle(line)))}  {text}"
            for line, text in zip(lines, last, strict=True)
        ]
        return "\n".join(lines)
    facts, events = looks[0]
    below = ["", *_details(facts), *_told(events)]
    if width:  # a line that the terminal wraps would push the first ones out of sight
        below = [line if len(line) <= width else f"{line[: width - 1]}…" for line in below]
    return "\n".join([*lines, *below])


def _row(facts: dict[str, Any]) -> list[str]:
    from uniemox_dist.runtime.words import duration

    def shown(key: str, form: str, scale: float = 1.0, unit: str = "") -> str:
        return "–" if facts[key] is None else f"{scale * facts[key] if unit else facts[key]:{form}}{unit}"

    saved = (
        "–"
        if facts["saved_step"] is None
        else f"{facts['saved_step']:,}, {duration(facts['saved_age_s'])} ago"
    )
    most = shown("max_steps", ",")
    return [
        facts["run"],
        click.style(facts["state"], fg=COLOURS[facts["tone"]]),
        f"{facts['step']:,}",
        most if facts["max_steps_exact"] else f"~{most}",
        shown("loss", ".4g"),
        shown("samples_per_s", ",.1f"),
        shown("mfu", ".1f", 100, " %"),
        saved,
        str(facts["restarts"]),
        str(facts["skipped"]),
        str(facts["faults"]),
        "–" if facts["eta_s"] is None else duration(facts["eta_s"]),
    ]


def _last_event(facts: dict[str, Any], room: int) -> str:
    from uniemox_dist.runtime.words import cut, duration

    last = facts["last_event"]
    if last is None:
        return "none"
    age = "" if last["age_s"] is None else f"{duration(last['age_s'])} ago: "
    return age + cut(last["text"], max(8, room - len(age) - 2))


def _details(facts: dict[str, Any]) -> list[str]:
    from uniemox_dist.runtime.words import counted, duration

    lines = [f"{facts['state']}: {facts['remark']}"] if facts["remark"] else []
    if facts["holder"]:
        lines.append(f"held by {facts['holder']}")
    age = facts["line_age_s"]
    counts = [
        counted(facts["attempts"], "attempt"),
        *((counted(facts["spikes"], "loss spike"),) if facts["spikes"] else ()),
        *(
            (counted(facts["damaged_pictures"], "damaged picture") + " replaced",)
            if facts["damaged_pictures"]
            else ()
        ),
        *(() if age is None else (f"last metrics {duration(age)} ago",)),
    ]
    return [*lines, ", ".join(counts)]


def _told(events: list[dict[str, Any]]) -> list[str]:
    from datetime import datetime

    from uniemox_dist.runtime.words import is_number, sentence

    lines = []
    for event in events[-EVENTS_SHOWN:]:
        at = event.get("time")
        when = datetime.fromtimestamp(at).strftime("%m-%d %H:%M:%S") if is_number(at) else "?"
        lines.append(f"  {when:14}  {sentence(event)}")
    left = len(events) - EVENTS_SHOWN
    return ["", f"the last of {len(events)} events:" if left > 0 else "events:", *lines] if lines else []


def _find(patterns: tuple[str, ...]) -> list["RunFolder"]:
    """The runs that are meant, each once.

    Raises:
        UserError: if one means none.
    """
    from glob import escape, glob

    from uniemox_dist.cli.one_run import refuse_empty
    from uniemox_dist.runtime.errors import UserError
    from uniemox_dist.runtime.run_folder import RunFolder
    from uniemox_dist.runtime.runs import is_run, runs_below

    found: dict[Path, RunFolder] = {}
    for pattern in patterns:
        refuse_empty(pattern)
        places = [Path(pattern)] if Path(pattern).exists() else [Path(p) for p in sorted(glob(pattern))]
        runs = [run for p in places for run in ([RunFolder(p)] if is_run(p) else runs_below(p))]
        if not runs:
            there = (
                "holds no config.yaml and no events.jsonl, nor do folders in it"
                if places
                else "no such folder"
                if escape(pattern) == pattern
                else "the pattern matches nothing"
            )
            raise UserError(
                f"RUN={pattern}: {there}; give run.dir/run.name, such as demo/runs/demo, or run.dir"
            )
        found |= {run.path.resolve(): run for run in runs}
    return list(found.values())


def _look(run: "RunFolder") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The facts of a run, and its events."""
    from uniemox_dist.checkpoints.folders import newest_complete
    from uniemox_dist.config.load import parse_yaml
    from uniemox_dist.runtime.errors import UserError
    from uniemox_dist.runtime.run_folder import read_lines
    from uniemox_dist.runtime.standing import Saved, facts, saved_time
    from uniemox_dist.runtime.story import sections

    lock = run.look_at_lock()  # first: a run that ends while we read must not look killed
    try:
        config = parse_yaml(run.config.read_text(encoding="utf-8"), str(run.config))
    except (OSError, ValueError, UserError):
        config = None  # its settings only sharpen what the lines say
    events, metrics = read_lines(run.events), read_lines(run.metrics, METRICS_BYTES)
    if not lock.held:  # and one that began while we read is not free
        lock = run.look_at_lock()
    newest = newest_complete(run.checkpoints)
    saved = Saved(newest.step, saved_time(newest.info, newest.completed)) if newest is not None else None
    return facts(str(run.path), sections(config), metrics, events, lock, saved, time.time()), events
