"""The base of all events of a run: the fields that a class writes to events.jsonl, and how its text is made."""

from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, NamedTuple

from uniemox_dist.core.formatting import counted, is_number, short

Line = dict[str, Any]
"""A line of events.jsonl or metrics.jsonl."""


class Lane(NamedTuple):
    """A row of marks in the page's timeline; kinds with the same title share a row."""

    title: str
    mark: str
    """A marker of matplotlib."""
    colour: str
    """A name of `runs.report.svg.COLOURS`."""
    row: int
    """Its position from the top of the timeline, in steps of ten."""


class Facts:
    """Reads an event's values by key, and remembers which keys were read."""

    def __init__(self, line: Line) -> None:
        self.line, self.read = line, {"time", "event"}

    def __call__(self, key: str) -> Any:
        self.read.add(key)
        return self.line.get(key)

    def number(self, key: str, form: str = ",", *, before: str = "", after: str = "") -> str:
        """A number between two texts; empty if the value is not a number."""
        value = self(key)
        return f"{before}{value:{form}}{after}" if is_number(value) else ""

    def text(self, key: str, *, before: str = "", after: str = "") -> str:
        """A value between two texts; empty if there is none."""
        value = self(key)
        return f"{before}{short(value)}{after}" if value not in (None, "", []) else ""

    def layout(self, ranks: str, stage: str) -> str:
        """Ranks and ZeRO stage, such as `16 ranks, ZeRO-2`."""
        count = self(ranks)
        parts = [
            counted(count, "rank") if isinstance(count, int) else "",
            self.number(stage, "", before="ZeRO-"),
        ]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Event:
    """An event to write. A field without a default is always written, any other only if it is not None."""

    kind: ClassVar[str]
    """The event's name in events.jsonl."""
    lane: ClassVar[Lane | None] = None
    tone: ClassVar[str] = ""
    """Its colour on the page: good, wait, bad or none."""
    final: ClassVar[bool] = False
    """Whether an attempt writes nothing after it."""
    between: ClassVar[bool] = False
    """Whether it is written between two attempts."""

    def to_line(self) -> Line:
        """Kind and fields, as they are written."""
        found: Line = {"event": self.kind}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is MISSING:
                found[field.name] = value
        return found

    @staticmethod
    def describe(facts: Facts) -> str:
        """The event as text."""
        raise NotImplementedError
