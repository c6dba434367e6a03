"""What each attempt of a run did, and how often what happened in all of them. Pure: lines in, facts out."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from uniemox_dist.core.formatting import is_number
from uniemox_dist.runs.history import Line, ends_attempt, history, number, of

BETWEEN = ("restart", "requeue", "resubmit", "job")
"""Events that are told between two attempts, by what starts them."""


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
    requeues: int
    """Times that a job went on from the queue, or waits there to."""
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
        elif event.get("event") in BETWEEN:
            if event["event"] == "restart" and found and not found[-1].reason:
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
        requeues=_requeues(events),
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


def _requeues(events: Sequence[Line]) -> int:
    """Slurm requeues jobs by itself too, after the loss of a node, and then only the next start tells."""
    turns = [event for event in events if event.get("event") in ("requeue", "job")]
    again = sum(event["event"] == "job" and number(event.get("restarts")) > 0 for event in turns)
    return again + bool(turns and turns[-1]["event"] == "requeue")


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
