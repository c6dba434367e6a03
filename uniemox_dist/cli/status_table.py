"""Formats the output of `uniemox status`: a row for each run, and details of a single run. Torch-free; reads no
files."""

from collections.abc import Sequence
from typing import Any

import click

from uniemox_dist.cli.tables import columns
from uniemox_dist.core.formatting import counted, cut, duration, is_number, moment, zone
from uniemox_dist.runs.events.reading import format_event
from uniemox_dist.scheduler.states import Phase, find_phase

EVENTS_SHOWN = 12
EVENT_CHARACTERS = 60
COLOURS = {"good": "green", "wait": "yellow", "bad": "red"}
HEAD = (
    "run",
    "state",
    "job",
    "nodes (reason)",
    "step",
    "of",
    "epoch",
    "loss",
    "samples/s",
    "data wait",
    "MFU",
    "saved",
    "restarts",
    "skipped",
    "faults",
    "left",
    "last event",
)
DROP = (
    "MFU",
    "epoch",
    "skipped",
    "faults",
    "data wait",
    "last event",
    "nodes (reason)",
    "restarts",
    "samples/s",
    "of",
    "saved",
    "job",
    "loss",
    "left",
)
"""Columns to leave out on a narrow terminal, in this order."""
SHRINK = {"last event": 24, "nodes (reason)": 18, "run": 16}
"""Columns that may be cut on a narrow terminal, each with its smallest width in characters."""

Facts = dict[str, Any]
Events = list[dict[str, Any]]


def render_table(looks: Sequence[tuple[Facts, Events]], width: int, remark: str = "") -> str:
    """Returns the table; for a single run also its details and last events.

    `width` is the terminal's, or 0 for no limit. `remark` is a last line about the query itself.
    """
    one = looks[0] if len(looks) == 1 else None
    rows = [[*_render_row(facts), "" if one else _last_event(facts, width)] for facts, _ in looks]
    lines = columns(
        HEAD,
        rows,
        left=("run", "state", "job", "nodes (reason)", "last event"),
        width=width,
        drop=DROP,
        shrink=SHRINK,
    )
    below = ["", *_details(one[0]), *_render_events(one[1])] if one else []
    below += ["", remark] if remark else []
    if width:  # a wrapped line would scroll the first lines off the screen
        below = [line if len(line) <= width else f"{line[: width - 1]}…" for line in below]
    return "\n".join([*lines, *below])


def _render_row(facts: Facts) -> list[str]:
    def shown(key: str, form: str, scale: float = 1.0, unit: str = "") -> str:
        return "–" if facts[key] is None else f"{scale * facts[key] if unit else facts[key]:{form}}{unit}"

    saved = (
        "–"
        if facts["saved_step"] is None
        else f"{facts['saved_step']:,}, {duration(facts['saved_age_s'])} ago"
        if facts["saved_age_s"] is not None
        else f"{facts['saved_step']:,}"
    )
    most = shown("max_steps", ",")
    job, where = _job(facts["job"])
    return [
        facts["run"],
        click.style(facts["state"], fg=COLOURS[facts["tone"]]),
        job,
        where,
        f"{facts['step']:,}",
        most if facts["max_steps_exact"] else f"~{most}",
        shown("epoch", ".2f"),
        shown("loss", ".4g"),
        shown("samples_per_s", ",.1f"),
        shown("data_wait_share", ".1f", 100, " %"),
        shown("mfu", ".1f", 100, " %"),
        saved,
        f"{facts['restarts'] + facts['requeues']:,}",
        str(facts["skipped"]),
        str(facts["faults"]),
        "–" if facts["eta_s"] is None else duration(facts["eta_s"]),
    ]


def _job(job: Facts | None) -> tuple[str, str]:
    """Number and state of a job; and its nodes, or the reason why it has none, as squeue prints it."""
    if job is None:
        return "–", "–"
    state = {None: "", "": "over"}.get(job["state"], job["state"])
    waits = job["reason"] and job["state"] != "RUNNING"
    where = job["nodes"] or (f"({job['reason'].strip('()')})" if waits else "–")
    return f"{job['id']} {state}".rstrip(), cut(where, 40)


def _last_event(facts: Facts, width: int) -> str:
    last = facts["last_event"]
    if last is None:
        return "none"
    age = "" if last["age_s"] is None else f"{duration(last['age_s'])} ago: "
    # On a terminal `columns` cuts lines to its width; in a pipe the text has a fixed limit.
    return age + (cut(last["text"]) if width else cut(last["text"], max(8, EVENT_CHARACTERS - len(age) - 2)))


def _details(facts: Facts) -> list[str]:
    lines = [f"{facts['state']}: {facts['remark']}"] if facts["remark"] else []
    if facts["holder"]:
        lines.append(f"held by {facts['holder']}")
    if told := _job_details(facts["job"]):
        lines.append(told)
    age = facts["line_age_s"]
    counts = [
        counted(facts["attempts"], "attempt"),
        *(
            (f"{counted(facts['restarts'], 'restart')} and {counted(facts['requeues'], 'requeue')}",)
            if facts["requeues"]
            else ()
        ),
        *((counted(facts["spikes"], "loss spike"),) if facts["spikes"] else ()),
        *(
            (counted(facts["damaged_pictures"], "damaged picture") + " replaced",)
            if facts["damaged_pictures"]
            else ()
        ),
        *(() if age is None else (f"last metrics {duration(age)} ago",)),
    ]
    return [*lines, ", ".join(counts)]


def _job_details(job: Facts | None) -> str:
    """A line about a job that runs or waits; empty for one that has ended, because the state column shows that."""
    if job is None or not job["state"] or find_phase(job["state"]) is Phase.ENDED:
        return ""
    said = f"job {job['id']}: {job['state']}"
    if job["nodes"]:
        said += f" on {cut(job['nodes'], 60)}"
    if is_number(job["start"]):
        said += f", {'since' if job['nodes'] else 'expected to start'} {moment(job['start'], '%m-%d %H:%M')}"
    if job["nodes"] and is_number(job["time_left_s"]):
        said += f", {duration(job['time_left_s'])} to its time limit"
    return said


def _render_events(events: Events) -> list[str]:
    lines = [
        f"  {moment(e.get('time'), '%m-%d %H:%M:%S'):14}  {format_event(e)}" for e in events[-EVENTS_SHOWN:]
    ]
    if not lines:
        return []
    times = [e["time"] for e in events if is_number(e.get("time"))]
    where = f", times in {zone(times[-1])}" if times else ""
    left = len(events) - EVENTS_SHOWN
    return ["", f"the last of {len(events)} events{where}:" if left > 0 else f"events{where}:", *lines]
