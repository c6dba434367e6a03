"""The history of a run, folded from its events.jsonl and metrics.jsonl.

`History` answers every question about the past of a run: which metrics are valid, where it resumed, its attempts, how
often each kind of event occurred, and the cause of the last fault. It reads no files. Keys may be
missing and values may have other types, because files of all versions are read.
"""

import math
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from statistics import median
from typing import Any

from uniemox_dist.core.formatting import is_number
from uniemox_dist.runs.events.base import Event, Line
from uniemox_dist.runs.events.reading import ends_attempt, find_fault, is_between_attempts, select_kind
from uniemox_dist.runs.events.training import End, FaultEvent, Skip, Spike, Start, Straggler
from uniemox_dist.runs.metric_table import MetricTable, column, number

KILLED = "killed (no exit message)"
"""The text for the end of an attempt without an event about it."""


def select_sections(config: Any) -> dict[str, dict[str, Any]]:
    """The sections of a run's config.yaml; other values are left out."""
    found = config.items() if isinstance(config, dict) else ()
    return {str(key): value for key, value in found if isinstance(value, dict)}


@dataclass
class Attempt:
    """An attempt to train, from its start event to its last line before the next start."""

    began: float
    """Seconds since 1970, like all times in this module."""
    first_step: int
    ended: float = 0.0
    last_step: int = 0
    last_kind: str = ""
    """The kind of the event that ended it; empty if it continues or was killed."""
    lost_steps: int = 0
    """Steps that the next attempt repeats. This is a lower bound, because only steps with a line are counted."""
    reason: str = ""
    """The cause of its end, if it failed and one is known."""
    events: list[Line] = field(default_factory=list, repr=False, compare=False)


@dataclass(frozen=True)
class Length:
    """The number of steps of a run."""

    steps: int | None = None
    """None if neither the configuration nor the metrics state it."""
    exact: bool = True
    """False if it is computed from rounded epochs."""


@dataclass(frozen=True)
class History:
    """A run's past; `metrics` may be only its last lines, or a `MetricTable` for a run of any length."""

    metrics: Sequence[Line]
    events: Sequence[Line]

    def select(self, kind: type[Event]) -> list[Line]:
        """The events of a kind."""
        return select_kind(self.events, kind)

    @cached_property
    def lines(self) -> Sequence[Line]:
        """The metrics that led to the present weights, each step once: a start at step s discards earlier lines
        beyond s."""
        steps, times = column(self.metrics, "step"), column(self.metrics, "time")
        kept = array("q")
        for i, step in enumerate(steps):
            if math.isnan(step):
                continue
            while kept and steps[kept[-1]] >= step:  # the step was repeated after a resume
                kept.pop()
            kept.append(i)
        # Lines beyond the checkpoint that have not been overtaken yet.
        starts = sorted(
            (number(start["time"]), number(start["step"]))
            for start in self.select(Start)
            if is_number(start.get("time")) and is_number(start.get("step"))
        )
        began = [time for time, _ in starts]
        lowest = [math.inf]  # the smallest step of the starts from each one on
        for _, step in reversed(starts):
            lowest.append(min(lowest[-1], step))
        lowest.reverse()
        kept = array("q", (i for i in kept if steps[i] <= lowest[bisect_right(began, times[i])]))
        if isinstance(self.metrics, MetricTable):
            return self.metrics.select(kept)
        return [self.metrics[i] for i in kept]

    @cached_property
    def resumes_by_step(self) -> dict[int, str]:
        """Steps at which the run resumed, and why: `restart` by the launcher, `requeue` of its job, or `resume`."""
        found: dict[int, str] = {}
        cause = "resume"
        for event in self.events:
            kind, step = event.get("event"), event.get("step")
            if kind == "resume" and isinstance(step, int):
                found[step] = cause
                cause = "resume"
            elif kind in ("restart", "requeue"):
                cause = kind
            elif kind == "job" and number(event.get("restarts")) > 0:
                cause = "requeue"
        return found

    @property
    def resumes(self) -> list[int]:
        """Steps at which the run resumed."""
        return sorted(self.resumes_by_step)

    def find_resumes(self, by: str) -> list[int]:
        """Steps at which the run resumed for this reason."""
        return [step for step in self.resumes if self.resumes_by_step[step] == by]

    @cached_property
    def skips(self) -> list[int]:
        """Skipped steps on the way to the present weights."""
        return self._steps_of(Skip)

    @cached_property
    def spikes(self) -> list[int]:
        """Steps of loss spikes on the way to the present weights."""
        return self._steps_of(Spike)

    def _steps_of(self, kind: type[Event]) -> list[int]:
        found: list[int] = []
        for event in self.events:
            step = event.get("step")
            if event.get("event") == Start.kind:
                found = [earlier for earlier in found if earlier <= number(step or 0)]
            elif event.get("event") == kind.kind and isinstance(step, int):
                found.append(step)
        return found

    @cached_property
    def step(self) -> int:
        """The largest step that the last attempt is known to have reached."""
        first = max((i for i, event in enumerate(self.events) if event.get("event") == "start"), default=0)
        began = number(self.events[first].get("time")) if self.events else math.nan
        recent = [line for line in self.lines[-1:] if not number(line.get("time")) < began]
        steps = (
            line["step"] for line in (*self.events[first:], *recent) if isinstance(line.get("step"), int)
        )
        return max(steps, default=0)

    def length(self, config: Mapping[str, Any]) -> Length:
        """The number of steps of the whole run."""
        run, data = config.get("run") or {}, config.get("data") or {}
        batch = (config.get("batch") or {}).get("global_batch")
        if run.get("max_steps") is not None:
            return Length(run["max_steps"])
        if any(event.get("step") == self.step for event in self.select(End)):
            return Length(self.step)
        stated, epochs = data.get("epoch_samples"), self.lines[-1].get("epoch") if self.lines else None
        if batch and run.get("epochs") and (stated or epochs):
            # The run's folder does not contain the size of the data; it is estimated from slots per (rounded) epoch.
            samples = stated or self.lines[-1].get("slots", 0) / epochs
            return Length(math.ceil(round(run["epochs"] * samples / batch, 2)), exact=bool(stated))
        return Length()

    @cached_property
    def attempts(self) -> list[Attempt]:
        """The attempts to train, in order."""
        found: list[Attempt] = []
        open_ = False  # events after the end of an attempt and before the next start belong to neither
        for event in self.events:
            time, step = event.get("time"), event.get("step")
            if not is_number(time):
                continue
            if event.get("event") == "start":
                first = step if isinstance(step, int) else 0
                found.append(Attempt(time, first, time, first))
                open_ = True
            elif is_between_attempts(event):
                if found and event["event"] == "restart" and not found[-1].reason:
                    found[-1].reason = find_fault([*found[-1].events, event]) or ""
                open_ = False
            elif found:
                found[-1].events.append(event)
                if open_:
                    found[-1].ended = max(found[-1].ended, time)
                    if isinstance(step, int):
                        found[-1].last_step = max(found[-1].last_step, step)
                    found[-1].last_kind = str(event["event"]) if ends_attempt(event) else ""
                    open_ = not found[-1].last_kind
        for attempt in found:
            if attempt.last_kind == "fault" and not attempt.reason:
                attempt.reason = find_fault(attempt.events) or ""
        began = list(accumulate((attempt.began for attempt in found), max))
        for time, step in zip(column(self.metrics, "time"), column(self.metrics, "step")):
            if math.isnan(time) or not (number_of := bisect_right(began, time)):
                continue
            attempt = found[number_of - 1]
            attempt.ended = max(attempt.ended, time)
            if not math.isnan(step):
                attempt.last_step = max(attempt.last_step, int(step))
        for attempt, following in pairwise(found):
            attempt.lost_steps = max(0, attempt.last_step - following.first_step)
        return found

    @cached_property
    def last_fault(self) -> str | None:
        """The cause of the last attempt's end; None if no event states one."""
        events: list[Line] = []
        for event in reversed(self.events):
            # A restart belongs to the previous attempt, unless a later attempt failed before it began to train.
            if event.get("event") == "start" or (
                is_between_attempts(event) and select_kind(events, FaultEvent)
            ):
                break
            events.append(event)
        return find_fault(events[::-1])

    def find_killed(self, *, over: bool = False) -> list[float]:
        """When each attempt that ended without a message wrote its last line.

        Args:
            over: whether the last attempt has ended, as all earlier ones have.
        """
        ended = self.attempts if over else self.attempts[:-1]
        return [attempt.ended for attempt in ended if not attempt.last_kind and not attempt.reason]

    @property
    def lost_steps(self) -> int:
        """Number of steps that were repeated after a resume."""
        return sum(attempt.lost_steps for attempt in self.attempts)

    @property
    def work_s(self) -> float:
        """Seconds from each start to the last line before the next start."""
        return sum(attempt.ended - attempt.began for attempt in self.attempts)

    @property
    def faults(self) -> int:
        """Number of faults; damaged samples that were replaced do not count."""
        return len(self.select(FaultEvent)) - self.bad_samples

    @property
    def bad_samples(self) -> int:
        """Number of damaged samples that were replaced."""
        return sum("damaged" in event for event in self.select(FaultEvent))

    @property
    def requeues(self) -> int:
        """How often the run was requeued: it continued from the queue, or waits there."""
        turns = [event for event in self.events if event.get("event") in ("requeue", "job")]
        # Slurm itself requeues the jobs of lost nodes, which only the next start of the job shows.
        again = sum(event["event"] == "job" and number(event.get("restarts")) > 0 for event in turns)
        return again + bool(turns and turns[-1]["event"] == "requeue")

    @property
    def stops(self) -> int:
        """Number of stops by signals. The ranks and their launcher may both write an event about the same stop."""
        turns = [e.get("event") for e in self.events if e.get("event") in ("start", "restart", "signal")]
        return sum(kind == "signal" != before for before, kind in zip(["", *turns], turns))

    @property
    def stragglers(self) -> list[tuple[str, int, float | None]]:
        """(host, how often one of its ranks was slow, its largest multiple of the median), the most frequent first."""
        slow = self.select(Straggler)
        counts = Counter(str(event.get("host", "?")) for event in slow)
        found: list[tuple[str, int, float | None]] = []
        for host, count in counts.most_common():
            times = [_times_slower(event) for event in slow if str(event.get("host", "?")) == host]
            found.append((host, count, max((x for x in times if x is not None), default=None)))
        return found

    def median_of(self, kind: type[Event], key: str) -> float | None:
        """The median of a value over the events of a kind; None if none has it."""
        values = [event[key] for event in self.select(kind) if is_number(event.get(key))]
        return median(values) if values else None


def _times_slower(event: Line) -> float | None:
    seconds, usual = event.get("seconds"), event.get("median_s")
    return seconds / usual if is_number(seconds) and is_number(usual) and usual > 0 else None
