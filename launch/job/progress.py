"""What a run's events tell of its attempts inside Slurm jobs: how many came to nothing, and how the last one went.

An attempt begins with an event `job` (a job's first in an allocation) or `restart` (a further one in the same).
Pure: events in, facts out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]
BEGINS = ("job", "restart")


@dataclass(frozen=True)
class Progress:
    """Where a run stands between two attempts."""

    in_vain: int = 0
    """Restarts and requeues in a row without a newer complete checkpoint."""
    attempts: int = 0
    """In all."""
    last: list[Event] = field(default_factory=list)
    """The events of the last attempt."""

    @property
    def faults(self) -> list[Event]:
        """The faults of the last attempt; damaged samples, which were replaced, are none."""
        return [event for event in self.last if event.get("event") == "fault" and "error" in event]

    @property
    def hopeless(self) -> Event | None:
        """A fault that would only happen again, as the run itself knows."""
        return next((fault for fault in self.faults if fault.get("restart") is False), None)

    @property
    def signalled(self) -> bool:
        """Whether a signal asked the last attempt to stop."""
        return self.said("signal")

    def said(self, kind: str, **facts: Any) -> bool:
        """Whether the last attempt has an event of this kind with these facts."""
        wanted = {"event": kind, **facts}
        return any(wanted.items() <= {key: event.get(key) for key in wanted}.items() for event in self.last)

    def reason(self, code: int) -> str:
        """The fault that ended the last attempt, in few words."""
        told = [fault for fault in self.faults if fault.get("ends")] or self.faults[-1:]
        # A rank that was killed made the others fail, whatever they say: "another rank is gone" is told last.
        told.sort(key=lambda fault: "another rank is gone" in str(fault["error"]))
        if told:
            return " ".join(str(told[0]["error"]).split())
        return f"srun ended with exit code {code} (what the ranks said is in the main log)"


def progress(events: Sequence[Event]) -> Progress:
    """Counts over all events of a run. A submission by a person begins to count anew; what Slurm queued again does not,
    nor what a job submitted in its own place. A job that was queued again after a complete save lost nothing."""
    in_vain = attempts = 0
    best: int | None = None
    clean = False
    last: list[Event] = []
    for event in events:
        kind, step = event.get("event"), event.get("step")
        if kind in BEGINS:
            attempts, last = attempts + 1, []
            if kind == "job" and not event.get("restarts") and event.get("after") is None:
                in_vain = 0
            elif not clean:
                in_vain += 1
            clean = False
            continue
        last.append(event)
        if kind == "save" and isinstance(step, int) and (best is None or step > best):
            best, in_vain = step, 0
        saved = kind == "requeue" or (kind == "signal" and event.get("saved") is True)
        clean = saved or (clean and kind != "fault")
    return Progress(in_vain, attempts, last)
