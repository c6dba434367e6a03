"""The facts of a line of `uniemox status`. Pure: nothing is read here, and the time of looking is a value as well."""

from collections.abc import Mapping, Sequence
from typing import Any

from uniemox_dist.core.formatting import is_number
from uniemox_dist.runs.attempts import BETWEEN, numbers
from uniemox_dist.runs.events import text_of
from uniemox_dist.runs.folder import Lock
from uniemox_dist.runs.history import Line, ends_attempt, history, run_length, steps_done
from uniemox_dist.runs.jobs import Job
from uniemox_dist.runs.pace import left_s
from uniemox_dist.runs.status import Saved, standing, starting


def facts(
    name: str,
    config: Mapping[str, Any],
    metrics: Sequence[Line],
    events: Sequence[Line],
    lock: Lock,
    saved: Saved | None,
    now: float,
    job: Job | None = None,
) -> dict[str, Any]:
    """What `uniemox status` says of a run, as JSON would have it: None is what is not known. `metrics` may be only the
    last ones; `saved` is the newest complete checkpoint."""
    lines = history(metrics, events).lines
    step = steps_done(events, lines)
    length = run_length(config, events, lines, step)
    stands = standing(events, lines, config, lock, length, step=step, saved=saved, now=now, job=job)
    line: Line = lines[-1] if lines else {}
    found = numbers(metrics, events)
    # Before the first lines of an attempt, those that stand there are of another one, perhaps on other machines.
    turns = [e for e in events if e.get("event") in ("start", *BETWEEN) or ends_attempt(e)]
    trains = bool(turns) and turns[-1]["event"] == "start" and not starting(events, lock)
    alive = stands.word == "running" and trains
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
        "requeues": found.requeues,
        "skipped": found.skipped,
        "spikes": found.spikes,
        "faults": found.faults,
        "damaged_pictures": found.damaged,
        "eta_s": round(left, 1) if alive and left is not None else None,
        "job": _job_facts(job),
        "holder": lock.holder if lock.held else None,
        "last_event": {"age_s": _age(last.get("time"), now), "text": text_of(last)} if last else None,
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
