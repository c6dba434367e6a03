"""The end of an attempt inside a Slurm job: what the batch script does next."""

import sys
import time
from dataclasses import dataclass, replace

from launch.job import lock
from launch.restarts import LONGEST_PAUSE_S, newest_step
from uniemox_dist.core.errors import EXIT_DONE, EXIT_FAULT, EXIT_REQUEUE, EXIT_USER
from uniemox_dist.runs.events import End, FaultEvent, Requeue, Restart, Resubmit, Save, Signal
from uniemox_dist.runs.folder import RunFolder, read_bad_nodes, read_lines
from uniemox_dist.runs.history import JobAttempts, job_attempts

NO_RANK_S = 240.0
"""Seconds before a further attempt after one in which no rank came so far as to say anything: a node may be lost, and
Slurm takes some minutes (SlurmdTimeout, 300 s by default) to notice that and to queue the job again."""


@dataclass(frozen=True)
class JobState:
    """What Slurm says of this job when its ranks have ended."""

    word: str = "RUNNING"
    queued_again: bool = False
    """Slurm itself has queued it again, for a node, for another job, or because somebody asked."""

    @classmethod
    def parse(cls, text: str | None, restarts: int) -> "JobState":
        """Reads `STATE [RESTARTS]`, of which the second is how often the job has been queued again by now;
        `restarts` is how often it had been when it began. Nothing at all, where Slurm does not answer, is RUNNING."""
        words = (text or "").split()
        now = int(words[1]) if len(words) > 1 and words[1].isdigit() else restarts
        word = words[0].upper() if words else "RUNNING"
        return cls(word, now > restarts or word in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED"))

    @property
    def ours(self) -> bool:
        """Whether the allocation is still this job's, so that it may decide what comes next."""
        return self.word == "RUNNING" and not self.queued_again


@dataclass(frozen=True)
class Verdict:
    """What the batch script does next, and what is said of it."""

    line: str
    """`end CODE`, `again`, `requeue` or `resubmit NODELIST`."""
    remark: str = ""
    pause_s: float = 0.0
    """Seconds to wait before."""


def settle(
    folder: RunFolder, code: int, state: JobState, job_id: int, *, may_requeue: bool = True
) -> Verdict:
    """Decides, writes it down as an event, and gives the run back unless this job goes on with it.

    Args:
        may_requeue: whether jobs may queue themselves again on this cluster.
    """
    held = lock.read(folder.job)
    if held is None or held.job_id != job_id:
        return Verdict(f"end {_ending(code)}", f"{folder.job} is not this job's any more")
    found = job_attempts(read_lines(folder.events))
    verdict = _decide(folder, code, state, held, found, may_requeue=may_requeue)
    if not (verdict.line in ("again", "requeue") or state.queued_again):
        lock.release(folder, job_id)
    return verdict


def _decide(
    folder: RunFolder,
    code: int,
    state: JobState,
    held: lock.JobLock,
    found: JobAttempts,
    *,
    may_requeue: bool,
) -> Verdict:
    step = newest_step(folder)
    saved = step is not None and (step > held.began_step or found.has(Save, step=step))
    if code in (EXIT_DONE, EXIT_USER):
        return Verdict(f"end {code}")
    if found.has(End):
        return Verdict(f"end {EXIT_DONE}", f"the run is complete; a rank ended with {code} on its way out")
    if saved and found.has(Signal, step=step, saved=True):
        code = EXIT_REQUEUE  # whatever befell a rank on its way out: all is saved
    if code == EXIT_REQUEUE and saved:
        if state.queued_again:
            folder.write(Requeue(step=step, job_id=held.job_id, by="slurm"))
            return Verdict(f"end {code}", f"saved step {step}; Slurm has queued the job again")
        if not state.ours:
            return Verdict(
                f"end {code}",
                f"saved step {step}; the job was ended ({state.word}), so it is not queued again",
            )
        if not may_requeue:
            how = "jobs do not queue themselves again on this cluster: submit again, or with --chain"
            return Verdict(f"end {code}", f"saved step {step}; {how}")
        folder.write(Requeue(step=step, job_id=held.job_id, by="job"))
        return Verdict("requeue", f"saved step {step}; queued again")
    if not state.ours:
        return Verdict(f"end {EXIT_FAULT}", f"the job was ended ({state.word})")
    if code == EXIT_REQUEUE:
        return Verdict(
            f"end {EXIT_FAULT}",
            "exit code 75 without a complete checkpoint of this attempt: not queued again",
        )
    if nodes := _bad_nodes(folder, held):
        return _elsewhere(folder, held, found, nodes)
    return _after_fault(folder, code, held, found, step)


def _after_fault(
    folder: RunFolder, code: int, held: lock.JobLock, found: JobAttempts, step: int | None
) -> Verdict:
    end, most = f"end {EXIT_FAULT}", held.max_restarts
    if (fault := found.hopeless) is not None:
        end = f"end {EXIT_USER if fault.get('code') == EXIT_USER else EXIT_FAULT}"
        return Verdict(end, f"not started again, as the same would happen: {_one_line(fault['error'])}")
    if found.has(Signal):
        return Verdict(end, "not started again, as a signal asked it to stop")
    reason = found.reason(code)
    if found.in_vain >= most:
        tried = (
            f"after {most} restart{'' if most == 1 else 's'} without a new checkpoint" if most else "at once"
        )
        folder.write(FaultEvent(error=f"given up {tried}: {reason}", ends=True, restart=False))
        return Verdict(end, f"gives up {tried} (run.max_restarts={most}); the last fault: {reason}")
    if not found.last:
        # Slurm finds a lost node by itself: if it ends this job meanwhile, the attempt does not count.
        wait = (
            f"no rank said anything, so perhaps a node is lost: waits {NO_RANK_S:.0f} s for Slurm to notice"
        )
        print(f"uniemox: {reason}; {wait}", file=sys.stderr, flush=True)
        time.sleep(NO_RANK_S)
    in_vain = found.in_vain + 1
    pause_s = min(LONGEST_PAUSE_S, 2.0 ** (in_vain - 1))
    folder.write(
        Restart(
            attempt=found.count + 1,
            left=most - in_vain,
            code=code,
            step=step,
            reason=reason,
            pause_s=pause_s,
        )
    )
    lock.update(folder, replace(held, began_step=step or 0, time=round(time.time(), 3)))
    place = "from the beginning" if step is None else f"from step {step}"
    return Verdict(
        "again", f"{reason}; starts again {place} in {pause_s:.0f} s ({in_vain} of {most})", pause_s
    )


def _bad_nodes(folder: RunFolder, held: lock.JobLock) -> dict[str, str]:
    """Nodes of this job on which the preflight of this attempt failed, and what it found."""
    return {
        line["node"]: str(line.get("finding"))
        for line in read_bad_nodes(folder)
        if line.get("job_id") == held.job_id and line["time"] >= held.time and line["node"] in held.nodes
    }


def _elsewhere(folder: RunFolder, held: lock.JobLock, found: JobAttempts, nodes: dict[str, str]) -> Verdict:
    """The same job on other nodes, unless that was tried often enough."""
    names, most = ",".join(nodes), held.max_restarts
    why = "; ".join(f"{node}: {finding}" for node, finding in nodes.items())
    if found.in_vain >= most:
        text = f"given up after {found.in_vain} submissions elsewhere (run.max_restarts={most}): {why}"
        folder.write(FaultEvent(error=text, ends=True, restart=False))
        return Verdict(f"end {EXIT_FAULT}", text)
    folder.write(Resubmit(job_id=held.job_id, nodes=list(nodes), reason=why))
    return Verdict(f"resubmit {names}", f"the preflight failed on {why}; submitted again without {names}")


def _ending(code: int) -> int:
    return code if code in (EXIT_DONE, EXIT_USER) else EXIT_FAULT


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
