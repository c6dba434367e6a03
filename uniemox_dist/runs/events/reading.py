"""Reads the lines of events.jsonl: the class of each line, its text, and the cause of a fault.

Reading is tolerant: files of all versions are read, so any field may be missing or have another type, and a line may be
of a kind that this version does not know.
"""

from collections.abc import Sequence

from uniemox_dist.core.errors import is_lost_contact
from uniemox_dist.core.formatting import cut, short
from uniemox_dist.runs.events import jobs, training
from uniemox_dist.runs.events.base import Event, Facts, Line
from uniemox_dist.runs.events.jobs import Restart
from uniemox_dist.runs.events.training import BadSample, FaultEvent

CLASSES: tuple[type[Event], ...] = tuple(
    found
    for module in (training, jobs)
    for found in vars(module).values()
    if isinstance(found, type) and issubclass(found, Event) and found is not Event
)
"""All classes of events."""


def find_class(line: Line) -> type[Event] | None:
    """The class of a line of events.jsonl; None for a kind that this version does not know."""
    if line.get("event") == FaultEvent.kind:
        return BadSample if "damaged" in line else FaultEvent
    return next((found for found in CLASSES if found.kind == line.get("event")), None)


def describe(line: Line) -> tuple[str, Line]:
    """An event as text, and its values that the text leaves out. Of an unknown kind the text is its name."""
    facts, found = Facts(line), find_class(line)
    text = found.describe(facts) if found is not None else cut(str(line.get("event")))
    return text, {key: value for key, value in line.items() if key not in facts.read}


def format_event(line: Line) -> str:
    """An event as text; of a kind that this version does not know, its name and values."""
    text, rest = describe(line)
    if find_class(line) is not None or not rest:
        return text
    return f"{text}: " + ", ".join(f"{cut(key)} {short(value)}" for key, value in rest.items())


def ends_attempt(line: Line) -> bool:
    """Whether an attempt writes nothing after this event.

    Old versions wrote no `ends`: their faults that did not end the attempt have a step, a sample or a checkpoint.
    """
    if line.get("event") == FaultEvent.kind:
        return bool(line.get("ends", not {"step", "damaged", "set_aside"} & line.keys()))
    found = find_class(line)
    return found is not None and found.final


def is_between_attempts(line: Line) -> bool:
    """Whether an event is written between two attempts, by the job or the launcher."""
    found = find_class(line)
    return found is not None and found.between


def select_kind(events: Sequence[Line], kind: type[Event]) -> list[Line]:
    """Selects the events of a kind."""
    return [event for event in events if event.get("event") == kind.kind]


def find_fault(events: Sequence[Line], death: str = "") -> str | None:
    """The cause of the end of an attempt, in one line: the most specific one that is known.

    The order is: an error of a rank, the first one written; then how a rank died, as the launcher saw it; then lost
    contact with another rank, which only follows from the fault of that rank.

    Args:
        events: events of the attempt. Damaged samples, which were replaced, are not faults.
        death: how a rank died, such as `rank 1 (pid 7) died of SIGKILL`, if the launcher knows.

    Returns:
        None if nothing is known, which means that the ranks were killed.
    """
    faults = [event for event in events if event.get("event") == "fault" and "error" in event]
    ending = [fault for fault in faults if ends_attempt(fault)] or faults[-1:]
    # Of several faults, one that another attempt would repeat is the one to report.
    ending.sort(key=lambda fault: fault.get("restart") is not False)
    errors = [" ".join(str(fault["error"]).split()) for fault in ending]
    seen = [" ".join(str(e["reason"]).split()) for e in select_kind(events, Restart) if e.get("reason")]
    specific = [error for error in errors if not is_lost_contact(error)]
    if specific:
        return f"{specific[0]}; {death}" if death else specific[0]
    deaths = [text for text in (death, *seen) if text and not is_lost_contact(text)]
    return next(iter([*deaths, *errors, *seen]), None)
