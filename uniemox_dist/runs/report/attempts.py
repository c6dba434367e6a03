"""How a run went: figures of its attempts, saves and faults, and its events as rows."""

from collections.abc import Sequence
from typing import Any

from uniemox_dist.core.formatting import counted, duration, is_number, moment, short, size
from uniemox_dist.runs.attempts import Attempt, Numbers
from uniemox_dist.runs.events import describe
from uniemox_dist.runs.history import Line, of


def figures(told: Numbers) -> list[tuple[str, str, str, str]]:
    """(name, value, remark, tone) of each figure; those of what never happened are short."""
    if not told.attempts:
        return []
    first, last = told.attempts[0], told.attempts[-1]
    idle_s = last.ended - first.began - told.worked_s
    found = [
        (
            "Attempts",
            str(len(told.attempts)),
            f"{duration(max(0.0, idle_s))} between them" if len(told.attempts) > 1 else "",
            "",
        ),
        ("Restarts", str(told.restarts), "by the launcher", "wait" if told.restarts else ""),
        *((("Requeues", str(told.requeues), "of its job", ""),) if told.requeues else ()),
        ("Stops", str(told.stops), "by signals", ""),
        ("Killed", str(len(told.killed)), "no exit message", "bad" if told.killed else ""),
        ("Faults", str(told.faults), _damaged(told.damaged), "bad" if told.faults else ""),
        ("Steps lost", f"{told.lost_steps:,}", "done again after a resume", "bad" if told.lost_steps else ""),
        ("Skipped", f"{told.skipped:,}", "steps, not finite", "bad" if told.skipped else ""),
        ("Loss spikes", f"{told.spikes:,}", "events", "wait" if told.spikes else ""),
    ]
    return found + _saves(told)


def _damaged(count: int) -> str:
    return f"{counted(count, 'picture')} replaced" if count else ""


def _saves(told: Numbers) -> list[tuple[str, str, str, str]]:
    found = [
        ("Saves", f"{told.saves:,}", "" if told.save_bytes is None else f"{size(told.save_bytes)} each", "")
    ]
    if told.save_s is not None:
        found.append(("A save takes", f"{told.save_s:.3g} s", "median", ""))
    if told.blocked_s is not None:
        found.append(("Steps wait for it", f"{told.blocked_s:.3g} s", "median", ""))
    return found


def event_row(event: dict[str, Any]) -> dict[str, Any]:
    """An event as the table shows it: when, what, in words, and the facts that the words leave out."""
    text, rest = describe(event)
    return {
        "time": moment(event.get("time")),
        "event": str(event.get("event", "?")),
        "said": text,
        "facts": [(key, short(value)) for key, value in rest.items()],
    }


def attempt_rows(told: Numbers, events: Sequence[Line]) -> list[dict[str, str]]:
    """Each attempt: when, for how long, from where to where, on what, in which job, and how it ended."""
    starts = [event for event in of(events, "start") if is_number(event.get("time"))]
    jobs = [event for event in of(events, "job") if is_number(event.get("time"))]
    rows = []
    for attempt, start in zip(told.attempts, starts):
        before = [job for job in jobs if job["time"] <= start["time"]]
        hosts = start.get("hosts") or ([start["host"]] if start.get("host") else [])
        ranks, stage = start.get("ranks"), start.get("zero_stage")
        rows.append(
            {
                "began": moment(attempt.began),
                "lasted": duration(attempt.ended - attempt.began),
                "steps": f"{attempt.first_step:,} – {attempt.last_step:,}",
                "lost": f"{attempt.lost_steps:,} lost" if attempt.lost_steps else "",
                "ranks": short(ranks) if ranks is not None else "–",
                "stage": f"ZeRO-{stage}" if isinstance(stage, int) else "",
                "hosts": short(hosts) if hosts else "–",
                "job": short(before[-1].get("job_id")) if before else "–",
                "end": _end(attempt, told),
            }
        )
    return rows


def _end(attempt: Attempt, told: Numbers) -> str:
    if attempt.last_word == "fault" or attempt.reason:
        return f"a fault: {short(attempt.reason)}" if attempt.reason else "a fault"
    word = {"end": "complete", "signal": "stopped by a signal"}.get(attempt.last_word)
    return word or (
        "killed (no exit message)" if attempt.ended in told.killed else "goes on, or ended without an event"
    )
