"""Where a run stands: its state from events, metrics, lock and newest checkpoint, and the facts of a line of `status`.

Pure: nothing is read here, and the time of looking is a value like the others.
"""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from uniemox_dist.config.data_sections import RunConfig
from uniemox_dist.runtime.run_folder import Lock
from uniemox_dist.runtime.story import (
    Length,
    Line,
    ends_attempt,
    history,
    number,
    numbers,
    of,
    run_length,
    steps_done,
)
from uniemox_dist.runtime.words import cut, duration, is_number, sentence

STALLED_INTERVALS, STALLED_S = 5, 60.0
"""A run that trains is stalled after so many of its usual intervals without a line, and these seconds at least."""
RECENT = 50
"""Metrics of the last attempt that its pace is taken from."""


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
    """running, stalled, stopped, restarting, failed, killed or complete."""
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
) -> Standing:
    """The state of a run whose metrics that stand are `lines`, at the time `now`."""
    turns = [e for e in events if e.get("event") in ("start", "restart") or ends_attempt(e)]
    last: Line = turns[-1] if turns else {}
    kind = last.get("event")
    times = [x["time"] for x in (*lines[-1:], *events[-1:]) if is_number(x.get("time"))]
    if lock.held and lock.since is not None:
        times.append(lock.since)
    silent_s = now - max(times) if times else 0.0
    run = config.get("run") or {}
    on = f"goes on from step {saved.step:,}" if saved else "has no checkpoint to go on from"
    starts = starting(events, lock)
    if kind == "end" and not starts:
        return Standing("complete", "good")
    whole = length.steps if length.exact and not lock.held else None
    if whole and step >= whole and of(events, "end"):
        return Standing("complete", "good")
    restart_s = _seconds(run, "start_timeout_s") + (last["pause_s"] if is_number(last.get("pause_s")) else 0)
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
    limit_s = _patience_s(run, _of_last_attempt(lines, events), starting=starts)
    if not lock.held and kind == "restart":
        return Standing("killed", "bad", f"the launcher's restart came to nothing; {on}")
    elsewhere = lock.holder.partition(" ")[0] not in ("", socket.gethostname())
    if lock.held is False and not (elsewhere and silent_s <= limit_s):
        # The lock of another host may be one that this host cannot see: then fresh lines count more.
        return Standing("killed", "bad", f"without a word; its last sign is {duration(silent_s)} old; {on}")
    if silent_s <= limit_s:
        return Standing("running", "good", "starting" if starts else "")
    perhaps = "" if lock.held else " or killed: the lock cannot be tested here"
    return Standing("stalled", "bad", f"no line for {duration(silent_s)}{perhaps}")


def starting(events: Sequence[Line], lock: Lock) -> bool:
    """Whether an attempt has taken the lock and not begun to train: what stands there is of the attempt before."""
    turns = [e for e in events if e.get("event") in ("start", "restart") or ends_attempt(e)]
    return bool(lock.held and (not turns or (lock.since or 0.0) > number(turns[-1].get("time"))))


def _seconds(run: Mapping[str, Any], key: str) -> float:
    value = run.get(key)
    return value if is_number(value) else RunConfig.model_fields[key].default


def _of_last_attempt(lines: Sequence[Line], events: Sequence[Line]) -> Sequence[Line]:
    starts = of(events, "start")
    began = number(starts[-1].get("time")) if starts else 0.0
    return [line for line in lines[-RECENT:] if number(line.get("time")) >= began]


def _patience_s(run: Mapping[str, Any], lines: Sequence[Line], *, starting: bool) -> float:
    """Seconds without a line after which a process that lives is stalled."""
    gaps = [number(b.get("time")) - number(a.get("time")) for a, b in pairwise(lines)]
    if starting or not lines:
        return _seconds(run, "start_timeout_s")
    if not gaps:  # a first line and no pace yet
        return _seconds(run, "step_timeout_s")
    return max(STALLED_S, STALLED_INTERVALS * median(gaps))


def left_s(lines: Sequence[Line], events: Sequence[Line], length: Length, step: int) -> float | None:
    """Seconds of work that are left after the newest line, at the median pace of the last attempt's recent lines: one
    that waited long, for a disk or a network, does not count."""
    recent = _of_last_attempt(lines, events)
    if not length.steps:
        return None
    paces = [(b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in pairwise(recent)]
    return max(0, length.steps - step) * max(0.0, median(paces)) if paces else None


def facts(
    name: str,
    config: Mapping[str, Any],
    metrics: Sequence[Line],
    events: Sequence[Line],
    lock: Lock,
    saved: Saved | None,
    now: float,
) -> dict[str, Any]:
    """What `uniemox status` says of a run, as JSON would have it: None is what is not known. `metrics` may be only the
    last ones; `saved` is the newest complete checkpoint."""
    lines = history(metrics, events).lines
    step = steps_done(events, lines)
    length = run_length(config, events, lines, step)
    stands = standing(events, lines, config, lock, length, step=step, saved=saved, now=now)
    line: Line = lines[-1] if lines else {}
    found = numbers(metrics, events)
    # Before the first lines of an attempt, those that stand there are of another one, perhaps on other machines.
    alive = stands.word == "running" and not starting(events, lock)
    left = left_s(lines, events, length, step)
    if left is not None and is_number(line.get("time")):
        left = max(0.0, left - (now - line["time"]))
    last = events[-1] if events else {}
    return {
        "run": name,
        "state": stands.word,
        "tone": stands.tone,
        "remark": stands.remark,
        "step": step,
        "max_steps": length.steps,
        "max_steps_exact": length.exact,
        **{
            key: line[key] if is_number(line.get(key)) else None
            for key in ("epoch", "loss", "samples_per_s", "mfu", "data_wait_share")
        },
        "line_age_s": _age(line.get("time"), now),
        "saved_step": saved.step if saved else None,
        "saved_age_s": _age(saved.time, now) if saved else None,
        "attempts": len(found.attempts),
        "restarts": found.restarts,
        "skipped": found.skipped,
        "spikes": found.spikes,
        "faults": found.faults,
        "damaged_pictures": found.damaged,
        "eta_s": round(left, 1) if alive and left is not None else None,
        "holder": lock.holder if lock.held else None,
        "last_event": {"age_s": _age(last.get("time"), now), "text": sentence(last)} if last else None,
    }


def _age(time: Any, now: float) -> float | None:
    return round(max(0.0, now - time), 1) if is_number(time) else None
