"""The attempts of a run inside Slurm jobs, counted from its events."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from uniemox_dist.runs.events.base import Event, Line
from uniemox_dist.runs.events.reading import find_fault, select_kind
from uniemox_dist.runs.events.training import FaultEvent


@dataclass(frozen=True)
class JobAttempts:
    """The attempts of a run inside Slurm jobs. One begins with an event `job` or `restart`."""

    in_vain: int = 0
    """Restarts and requeues in a row without a newer complete checkpoint."""
    count: int = 0
    last: list[Line] = field(default_factory=list)
    """The events of the last attempt."""

    @property
    def hopeless(self) -> Line | None:
        """A fault of the last attempt that another attempt would repeat."""
        faults = [event for event in select_kind(self.last, FaultEvent) if "error" in event]
        return next((fault for fault in faults if fault.get("restart") is False), None)

    def has(self, kind: type[Event], **values: Any) -> bool:
        """Whether the last attempt has an event of this kind with the given values."""
        return any(
            all(event.get(key) == value for key, value in values.items())
            for event in select_kind(self.last, kind)
        )

    def reason(self, code: int) -> str:
        """The cause of the last attempt's end."""
        return (
            find_fault(self.last)
            or f"srun ended with exit code {code} (see the ranks' messages in the main log)"
        )


def count_attempts(events: Sequence[Line]) -> JobAttempts:
    """Counts the attempts of a run.

    The count of attempts in vain restarts when a person submits the run, but not when Slurm requeues a job or a job
    submits another one in its place. A job that was requeued after a complete save lost nothing.
    """
    in_vain = count = 0
    best: int | None = None
    clean = False
    last: list[Line] = []
    for event in events:
        kind, step = event.get("event"), event.get("step")
        if kind in ("job", "restart"):
            count, last = count + 1, []
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
    return JobAttempts(in_vain, count, last)
