"""Events that the ranks of a run write: start and resume, saves, skipped steps, faults, and the end."""

from dataclasses import dataclass

from uniemox_dist.core.formatting import counted, cut, is_number, short, size
from uniemox_dist.runs.events.base import Event, Facts, Lane


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
    lane = Lane("saves", "|", "machine", row=10)
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
    lane = Lane("skipped", "x", "skip", row=20)
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
    lane = Lane("spikes", "^", "wait", row=30)
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
    lane = Lane("slow ranks", "s", "similarity", row=40)
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
    lane = Lane("pictures replaced", ".", "muted", row=50)
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
    lane = Lane("faults", "X", "bad", row=60)
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
class Signal(Event):
    """A signal stopped the attempt."""

    kind = "signal"
    tone = "wait"
    lane = Lane("stops", "s", "wait", row=110)
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
