"""Where a run stands: its state from events, metrics, lock, newest checkpoint and job.

Pure: nothing is read here, and the time of looking is a value like the others.
"""

import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uniemox_dist.core.formatting import cut, duration, is_number
from uniemox_dist.runs.events import text_of
from uniemox_dist.runs.folder import Lock
from uniemox_dist.runs.history import Length, Line, ends_attempt, number, of
from uniemox_dist.runs.jobs import Job
from uniemox_dist.runs.pace import of_last_attempt, patience_s, seconds


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint, as far as its folder tells."""

    step: int
    time: float | None
    """When it was complete, in seconds since 1970."""


def saved_time(info: Mapping[str, Any], file_time: float | None) -> float | None:
    """When a checkpoint was complete: as its complete.json states, or else the file's time, which a copy changes."""
    stated = info.get("time")
    return float(stated) if is_number(stated) else file_time


@dataclass(frozen=True)
class Standing:
    """A run's state."""

    word: str
    """queued, running, stalled, stopped, restarting, failed, killed or complete."""
    tone: str
    """good, wait or bad."""
    remark: str = ""
    """More in a few words."""


def standing(
    events: Sequence[Line],
    lines: Sequence[Line],
    config: Mapping[str, Any],
    lock: Lock,
    length: Length,
    *,
    step: int,
    saved: Saved | None,
    now: float,
    job: Job | None = None,
) -> Standing:
    """The state of a run whose metrics that stand are `lines`, at the time `now`; `job` is the one that its folder
    names, with what Slurm says of it."""
    alone = by_folder(events, lines, config, lock, length, step=step, saved=saved, now=now)
    if job is None or lock.held or alone.word == "complete":
        return alone
    host = lock.holder.partition(" ")[0]
    by_hand = host not in ("", *job.hosts) and (lock.since or 0.0) > (job.began or math.inf)
    if alone.word == "running" and by_hand:
        return alone
    on = _goes_on(saved)
    if job.waits:
        return Standing("queued", "wait", f"{job.describe_wait(now)}; {on}")
    last = events[-1] if events else {}
    sign = max((x["time"] for x in (*lines[-1:], last) if is_number(x.get("time"))), default=None)
    if job.runs:
        began = max(x for x in (job.start, sign, 0.0) if x is not None)
        return _in_job(alone, job, last, now - began, seconds(config.get("run") or {}, "start_timeout_s"), on)
    if job.state is None:
        if sign is None:
            return Standing("queued", "wait", f"{job.name} was submitted, and has written nothing yet")
        if last.get("event") == "requeue":
            return Standing("queued", "wait", f"{job.name} went back into the queue; {on}")
        return alone
    if sign is None:
        return Standing("killed", "bad", f"{job.describe_end()}, and has written nothing")
    if job.state == "CANCELLED" and alone.word in ("running", "stalled", "restarting", "killed"):
        return Standing("stopped", "wait", f"{job.name} was cancelled; the same command {on}")
    if alone.word in ("running", "stalled", "restarting", "killed"):
        return Standing("killed", "bad", f"no exit message; {job.describe_end()}; {on}")
    return Standing(alone.word, alone.tone, f"{alone.remark}; {job.describe_end()}")


def _in_job(alone: Standing, job: Job, last: Line, silent_s: float, start_s: float, on: str) -> Standing:
    """The state of a run whose lock looks free although its job runs: before the first attempt, between two, or because
    the lock of another node cannot be seen."""
    where = f" on {cut(job.nodes, 60)}" if job.nodes else ""
    if job.state in ("SUSPENDED", "STOPPED"):
        return Standing("stalled", "bad", f"{job.name} is suspended{where}")
    kind = last.get("event")
    if alone.word in ("running", "restarting"):
        return alone
    if kind in ("requeue", "resubmit"):
        return Standing("queued", "wait", f"{cut(text_of(last), 160)}; it is ending{where}")
    if job.state == "COMPLETING":
        return Standing(
            alone.word, alone.tone, f"{alone.remark}; {job.name} is ending{where}".removeprefix("; ")
        )
    if job.start is not None and is_number(last.get("time")):
        starts = kind == "job" or job.start > last["time"]
    else:
        starts = not ends_attempt(last)
    if starts and silent_s <= start_s:
        return Standing("running", "good", f"{job.name} starts{where}")
    if not starts and ends_attempt(last) and silent_s <= start_s:
        if kind == "fault" and last.get("restart") is not False:
            why = cut(str(last.get("error", "see the log")), 120)
            return Standing("restarting", "wait", f"in {job.name} after: {why}; {on}")
        return Standing(alone.word, alone.tone, f"{alone.remark}; {job.name} still runs{where}")
    if starts:
        return Standing("stalled", "bad", f"{job.name} runs for {duration(silent_s)}{where} without a line")
    return Standing("stalled", "bad", f"no line for {duration(silent_s)}, but {job.name} still runs{where}")


def _goes_on(saved: Saved | None) -> str:
    return f"goes on from step {saved.step:,}" if saved else "has no checkpoint to go on from"


def by_folder(
    events: Sequence[Line],
    lines: Sequence[Line],
    config: Mapping[str, Any],
    lock: Lock,
    length: Length,
    *,
    step: int,
    saved: Saved | None,
    now: float,
) -> Standing:
    """The same by what its folder alone tells."""
    turns = [e for e in events if e.get("event") in ("start", "restart") or ends_attempt(e)]
    last: Line = turns[-1] if turns else {}
    kind = last.get("event")
    times = [x["time"] for x in (*lines[-1:], *events[-1:]) if is_number(x.get("time"))]
    if lock.held and lock.since is not None:
        times.append(lock.since)
    silent_s = now - max(times) if times else 0.0
    run = config.get("run") or {}
    on = _goes_on(saved)
    starts = starting(events, lock)
    if kind == "end" and not starts:
        return Standing("complete", "good")
    whole = length.steps if length.exact and not lock.held else None
    if whole and step >= whole and of(events, "end"):
        return Standing("complete", "good")
    if not lock.held and events[-1:] and events[-1].get("event") == "job":
        name = f"job {events[-1].get('job_id', '')}".strip()
        if silent_s <= seconds(run, "start_timeout_s"):
            return Standing("running", "good", f"{name} starts")
        return Standing("killed", "bad", f"{name} has not come to its first step; {on}")
    if not lock.held and events[-1:] and events[-1].get("event") == "resubmit":
        return Standing("queued", "wait", f"{cut(text_of(events[-1]), 160)}; {on}")
    restart_s = seconds(run, "start_timeout_s") + (last["pause_s"] if is_number(last.get("pause_s")) else 0)
    if not starts and kind == "restart" and silent_s <= restart_s:
        why = f" after: {cut(str(last['reason']), 120)}" if last.get("reason") else ""
        return Standing("restarting", "wait", f"by the launcher{why}; {on}")
    if whole and saved and saved.step >= whole:
        return Standing("complete", "good", "by its last checkpoint; it wrote no word of its end")
    if lock.held is None and not last:
        return Standing("running", "good", "nothing written yet")
    if not starts and kind == "signal":
        return Standing(
            "stopped", "wait", f"by {cut(str(last.get('signal') or 'a rank'))}; the same command {on}"
        )
    if not starts and kind == "fault":
        mend = "mend it first; then the same command " if last.get("restart") is False else ""
        return Standing("failed", "bad", f"{cut(str(last.get('error', 'see the log')), 120)}; {mend}{on}")
    limit_s = patience_s(config, of_last_attempt(lines, events), starting=starts)
    if not lock.held and kind == "restart":
        return Standing("killed", "bad", f"the launcher's restart came to nothing; {on}")
    elsewhere = lock.holder.partition(" ")[0] not in ("", socket.gethostname())
    if lock.held is False and not (elsewhere and silent_s <= limit_s):
        # The lock of another host may be one that this host cannot see: then fresh lines count more.
        return Standing("killed", "bad", f"no exit message; its last sign is {duration(silent_s)} old; {on}")
    if silent_s <= limit_s:
        return Standing("running", "good", "starting" if starts else "")
    perhaps = "" if lock.held else " or killed: the lock cannot be tested here"
    return Standing("stalled", "bad", f"no line for {duration(silent_s)}{perhaps}")


def starting(events: Sequence[Line], lock: Lock) -> bool:
    """Whether an attempt has taken the lock and not begun to train: what stands there is of the attempt before."""
    turns = [e for e in events if e.get("event") in ("start", "restart") or ends_attempt(e)]
    return bool(lock.held and (not turns or (lock.since or 0.0) > number(turns[-1].get("time"))))
