"""What the lines of a run's two files amount to: which metrics stand, how far it is, how far it goes.

Pure: lines in, facts out. Keys may be missing and values may be of other types: files of all versions are read.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
    spikes: list[int] = field(default_factory=list)
    """Steps whose loss leapt."""
    by: dict[int, str] = field(default_factory=dict)
    """What made the run go on from a step last: `restart` by the launcher, `requeue` of its job; others `resume`."""

    def resumed(self, by: str) -> list[int]:
        """The steps from which it went on in that way."""
        return [step for step in self.resumes if self.by.get(step, "resume") == by]


@dataclass(frozen=True)
class Length:
    """How many steps a run has."""

    steps: int | None = None
    """None where neither the configuration nor the metrics tell."""
    exact: bool = True
    """False where it follows from rounded epochs."""


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
    found: dict[str, list[int]] = {"skip": [], "spike": []}
    by: dict[int, str] = {}
    cause = "resume"
    for event in events:
        kind, at = event.get("event"), event.get("step")
        if kind == "start":
            found = {k: [step for step in some if step <= number(at or 0)] for k, some in found.items()}
        elif isinstance(kind, str) and kind in found and isinstance(at, int):
            found[kind].append(at)
        elif kind == "resume" and isinstance(at, int):
            by[at] = cause
            cause = "resume"
        elif kind in ("restart", "requeue"):
            cause = kind
        elif kind == "job" and number(event.get("restarts")) > 0:
            cause = "requeue"
    return History(kept, sorted(by), found["skip"], found["spike"], by)


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
