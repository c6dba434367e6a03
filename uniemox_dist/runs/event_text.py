"""Events of a run as sentences; for the terminal and for the report. Standard library only."""

from collections.abc import Callable
from typing import Any

from uniemox_dist.core.formatting import counted, cut, is_number, short, size


class _Facts:
    """An event's values by key, remembering which were asked for."""

    def __init__(self, event: dict[str, Any]) -> None:
        self.event, self.told = event, {"time", "event"}

    def __call__(self, key: str) -> Any:
        self.told.add(key)
        return self.event.get(key)

    def number(self, key: str, form: str = ",", *, before: str = "", after: str = "") -> str:
        """A number between two texts, or nothing if there is none."""
        value = self(key)
        return f"{before}{value:{form}}{after}" if is_number(value) else ""

    def text(self, key: str, *, before: str = "", after: str = "") -> str:
        """A text between two others, or nothing."""
        value = self(key)
        return f"{before}{short(value)}{after}" if value not in (None, "", []) else ""


def tell(event: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """An event as a sentence, and those of its facts that the sentence leaves out. Any key may be missing."""
    facts = _Facts(event)
    kind = event.get("event")
    sentence = _SENTENCES[kind](facts) if isinstance(kind, str) and kind in _SENTENCES else ""
    rest = {key: value for key, value in event.items() if key not in facts.told}
    return sentence or cut(str(kind)), rest


def sentence(event: dict[str, Any]) -> str:
    """An event as a sentence; of a kind that this version does not know, its name and its facts."""
    said, rest = tell(event)
    if event.get("event") in _SENTENCES or not rest:
        return said
    return f"{said}: " + ", ".join(f"{cut(key)} {short(value)}" for key, value in rest.items())


def _layout(facts: _Facts, ranks: str, stage: str) -> str:
    count = facts(ranks)
    parts = [
        counted(count, "rank") if isinstance(count, int) else "",
        facts.number(stage, "", before="ZeRO-"),
    ]
    return ", ".join(part for part in parts if part)


def _start(facts: _Facts) -> str:
    teacher = facts("teacher")
    hosts = facts("hosts")
    host = facts.text("host", before="host ")
    several = isinstance(hosts, list) and len(hosts) > 1
    where = f"{counted(len(hosts), 'host')} ({short(hosts)})" if several else host
    parts = [
        _layout(facts, "ranks", "zero_stage"),
        where,
        facts.text("precision"),
        f"teacher {cut(teacher)}" if isinstance(teacher, str) else "",
    ]
    versions = facts("versions")
    if isinstance(versions, dict):
        named = (
            f"{name} {versions[name]}"
            for name in ("uniemox-dist", "torch", "deepspeed")
            if versions.get(name)
        )
        parts.append(cut(", ".join(named)))
    said = "; ".join(part for part in parts if part)
    return "started" + facts.number("step", before=" at step ") + (f" on {said}" if said else "")


def _resume(facts: _Facts) -> str:
    of = _layout(facts, "ranks", "zero_stage")
    name = facts.text("checkpoint", before=" from ") or facts.number("step", before=" from step ")
    facts("step")
    return f"resumed{name}" + (f", a checkpoint of {of}" if of else "")


def _convert(facts: _Facts) -> str:
    before, now = _layout(facts, "from_ranks", "from_zero_stage"), _layout(facts, "ranks", "zero_stage")
    step = facts.number("step", before=" of step ")
    return f"read the checkpoint{step} of {before or 'another layout'} into {now or 'this layout'}"


def _init(facts: _Facts) -> str:
    found = [facts.number("loaded", before="", after=" parameters loaded")]
    for key in ("missing", "unexpected", "resampled"):
        value = facts.event.get(key)
        if isinstance(value, list | dict):
            found.append(f"{len(value)} {key}")
            if not value:
                facts(key)
    layout = facts.text("layout", before=" (", after=")")
    said = ", ".join(part for part in found if part)
    return (
        "initial weights" + facts.text("init_from", before=" from ") + layout + (f": {said}" if said else "")
    )


def _save(facts: _Facts) -> str:
    count = facts("bytes")
    parts = [
        size(count) if is_number(count) else "",
        facts.number("seconds", ".2f", before="in ", after=" s"),
        facts.number("write_s", ".2f", before="(", after=" s of writing)"),
    ]
    said = " ".join(part for part in parts if part)
    step = facts.number("step", before=" step ")
    blocked = facts.number("blocked_s", ".2f", before=", steps waited ", after=" s")
    return (
        f"saved{step}" + (f": {said}" if said else "") + blocked + facts.text("removed", before="; removed ")
    )


def _fault(facts: _Facts) -> str:
    place = facts.number("step", before=" at step ") + facts.number("rank", "", before=" on rank ")
    place += facts.text("host", before=" of " if "rank" in place else " on ")
    if facts("damaged"):
        said = f"replaced a damaged picture{place}: {short(facts('damaged'))}"
    else:
        said = f"fault{place}: {facts.text('error') or 'no reason given'}"
    facts("code")
    aside = facts.text("set_aside", before="; it was set aside as ")
    again = "; it would happen again" if facts("restart") is False else ""
    return said + aside + ("; it ended this attempt" if facts("ends") else "") + again


def _skip(facts: _Facts) -> str:
    where = "the gradients were" if facts("where") == "gradients" else "the loss was"
    row = facts("in_a_row")
    in_a_row = f"; {counted(row, 'step')} in a row" if isinstance(row, int) and row > 1 else ""
    return (
        "skipped" + facts.number("step", before=" step ") + f": {where} not finite{_of_loss(facts)}{in_a_row}"
    )


def _of_loss(facts: _Facts) -> str:
    # A loss that is finite while its gradients are not is a number; one that is not finite is a word.
    return facts.number("loss", ".4g", before=" (loss ", after=")") or facts.text(
        "loss", before=" (loss ", after=")"
    )


def _spike(facts: _Facts) -> str:
    loss, median = facts("loss"), facts("median")
    step = facts.number("step", before=" at step ")
    if is_number(loss) and is_number(median) and median > 0:
        return f"loss spike{step}: {loss:.4g}, {loss / median:.1f} times the running median {median:.4g}"
    return f"loss spike{step}"


def _straggler(facts: _Facts) -> str:
    seconds, median = facts("seconds"), facts("median_s")
    who = facts.number("rank", "", before="rank ") or "a rank"
    where = facts.text("host", before=" on ") + facts.number("step", before=" at step ")
    if is_number(seconds) and is_number(median) and median > 0:
        return f"{who}{where} is slow: {seconds:.3g} s a step, {seconds / median:.1f} times the median {median:.3g} s"
    return f"{who}{where} is slow"


def _signal(facts: _Facts) -> str:
    by = facts.text("signal", before=" by ") + facts.number("step", before=" after step ")
    saved = facts("saved")
    return f"stopped{by}" + (
        ", with a complete save" if saved else ", without a save" if saved is False else ""
    )


def _restart(facts: _Facts) -> str:
    counts = [
        facts.number("attempt", "", before="attempt "),
        facts.number("left", "", before="", after=" left without progress"),
    ]
    said = ", ".join(part for part in counts if part)
    code = facts.number("code", "", before=" after exit code ")
    step = facts.number("step", before=", from step ")
    pause = facts.number("pause_s", ".3g", before=" in ", after=" s") if facts("pause_s") else ""
    reason = facts.text("reason", before=": ")
    return f"the launcher starts it again{pause}{code}{step}" + (f" ({said})" if said else "") + reason


def _job(facts: _Facts) -> str:
    nodes, ranks, idle, restarts = facts("nodes"), facts("ranks"), facts("idle"), facts("restarts")
    parts = [
        counted(ranks, "rank") if isinstance(ranks, int) else "",
        f"on {counted(len(nodes), 'node')} ({short(nodes)})" if isinstance(nodes, list) else "",
    ]
    said = " ".join(part for part in parts if part)
    times = restarts if isinstance(restarts, int) and restarts > 0 else 0
    again = f", queued again {'once' if times == 1 else f'{times} times'}" if times else ""
    instead = facts.number("after", "", before=", in place of job ")
    left = f"; {counted(idle, 'task')} of it idle" if isinstance(idle, int) and idle else ""
    job = facts.number("job_id", "", before="Slurm job ") or "a Slurm job"
    return f"{job}{again}{instead}" + (f": {said}" if said else "") + left


def _requeue(facts: _Facts) -> str:
    job = facts.number("job_id", "", before="job ") or "the job"
    how = " by Slurm" if facts("by") == "slurm" else ""
    step = facts.number("step", before=", to go on from step ")
    return f"{job} is queued again{how}{step}" + facts.text("reason", before=": ")


def _resubmit(facts: _Facts) -> str:
    job = facts.number("job_id", "", before="job ") or "the job"
    nodes, reason = facts.text("nodes", before=" without "), facts.text("reason", before=": ")
    return f"{job} is submitted again{nodes}{reason}"


def _started(facts: _Facts) -> str:
    seconds = facts("seconds") or facts("parts")
    parts = {k: v for k, v in seconds.items() if is_number(v)} if isinstance(seconds, dict) else {}
    total = parts.pop("total", sum(parts.values()) if parts else None)
    said = ", ".join(f"{cut(str(part)).replace('_', ' ')} {value:.1f}" for part, value in parts.items())
    took = f", {total:.1f} s after the start" if total is not None else ""
    return f"first step{facts.number('step', before=' after step ')}{took}" + (f": {said}" if said else "")


def _end(facts: _Facts) -> str:
    return "complete" + facts.number("step", before=" at step ")


_SENTENCES: dict[str, Callable[[_Facts], str]] = {
    "job": _job,
    "start": _start,
    "started": _started,
    "resume": _resume,
    "convert": _convert,
    "init": _init,
    "save": _save,
    "fault": _fault,
    "skip": _skip,
    "spike": _spike,
    "straggler": _straggler,
    "signal": _signal,
    "restart": _restart,
    "requeue": _requeue,
    "resubmit": _resubmit,
    "end": _end,
}
KINDS = tuple(_SENTENCES)
"""The kinds of events that runs write."""
