"""How a run went: figures of its attempts, saves and faults, and its events as rows."""

from typing import Any

from uniemox_dist.report.summary import moment
from uniemox_dist.runtime.story import Numbers
from uniemox_dist.runtime.words import counted, duration, short, size, tell


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
        ("Stops", str(told.stops), "by signals", ""),
        ("Killed", str(len(told.killed)), "without a word", "bad" if told.killed else ""),
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
    said, rest = tell(event)
    return {
        "time": moment(event.get("time")),
        "event": str(event.get("event", "?")),
        "said": said,
        "facts": [(key, short(value)) for key, value in rest.items()],
    }
