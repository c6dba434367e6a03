"""Determines the state of a run, and the facts that `uniemox status` prints about it.

This module reads no files: events, metrics, lock, checkpoint, job and the present time are arguments.
"""

import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from uniemox_dist.config.data_sections import RunConfig
from uniemox_dist.core.formatting import cut, duration, is_number
from uniemox_dist.runs.events.base import Line
from uniemox_dist.runs.events.jobs import Restart
from uniemox_dist.runs.events.reading import ends_attempt, format_event, is_between_attempts, select_kind
from uniemox_dist.runs.events.training import End, Spike, Start
from uniemox_dist.runs.folder import Lock
from uniemox_dist.runs.history import History, Length
from uniemox_dist.runs.jobs import Job
from uniemox_dist.runs.metric_table import number

STALLED_INTERVALS, STALLED_S = 5, 60.0
"""A run is stalled after this many of its usual intervals without a line, and at least after this many seconds."""
RECENT_LINES = 50
"""Number of last metrics from which the pace of an attempt is computed."""


@dataclass(frozen=True)
class Saved:
    """The newest complete checkpoint."""

    step: int
    time: float | None
    """When it was completed, in seconds since 1970."""


def read_saved_time(info: Mapping[str, Any], file_time: float | None) -> float | None:
    """When a checkpoint was completed: the time in its complete.json, or else the file's own time, which a copy
    changes."""
    stated = info.get("time")
    return float(stated) if is_number(stated) else file_time


@dataclass(frozen=True)
class State:
    """A run's state."""

    word: str
    """queued, running, stalled, stopped, restarting, failed, killed or complete."""
    tone: str
    """good, wait or bad."""
    remark: str = ""
    """A short reason."""


def find_state(
    history: History,
    config: Mapping[str, Any],
    lock: Lock,
    *,
    saved: Saved | None,
    now: float,
    job: Job | None = None,
) -> State:
    """The state of a run at the time `now`; `job` is the job of the run, with what Slurm reports about it."""
    alone = find_state_without_job(history, config, lock, saved=saved, now=now)
    if job is None or lock.held or alone.word == "complete":
        return alone
    host = lock.holder.partition(" ")[0]
    by_hand = host not in ("", *job.hosts) and (lock.since or 0.0) > (job.began or math.inf)
    if alone.word == "running" and by_hand:
        return alone
    next_step = _describe_next(saved)
    if job.waits:
        return State("queued", "wait", f"{job.describe_wait(now)}; {next_step}")
    last = history.events[-1] if history.events else {}
    newest = max((x["time"] for x in (*history.lines[-1:], last) if is_number(x.get("time"))), default=None)
    if job.runs:
        began = max(x for x in (job.start, newest, 0.0) if x is not None)
        start_s = timeout_s(config.get("run") or {}, "start_timeout_s")
        return _state_in_job(alone, job, history, now - began, start_s, next_step)
    if job.state is None:
        if newest is None:
            return State("queued", "wait", f"{job.name} was submitted, and has written nothing yet")
        if last.get("event") == "requeue":
            return State("queued", "wait", f"{job.name} went back into the queue; {next_step}")
        return alone
    if newest is None:
        return State("killed", "bad", f"{job.describe_end()}, and has written nothing")
    if job.state == "CANCELLED" and alone.word in ("running", "stalled", "restarting", "killed"):
        return State("stopped", "wait", f"{job.name} was cancelled; the same command {next_step}")
    if alone.word in ("running", "stalled", "restarting", "killed"):
        return State("killed", "bad", f"no exit message; {job.describe_end()}; {next_step}")
    return State(alone.word, alone.tone, f"{alone.remark}; {job.describe_end()}")


def _state_in_job(
    alone: State, job: Job, history: History, silent_s: float, start_s: float, next_step: str
) -> State:
    """The state of a run whose lock appears free although its job runs: before the first attempt, between two
    attempts, or because this host does not see the lock of another node."""
    last: Line = history.events[-1] if history.events else {}
    where = f" on {cut(job.nodes, 60)}" if job.nodes else ""
    if job.state in ("SUSPENDED", "STOPPED"):
        return State("stalled", "bad", f"{job.name} is suspended{where}")
    kind = last.get("event")
    if alone.word in ("running", "restarting"):
        return alone
    if kind in ("requeue", "resubmit"):
        return State("queued", "wait", f"{cut(format_event(last), 160)}; it is ending{where}")
    if job.state == "COMPLETING":
        return State(
            alone.word, alone.tone, f"{alone.remark}; {job.name} is ending{where}".removeprefix("; ")
        )
    if job.start is not None and is_number(last.get("time")):
        starts = kind == "job" or job.start > last["time"]
    else:
        starts = not ends_attempt(last)
    if starts and silent_s <= start_s:
        return State("running", "good", f"{job.name} starts{where}")
    if not starts and ends_attempt(last) and silent_s <= start_s:
        if kind == "fault" and last.get("restart") is not False:
            return State(
                "restarting", "wait", f"in {job.name} after: {_describe_fault(history)}; {next_step}"
            )
        return State(alone.word, alone.tone, f"{alone.remark}; {job.name} still runs{where}")
    if starts:
        return State(
            "stalled", "bad", f"{job.name} has run for {duration(silent_s)}{where} without writing a line"
        )
    return State("stalled", "bad", f"no line for {duration(silent_s)}, but {job.name} still runs{where}")


def _describe_next(saved: Saved | None) -> str:
    return f"continues from step {saved.step:,}" if saved else "has no checkpoint to continue from"


def _describe_fault(history: History) -> str:
    return cut(history.last_fault or "see the log", 120)


def find_state_without_job(
    history: History, config: Mapping[str, Any], lock: Lock, *, saved: Saved | None, now: float
) -> State:
    """The state of a run, from its folder only."""
    events, lines, step, length = history.events, history.lines, history.step, history.length(config)
    turns = _turns(events)
    last: Line = turns[-1] if turns else {}
    kind = last.get("event")
    times = [x["time"] for x in (*lines[-1:], *events[-1:]) if is_number(x.get("time"))]
    if lock.held and lock.since is not None:
        times.append(lock.since)
    silent_s = now - max(times) if times else 0.0
    run = config.get("run") or {}
    next_step = _describe_next(saved)
    starts = is_starting(events, lock)
    if kind == "end" and not starts:
        return State("complete", "good")
    whole = length.steps if length.exact and not lock.held else None
    if whole and step >= whole and select_kind(events, End):
        return State("complete", "good")
    if not lock.held and events[-1:] and events[-1].get("event") == "job":
        name = f"job {events[-1].get('job_id', '')}".strip()
        if silent_s <= timeout_s(run, "start_timeout_s"):
            return State("running", "good", f"{name} starts")
        return State("killed", "bad", f"{name} has not reached its first step; {next_step}")
    if not lock.held and events[-1:] and events[-1].get("event") == "resubmit":
        return State("queued", "wait", f"{cut(format_event(events[-1]), 160)}; {next_step}")
    pause_s = last["pause_s"] if is_number(last.get("pause_s")) else 0
    if not starts and kind == "restart" and silent_s <= timeout_s(run, "start_timeout_s") + pause_s:
        why = f" after: {_describe_fault(history)}" if history.last_fault else ""
        return State("restarting", "wait", f"by the launcher{why}; {next_step}")
    if whole and saved and saved.step >= whole:
        return State("complete", "good", "by its last checkpoint; it wrote no end event")
    if lock.held is None and not last:
        return State("running", "good", "nothing written yet")
    if not starts and kind == "signal":
        signal = cut(str(last.get("signal") or "a rank"))
        return State("stopped", "wait", f"by {signal}; the same command {next_step}")
    if not starts and kind == "fault":
        fix = "fix it first; then the same command " if last.get("restart") is False else ""
        return State("failed", "bad", f"{_describe_fault(history)}; {fix}{next_step}")
    limit_s = stalled_after_s(config, select_last_attempt(history), starting=starts)
    if not lock.held and kind == "restart":
        return State("killed", "bad", f"the launcher's restart did not begin to train; {next_step}")
    elsewhere = lock.holder.partition(" ")[0] not in ("", socket.gethostname())
    if lock.held is False and not (elsewhere and silent_s <= limit_s):
        # This host may not see the lock of another host, so recent lines take precedence.
        return State(
            "killed", "bad", f"no exit message; its last line is {duration(silent_s)} old; {next_step}"
        )
    if silent_s <= limit_s:
        return State("running", "good", "starting" if starts else "")
    perhaps = "" if lock.held else "; perhaps killed: the lock cannot be tested here"
    return State("stalled", "bad", f"no line for {duration(silent_s)}{perhaps}")


def _turns(events: Sequence[Line]) -> list[Line]:
    """The events that begin or end an attempt."""
    return [e for e in events if e.get("event") in (Start.kind, Restart.kind) or ends_attempt(e)]


def is_starting(events: Sequence[Line], lock: Lock) -> bool:
    """Whether an attempt holds the lock and has not begun to train, so that the last lines are of the previous
    attempt."""
    turns = _turns(events)
    return bool(lock.held and (not turns or (lock.since or 0.0) > number(turns[-1].get("time"))))


def timeout_s(run: Mapping[str, Any], key: str) -> float:
    """A time-out of the section `run` in seconds, or its default."""
    value = run.get(key)
    return value if is_number(value) else RunConfig.model_fields[key].default


def select_last_attempt(history: History) -> list[Line]:
    """The last metrics of the last attempt."""
    starts = history.select(Start)
    began = number(starts[-1].get("time")) if starts else 0.0
    return [line for line in history.lines[-RECENT_LINES:] if number(line.get("time")) >= began]


def stalled_after_s(config: Mapping[str, Any], lines: Sequence[Line], *, starting: bool) -> float:
    """Seconds without a line after which a live process is stalled."""
    run = config.get("run") or {}
    gaps = [number(b.get("time")) - number(a.get("time")) for a, b in pairwise(lines)]
    if starting:
        return timeout_s(run, "start_timeout_s")
    if not lines:  # the first step, in which the model may be compiled
        compiles = (config.get("compute") or {}).get("compile")
        keys = ("start_timeout_s", *["compile_timeout_s"] * bool(compiles))
        return max(timeout_s(run, key) for key in keys)
    if not gaps:  # one line is not enough for a pace
        return timeout_s(run, "step_timeout_s")
    return max(STALLED_S, STALLED_INTERVALS * median(gaps))


def seconds_left(history: History, length: Length) -> float | None:
    """Seconds of remaining work after the newest line, at the median pace of the last attempt. The median ignores
    single long intervals, caused by a disk or a network."""
    if not length.steps:
        return None
    recent = select_last_attempt(history)
    paces = [(b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in pairwise(recent)]
    return max(0, length.steps - history.step) * max(0.0, median(paces)) if paces else None


def summarize(
    name: str,
    config: Mapping[str, Any],
    history: History,
    lock: Lock,
    saved: Saved | None,
    now: float,
    job: Job | None = None,
) -> dict[str, Any]:
    """The facts that `uniemox status` prints about a run, as in its JSON; unknown ones are None."""
    length, events = history.length(config), history.events
    state = find_state(history, config, lock, saved=saved, now=now, job=job)
    line: Line = history.lines[-1] if history.lines else {}
    # Until an attempt writes lines, the last lines are those of an earlier attempt, possibly on other machines.
    turns = [e for e in events if e.get("event") == Start.kind or is_between_attempts(e) or ends_attempt(e)]
    trains = bool(turns) and turns[-1]["event"] == Start.kind and not is_starting(events, lock)
    left_s = seconds_left(history, length)
    if left_s is not None and is_number(line.get("time")):
        left_s = max(0.0, left_s - (now - line["time"]))
    last = events[-1] if events else {}
    return {
        "run": name,
        "state": state.word,
        "tone": state.tone,
        "remark": state.remark,
        "step": history.step,
        "max_steps": length.steps,
        "max_steps_exact": length.exact,
        **{
            key: line[key] if is_number(line.get(key)) else None
            for key in ("epoch", "loss", "samples_per_s", "mfu", "data_wait_share")
        },
        "line_age_s": _age(line.get("time"), now),
        "saved_step": saved.step if saved else None,
        "saved_age_s": _age(saved.time, now) if saved else None,
        "attempts": len(history.attempts),
        "restarts": len(history.select(Restart)),
        "requeues": history.requeues,
        "skipped": len(history.skips),
        "spikes": len(history.select(Spike)),
        "faults": history.faults,
        "damaged_pictures": history.bad_samples,
        "eta_s": round(left_s, 1) if state.word == "running" and trains and left_s is not None else None,
        "job": _job_facts(job),
        "holder": lock.holder if lock.held else None,
        "last_event": {"age_s": _age(last.get("time"), now), "text": format_event(last)} if last else None,
    }


def _job_facts(job: Job | None) -> dict[str, Any] | None:
    if job is None:
        return None
    return {
        "id": job.id,
        "state": job.state,
        "reason": job.reason or None,
        "nodes": job.nodes or None,
        "start": job.start,
        "time_left_s": job.time_left_s,
    }


def _age(time: Any, now: float) -> float | None:
    return round(max(0.0, now - time), 1) if is_number(time) else None
