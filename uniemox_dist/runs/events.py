"""The events of a run: one class per kind, with the fields it writes to events.jsonl and the text that people read.

To add a kind, define a class here and write it with `RunFolder.write`. The terminal, the report page and `uniemox
status` then print its `describe`, and the page's timeline draws it if the class has a `lane`.

Reading is tolerant: files of all versions are read, so any field may be missing or have another type, and a line may be
of a kind that this version does not know.
"""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, NamedTuple

from uniemox_dist.core.formatting import counted, cut, is_number, short, size

Line = dict[str, Any]
"""A line of events.jsonl or metrics.jsonl."""


class Lane(NamedTuple):
    """A row of marks in the page's timeline; kinds with the same title share a row."""

    title: str
    mark: str
    """A marker of matplotlib."""
    colour: str
    """A name of `runs.report.svg.COLOURS`."""


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

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        CLASSES.append(cls)

    def line(self) -> Line:
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


CLASSES: list[type[Event]] = []
"""All classes of events, in the order of the timeline's rows."""


@dataclass(frozen=True, kw_only=True)
class Start(Event):
    """An attempt begins to train."""

    kind = "start"
    step: int
    ranks: int
    zero_stage: int
    precision: str
    teacher: str | None
    """Source of the teacher's embeddings: live or cache; None without a teacher."""
    host: str
    """The host of rank 0."""
    hosts: list[str]
    versions: dict[str, str | None]

    @staticmethod
    def describe(facts: Facts) -> str:
        teacher, hosts, host = facts("teacher"), facts("hosts"), facts.text("host", before="host ")
        several = isinstance(hosts, list) and len(hosts) > 1
        parts = [
            facts.layout("ranks", "zero_stage"),
            f"{counted(len(hosts), 'host')} ({short(hosts)})" if several else host,
            facts.text("precision"),
            f"teacher {cut(teacher)}" if isinstance(teacher, str) else "",
        ]
        versions = facts("versions")
        if isinstance(versions, dict):
            names = (name for name in ("uniemox-dist", "torch", "deepspeed") if versions.get(name))
            parts.append(cut(", ".join(f"{name} {versions[name]}" for name in names)))
        about = "; ".join(part for part in parts if part)
        return "started" + facts.number("step", before=" at step ") + (f" on {about}" if about else "")


@dataclass(frozen=True, kw_only=True)
class FirstStep(Event):
    """The first step of an attempt is done."""

    kind = "started"
    step: int
    """Steps before it."""
    seconds: dict[str, float]
    """Seconds of each phase of the start, and `total`."""

    @staticmethod
    def describe(facts: Facts) -> str:
        seconds = facts("seconds") or facts("parts")
        parts = {k: v for k, v in seconds.items() if is_number(v)} if isinstance(seconds, dict) else {}
        total = parts.pop("total", sum(parts.values()) if parts else None)
        phases = ", ".join(f"{cut(str(part)).replace('_', ' ')} {value:.1f}" for part, value in parts.items())
        took = f", {total:.1f} s after the start" if total is not None else ""
        step = facts.number("step", before=" after step ")
        return f"first step{step}{took}" + (f": {phases}" if phases else "")


@dataclass(frozen=True, kw_only=True)
class Resume(Event):
    """An attempt loaded a checkpoint of the run."""

    kind = "resume"
    tone = "wait"
    step: int
    checkpoint: str
    ranks: int
    """Ranks that wrote the checkpoint."""
    zero_stage: int

    @staticmethod
    def describe(facts: Facts) -> str:
        layout, step = facts.layout("ranks", "zero_stage"), facts.number("step", before=" from step ")
        name = facts.text("checkpoint", before=" from ") or step
        return f"resumed{name}" + (f", a checkpoint of {layout}" if layout else "")


@dataclass(frozen=True, kw_only=True)
class Convert(Event):
    """The checkpoint was written by another number of ranks, or at another ZeRO stage."""

    kind = "convert"
    tone = "wait"
    step: int
    from_ranks: int
    from_zero_stage: int
    ranks: int
    zero_stage: int

    @staticmethod
    def describe(facts: Facts) -> str:
        before, now = facts.layout("from_ranks", "from_zero_stage"), facts.layout("ranks", "zero_stage")
        step = facts.number("step", before=" of step ")
        return f"converted the checkpoint{step} from {before or 'another layout'} to {now or 'this layout'}"


@dataclass(frozen=True, kw_only=True)
class Init(Event):
    """The student starts from weights of a file (`model.init_from`)."""

    kind = "init"
    init_from: str
    layout: str
    """The family that the file's names belong to."""
    loaded: int
    """Number of parameters that were loaded."""
    missing: list[str]
    unexpected: list[str]
    resampled: dict[str, str]

    @staticmethod
    def describe(facts: Facts) -> str:
        parts = [facts.number("loaded", after=" parameters loaded")]
        for key in ("missing", "unexpected", "resampled"):
            value = facts.line.get(key)
            if isinstance(value, list | dict):
                parts.append(f"{len(value)} {key}")
                if not value:
                    facts(key)
        about = ", ".join(part for part in parts if part)
        name = facts.text("init_from", before=" from ") + facts.text("layout", before=" (", after=")")
        return f"initial weights{name}" + (f": {about}" if about else "")


@dataclass(frozen=True, kw_only=True)
class Save(Event):
    """A checkpoint is complete."""

    kind = "save"
    lane = Lane("saves", "|", "machine")
    step: int
    bytes: int
    write_s: float
    """Seconds that the slowest rank wrote."""
    removed: list[str]
    """Checkpoints that were deleted in exchange."""
    seconds: float
    """Seconds from begin to end."""
    blocked_s: float
    """Seconds that training waited."""

    @staticmethod
    def describe(facts: Facts) -> str:
        count = facts("bytes")
        parts = [
            size(count) if is_number(count) else "",
            facts.number("seconds", ".2f", before="in ", after=" s"),
            facts.number("write_s", ".2f", before="(", after=" s of writing)"),
        ]
        about = " ".join(part for part in parts if part)
        step, removed = facts.number("step", before=" step "), facts.text("removed", before="; removed ")
        blocked = facts.number("blocked_s", ".2f", before=", training waited ", after=" s")
        return f"saved{step}" + (f": {about}" if about else "") + blocked + removed


@dataclass(frozen=True, kw_only=True)
class Skip(Event):
    """A step changed no weight, because its loss or its gradients were not finite."""

    kind = "skip"
    tone = "bad"
    lane = Lane("skipped", "x", "skip")
    step: int
    in_a_row: int
    """Steps skipped in a row, this one included."""
    loss: str
    where: str
    """loss or gradients."""

    @staticmethod
    def describe(facts: Facts) -> str:
        what = "the gradients were" if facts("where") == "gradients" else "the loss was"
        row, step = facts("in_a_row"), facts.number("step", before=" step ")
        in_a_row = f"; {counted(row, 'step')} in a row" if isinstance(row, int) and row > 1 else ""
        # The loss is a number in old files, and a word such as nan or 2.31 in new ones.
        loss = facts.number("loss", ".4g", before=" (loss ", after=")")
        loss = loss or facts.text("loss", before=" (loss ", after=")")
        return f"skipped{step}: {what} not finite{loss}{in_a_row}"


@dataclass(frozen=True, kw_only=True)
class Spike(Event):
    """The loss of a step was far above the running median."""

    kind = "spike"
    tone = "wait"
    lane = Lane("spikes", "^", "wait")
    step: int
    loss: float
    median: float

    @staticmethod
    def describe(facts: Facts) -> str:
        loss, median, step = facts("loss"), facts("median"), facts.number("step", before=" at step ")
        if is_number(loss) and is_number(median) and median > 0:
            return f"loss spike{step}: {loss:.4g}, {loss / median:.1f} times the running median {median:.4g}"
        return f"loss spike{step}"


@dataclass(frozen=True, kw_only=True)
class Straggler(Event):
    """A rank is slower than the median rank."""

    kind = "straggler"
    tone = "wait"
    lane = Lane("slow ranks", "s", "similarity")
    step: int
    rank: int
    host: str
    seconds: float
    """Seconds of its own computing per step."""
    median_s: float
    """Seconds of the median rank."""

    @staticmethod
    def describe(facts: Facts) -> str:
        seconds, median = facts("seconds"), facts("median_s")
        rank = facts.number("rank", "", before="rank ") or "a rank"
        where = facts.text("host", before=" on ") + facts.number("step", before=" at step ")
        if is_number(seconds) and is_number(median) and median > 0:
            ratio = f"{seconds / median:.1f} times the median {median:.3g} s"
            return f"{rank}{where} is slow: {seconds:.3g} s per step, {ratio}"
        return f"{rank}{where} is slow"


@dataclass(frozen=True, kw_only=True)
class BadSample(Event):
    """A damaged sample was replaced. Its kind is `fault`, because early versions reported it as one."""

    kind = "fault"
    tone = "bad"
    lane = Lane("pictures replaced", ".", "muted")
    step: int
    damaged: str

    @staticmethod
    def describe(facts: Facts) -> str:
        place = facts.number("step", before=" at step ") + facts.number("rank", "", before=" on rank ")
        return f"replaced a damaged picture{place}: {short(facts('damaged'))}"


@dataclass(frozen=True, kw_only=True)
class FaultEvent(Event):
    """An error."""

    kind = "fault"
    tone = "bad"
    lane = Lane("faults", "X", "bad")
    rank: int | None = None
    host: str | None = None
    step: int | None = None
    error: str
    ends: bool | None = None
    """True if it ended the attempt; None if training continued."""
    restart: bool | None = None
    """False if another attempt would fail in the same way."""
    code: int | None = None
    """The exit code, if it is not 1."""

    @staticmethod
    def describe(facts: Facts) -> str:
        place = facts.number("step", before=" at step ") + facts.number("rank", "", before=" on rank ")
        place += facts.text("host", before=" of " if "rank" in place else " on ")
        facts("code")
        aside = facts.text("set_aside", before="; it was set aside as ")
        ended = "; it ended this attempt" if facts("ends") else ""
        again = "; another attempt would fail in the same way" if facts("restart") is False else ""
        return f"fault{place}: {facts.text('error') or 'no reason given'}{aside}{ended}{again}"


@dataclass(frozen=True, kw_only=True)
class CheckpointSetAside(Event):
    """A damaged checkpoint was renamed, and an older one is used."""

    kind = "fault"
    tone = "bad"
    lane = FaultEvent.lane
    error: str
    set_aside: str | None
    """Its new name; None if it could not be renamed."""
    describe = FaultEvent.describe


@dataclass(frozen=True, kw_only=True)
class Restart(Event):
    """The launcher starts the ranks again after a fault."""

    kind = "restart"
    tone = "wait"
    lane = Lane("restarts", ">", "restart")
    between = True
    attempt: int
    """Number of the new attempt."""
    left: int
    """Further restarts without a new checkpoint that `run.max_restarts` allows."""
    code: int
    """Exit code of the last attempt."""
    step: int | None
    """Step of the newest checkpoint."""
    reason: str
    pause_s: float

    @staticmethod
    def describe(facts: Facts) -> str:
        counts = [
            facts.number("attempt", "", before="attempt "),
            facts.number("left", "", after=" left without progress"),
        ]
        about = ", ".join(part for part in counts if part)
        code = facts.number("code", "", before=" after exit code ")
        step = facts.number("step", before=", from step ")
        pause = facts.number("pause_s", ".3g", before=" in ", after=" s") if facts("pause_s") else ""
        reason = facts.text("reason", before=": ")
        return (
            f"the launcher restarts the ranks{pause}{code}{step}" + (f" ({about})" if about else "") + reason
        )


@dataclass(frozen=True, kw_only=True)
class Requeue(Event):
    """A Slurm job saved and goes back into the queue."""

    kind = "requeue"
    tone = "wait"
    lane = Lane("requeues", ">", "requeue")
    between = True
    step: int | None
    job_id: int
    by: str
    """slurm, or job if the job requeued itself."""

    @staticmethod
    def describe(facts: Facts) -> str:
        job = facts.number("job_id", "", before="job ") or "the job"
        how = " by Slurm" if facts("by") == "slurm" else ""
        step = facts.number("step", before=", continues from step ")
        return f"{job} was requeued{how}{step}" + facts.text("reason", before=": ")


@dataclass(frozen=True, kw_only=True)
class Resubmit(Event):
    """A Slurm job submits another one that leaves out its bad nodes."""

    kind = "resubmit"
    tone = "wait"
    lane = Requeue.lane
    between = True
    job_id: int
    nodes: list[str]
    """The excluded nodes."""
    reason: str

    @staticmethod
    def describe(facts: Facts) -> str:
        job = facts.number("job_id", "", before="job ") or "the job"
        nodes, reason = facts.text("nodes", before=" without "), facts.text("reason", before=": ")
        return f"{job} was submitted again{nodes}{reason}"


@dataclass(frozen=True, kw_only=True)
class JobStart(Event):
    """A Slurm job begins its first attempt in an allocation."""

    kind = "job"
    lane = Lane("jobs start", "|", "requeue")
    between = True
    job_id: int
    restarts: int
    """How often Slurm has requeued the job."""
    nodes: list[str]
    ranks: int
    idle: int
    """Tasks of the allocation that no rank uses."""
    after: int | None = None
    """The job that submitted this one in its place."""

    @staticmethod
    def describe(facts: Facts) -> str:
        nodes, ranks, idle, restarts = facts("nodes"), facts("ranks"), facts("idle"), facts("restarts")
        parts = [
            counted(ranks, "rank") if isinstance(ranks, int) else "",
            f"on {counted(len(nodes), 'node')} ({short(nodes)})" if isinstance(nodes, list) else "",
        ]
        about = " ".join(part for part in parts if part)
        times = restarts if isinstance(restarts, int) and restarts > 0 else 0
        again = f", requeued {'once' if times == 1 else f'{times} times'}" if times else ""
        instead = facts.number("after", "", before=", in place of job ")
        left = f"; {counted(idle, 'task')} idle" if isinstance(idle, int) and idle else ""
        job = facts.number("job_id", "", before="Slurm job ") or "a Slurm job"
        return f"{job}{again}{instead}" + (f": {about}" if about else "") + left


@dataclass(frozen=True, kw_only=True)
class Signal(Event):
    """A signal stopped the attempt."""

    kind = "signal"
    tone = "wait"
    lane = Lane("stops", "s", "wait")
    final = True
    step: int | None
    signal: str | None
    """Its name; None if only another rank knows it."""
    saved: bool

    @staticmethod
    def describe(facts: Facts) -> str:
        by = facts.text("signal", before=" by ") + facts.number("step", before=" after step ")
        saved = facts("saved")
        remark = ", with a complete save" if saved else ", without a save" if saved is False else ""
        return f"stopped{by}{remark}"


@dataclass(frozen=True, kw_only=True)
class End(Event):
    """The run is complete."""

    kind = "end"
    tone = "good"
    final = True
    step: int
    reason: str | None = None
    """The reason if it ended before its last step."""

    @staticmethod
    def describe(facts: Facts) -> str:
        return "complete" + facts.number("step", before=" at step ") + facts.text("reason", before=": ")


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


def text_of(line: Line) -> str:
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


def between_attempts(line: Line) -> bool:
    """Whether an event is written between two attempts, by the job or the launcher."""
    found = find_class(line)
    return found is not None and found.between


def of_kind(events: Sequence[Line], kind: type[Event]) -> list[Line]:
    """The events of a kind."""
    return [event for event in events if event.get("event") == kind.kind]
