"""What the lines of a run's two files amount to: which metrics stand, how far it is, what each attempt did.

Pure: lines in, facts out. Keys may be missing and values may be of other types: files of all versions are read.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from uniemox_dist.runtime.words import is_number

Line = dict[str, Any]


@dataclass(frozen=True)
class History:
    """What happened on the way to the weights that a run has now."""

    lines: list[Line]
    """Metrics in the order of steps, each step once."""
    resumes: list[int]
    """Steps from which the run went on after a stop."""
    skips: list[int]
    """Steps that changed no weight."""


@dataclass(frozen=True)
class Length:
    """How many steps a run has."""

    steps: int | None = None
    """None where neither the configuration nor the metrics tell."""
    exact: bool = True
    """False where it follows from rounded epochs."""


@dataclass
class Attempt:
    """From one start to the last sign of life before the next."""

    began: float
    """Seconds since 1970, as all times here."""
    first_step: int
    ended: float = 0.0
    last_step: int = 0
    last_word: str = ""
    """The kind of the event that ended it; empty if it goes on, or was killed."""
    lost_steps: int = 0
    """Steps that the next attempt had to do again; at least, as only steps with a line are seen."""
    reason: str = ""
    """What ended it, as the launcher saw it when it restarted; empty if it did not, or did not say."""


@dataclass(frozen=True)
class Numbers:
    """Counts and medians over all attempts."""

    attempts: list[Attempt]
    restarts: int
    """By the launcher, after faults."""
    stops: int
    """By signals."""
    faults: int
    damaged: int
    """Replacements of damaged pictures."""
    skipped: int
    spikes: int
    saves: int
    save_s: float | None
    """Median seconds of a save."""
    blocked_s: float | None
    """Median seconds for which a save kept the steps waiting."""
    save_bytes: float | None
    """Median bytes of a save."""
    stragglers: list[tuple[str, int, float | None]] = field(default_factory=list)
    """(host, how often one of its ranks was slow, the most medians of time that it took), the most frequent first."""
    over: bool = False
    """Whether the last attempt is known to be over, as those before it are."""

    @property
    def killed(self) -> list[float]:
        """When attempts that are over wrote their last line, if nobody said why they ended."""
        over = self.attempts if self.over else self.attempts[:-1]
        return [attempt.ended for attempt in over if not attempt.last_word and not attempt.reason]

    @property
    def lost_steps(self) -> int:
        """Steps done beyond the checkpoints that were resumed."""
        return sum(attempt.lost_steps for attempt in self.attempts)

    @property
    def worked_s(self) -> float:
        """Seconds from each start to the last sign of life before the next."""
        return sum(attempt.ended - attempt.began for attempt in self.attempts)


def history(metrics: Sequence[Line], events: Sequence[Line]) -> History:
    """What stands of a run's files: a (re)start at step s discards what was written beyond s before."""
    kept: list[Line] = []
    for line in metrics:
        if not isinstance(line.get("step"), int):
            continue
        # A step that comes again replaces the earlier one and all that had followed it.
        while kept and kept[-1]["step"] >= line["step"]:
            kept.pop()
        kept.append(line)
    # Lines beyond the checkpoint that have not been overtaken yet (or are never met).
    for start in of(events, "start"):
        time, step = number(start.get("time")), number(start.get("step"))
        kept = [line for line in kept if not (line["step"] > step and number(line.get("time")) < time)]
    skips: list[int] = []
    for event in events:
        if event.get("event") == "start":
            skips = [step for step in skips if step <= number(event.get("step", 0))]
        elif event.get("event") == "skip" and isinstance(event.get("step"), int):
            skips.append(event["step"])
    resumes = {e["step"] for e in of(events, "resume") if isinstance(e.get("step"), int)}
    return History(kept, sorted(resumes), skips)


def number(value: Any) -> float:
    """A number as it is, and NaN for what is none."""
    return float(value) if isinstance(value, int | float) else math.nan


def sections(config: Any) -> dict[str, dict[str, Any]]:
    """Those parts of a run's config.yaml that are sections; what else it holds, or is, tells nothing."""
    found = config.items() if isinstance(config, dict) else ()
    return {str(key): value for key, value in found if isinstance(value, dict)}


def of(events: Sequence[Line], kind: str) -> list[Line]:
    """The events of a kind."""
    return [event for event in events if event.get("event") == kind]


def ends_attempt(event: Line) -> bool:
    """Whether an attempt writes nothing more after this event. Faults of earlier versions did not say so: those that
    went on had a step, or named a picture; and so does one about a checkpoint that was set aside."""
    if event.get("event") == "fault":
        return bool(event.get("ends", not {"step", "damaged", "set_aside"} & event.keys()))
    return event.get("event") in ("signal", "end")


def steps_done(events: Sequence[Line], lines: Sequence[Line]) -> int:
    """The largest step that the last attempt is known to have reached."""
    first = max((i for i, event in enumerate(events) if event.get("event") == "start"), default=0)
    began = number(events[first].get("time")) if events else math.nan
    stamped = [*events[first:], *(line for line in lines[-1:] if not number(line.get("time")) < began)]
    return max((x["step"] for x in stamped if isinstance(x.get("step"), int)), default=0)


def run_length(config: Mapping[str, Any], events: Sequence[Line], lines: Sequence[Line], step: int) -> Length:
    """The steps of the whole run. `lines` are the metrics that stand, `step` is how far it is."""
    run, data = config.get("run") or {}, config.get("data") or {}
    batch = (config.get("batch") or {}).get("global_batch")
    if run.get("max_steps") is not None:
        return Length(run["max_steps"])
    if any(event.get("step") == step for event in of(events, "end")):
        return Length(step)
    stated, epochs = data.get("epoch_samples"), lines[-1].get("epoch") if lines else None
    if batch and run.get("epochs") and (stated or epochs):
        # The size of the data is not in the run's folder, but follows from slots per (rounded) epoch.
        samples = stated or lines[-1].get("slots", 0) / epochs
        return Length(math.ceil(round(run["epochs"] * samples / batch, 2)), exact=bool(stated))
    return Length()


def attempts(metrics: Sequence[Line], events: Sequence[Line]) -> list[Attempt]:
    """What was done between starts, in order."""
    found: list[Attempt] = []
    goes_on = False  # what comes after an end and before the next start is not about the attempt that ended
    for event in events:
        time, step = event.get("time"), event.get("step")
        if not is_number(time):
            continue
        if event.get("event") == "start":
            first = step if isinstance(step, int) else 0
            found.append(Attempt(time, first, time, first))
            goes_on = True
        elif event.get("event") == "restart":
            if found and not found[-1].reason:
                found[-1].reason = str(event.get("reason") or "")
            goes_on = False
        elif found and goes_on:
            found[-1].ended = max(found[-1].ended, time)
            if isinstance(step, int):
                found[-1].last_step = max(found[-1].last_step, step)
            found[-1].last_word = str(event["event"]) if ends_attempt(event) else ""
            goes_on = not found[-1].last_word
    for i, attempt in enumerate(found):
        until = found[i + 1].began if i + 1 < len(found) else math.inf
        for line in metrics:
            if attempt.began <= number(line.get("time")) < until:
                attempt.ended = max(attempt.ended, line["time"])
                if isinstance(line.get("step"), int):
                    attempt.last_step = max(attempt.last_step, line["step"])
        if i + 1 < len(found):
            attempt.lost_steps = max(0, attempt.last_step - found[i + 1].first_step)
    return found


def numbers(metrics: Sequence[Line], events: Sequence[Line], *, over: bool = False) -> Numbers:
    """Counts and medians of a run; `over` says that its last attempt is, which its lines may not tell."""
    faults, saves, slow = of(events, "fault"), of(events, "save"), of(events, "straggler")
    damaged = sum("damaged" in event for event in faults)
    hosts = Counter(str(event.get("host", "?")) for event in slow)
    worst = {
        host: max(
            (_times_slower(event) for event in slow if str(event.get("host", "?")) == host), default=math.nan
        )
        for host in hosts
    }
    return Numbers(
        attempts=attempts(metrics, events),
        restarts=len(of(events, "restart")),
        stops=_stops(events),
        faults=len(faults) - damaged,
        damaged=damaged,
        skipped=len(history([], events).skips),
        spikes=len(of(events, "spike")),
        saves=len(saves),
        save_s=_median(saves, "seconds"),
        blocked_s=_median(saves, "blocked_s"),
        save_bytes=_median(saves, "bytes"),
        stragglers=[
            (host, count, worst[host] if math.isfinite(worst[host]) else None)
            for host, count in hosts.most_common()
        ],
        over=over,
    )


def _stops(events: Sequence[Line]) -> int:
    """Stops by signals; the ranks and their launcher may each tell of the same one."""
    turns = [event.get("event") for event in events if event.get("event") in ("start", "restart", "signal")]
    return sum(kind == "signal" != before for before, kind in zip(["", *turns], turns))


def _times_slower(event: Line) -> float:
    seconds, usual = event.get("seconds"), event.get("median_s")
    # -inf, not NaN: a comparison with NaN would hide the values beside it.
    return seconds / usual if is_number(seconds) and is_number(usual) and usual > 0 else -math.inf


def _median(events: Sequence[Line], key: str) -> float | None:
    values = [event[key] for event in events if is_number(event.get(key))]
    return median(values) if values else None
